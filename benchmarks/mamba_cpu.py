"""Mamba of 130 million parameters on a CPU: tersor's engine at 32, 16 and 4 bits beside transformers, turn by turn in one run.

    python benchmarks/mamba_cpu.py --threads 2            prints the table
    python benchmarks/mamba_cpu.py --threads 2 --write    and keeps it in benchmarks/results/mamba_cpu.md
    OMP_NUM_THREADS=1 python benchmarks/mamba_cpu.py --processor-time --turns 3 --write
                                                          ratios by processor time, which other programs disturb less, without
                                                          transformers' bf16: benchmarks/results/mamba_cpu_time.md

Weights are random (the time does not depend on their values), batch 1. In every turn each competitor reads a prompt and makes new
tokens, one competitor after the other, all with the same number of threads. Ratios are medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import command, speed_ratios, versions, write_table
from cpu_decode import GROUP_SIZE, HEAD_BITS, random_weight, show
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from tersor import models
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear, prepare_layers
from tersor.runtime.bench import Turn, measure, random_prompt, ratios, speeds, take_turn
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.stepped_module import SteppedModule

VOCABULARY = 50280
PEERS = ("transformers fp32", "transformers bf16")
GOALS = (  # competitor, peer, part of a turn, how many times as fast
    ("tersor fp32", "transformers fp32", "prefill", 5.0),
    ("tersor fp32", "transformers fp32", "decode", 5.0),
    ("tersor bf16", "transformers bf16", "prefill", 5.0),
    ("tersor bf16", "transformers bf16", "decode", 5.0),
    ("tersor 4 bits", "tersor bf16", "decode", 2.0),
    ("tersor 4 bits, head 8", "tersor bf16", "decode", 2.0),
)


def ours(*, rounded: bool = False, bits: int | None = None, head_bits: int | None = None) -> nn.Module:
    """rounded: to values that bfloat16 holds, as in a checkpoint of that type. bits: of the packed projections; dt_proj, which
    has 48 inputs, stays as it is."""
    module = models.create("mamba-130m").eval().requires_grad_(False)
    if rounded:
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    for name, each in list(module.named_modules()):
        width = head_bits if name == "lm_head" else bits
        if isinstance(each, nn.Linear) and not name.endswith("dt_proj") and width is not None:
            module.set_submodule(name, QuantizedLinear(random_weight(width, *each.weight.shape)))
    prepare_layers(module)
    return module


def theirs(dtype: torch.dtype) -> nn.Module:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=768, state_size=16, num_hidden_layers=24)
    return MambaForCausalLM(config).to(dtype).eval()


def make_engines(capacity: int) -> dict[str, Any]:
    return {
        "transformers fp32": CachedModule(theirs(torch.float32), capacity=capacity),
        "transformers bf16": CachedModule(theirs(torch.bfloat16), capacity=capacity),
        "tersor fp32": SteppedModule(ours(), capacity=capacity, take_over=True),
        "tersor bf16": SteppedModule(ours(rounded=True), capacity=capacity, take_over=True),
        "tersor 4 bits": SteppedModule(ours(rounded=True, bits=4), capacity=capacity, take_over=True),
        "tersor 4 bits, head 8": SteppedModule(
            ours(rounded=True, bits=4, head_bits=HEAD_BITS), capacity=capacity, take_over=True
        ),
    }


def competitors(prompt: int, new: int) -> dict[str, Callable[[], Turn]]:
    ids = random_prompt(VOCABULARY, batch=1, tokens=prompt)
    engines = make_engines(prompt + new)
    with torch.inference_mode():
        for engine in engines.values():
            take_turn(engine, ids[:, :8], 3)  # what is compiled or allocated at first does not count
    return {name: lambda engine=engine: take_turn(engine, ids, new) for name, engine in engines.items()}


def report(turns: dict[str, list[Turn]], prompt: int, new: int) -> str:
    lines = ["### Tokens per second: median (middle half of the turns)", ""]
    lines += [f"| | prompt | new | times {PEERS[0]}: prompt | new | times {PEERS[1]}: prompt | new |"]
    lines += ["| --- " + "| ---: " * 6 + "|"]
    for name, each in turns.items():
        found = speeds(each, prompt_tokens=prompt, new_tokens=new, batch=1)
        times = [f"{ratios(each, turns[peer])[part].median:.2f}" for peer in PEERS for part in ("prefill", "decode")]
        lines.append(f"| {name} | {show(found['prefill'])} | {show(found['decode'])} | {' | '.join(times)} |")
    lines += ["", "### Goals", "", "| | goal | found | |", "| --- | ---: | ---: | --- |"]
    for name, peer, part, goal in GOALS:
        times = ratios(turns[name], turns[peer])[part].median
        what = {"prefill": "prompt", "decode": "new tokens"}[part]
        lines.append(
            f"| {what}: {name} against {peer} | {goal} | {times:.2f} | {'met' if times >= goal else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def by_processor_time(prompt: int, new: int, turns: int) -> str:
    """How many times as fast as the first row; medians of the turns' processor time."""
    engines: dict[str, Any] = {
        name: engine for name, engine in make_engines(prompt + (turns + 1) * new).items() if name != "transformers bf16"
    }
    ids = random_prompt(VOCABULARY, batch=1, tokens=prompt)

    def read(engine: Any) -> None:
        engine.reset()
        engine.forward(ids)

    def write(engine: Any) -> None:  # goes on with what it read before
        for _ in range(new):
            engine.forward(ids[:, :1])

    with torch.inference_mode():
        found = [
            speed_ratios({name: functools.partial(task, engine) for name, engine in engines.items()}, turns=turns)
            for task in (read, write)
        ]
    lines = [f"| | reading {prompt} tokens | {new} new tokens |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {found[0][name]:.2f} | {found[1][name]:.2f} |" for name in engines]
    lines += ["", "New tokens, 4 bits against tersor bf16: goal 2.0, found "]
    bf16 = found[1]["tersor bf16"]
    lines[-1] += ", ".join(f"{found[1][name] / bf16:.2f} ({name[7:]})" for name in engines if "4 bits" in name) + "."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="ratios by processor time, on one thread")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    if arguments.processor_time:
        ratios_found = by_processor_time(prompt, new, arguments.turns)
        about = (
            "Times as fast as transformers fp32, by processor time on one thread. Batch 1; weights as in mamba_cpu.md."
        )
        text = f"# Mamba of 130 million parameters by processor time\n\n{about}\n\n{ratios_found}\n\n"
        text += f"{cpu.describe()}; {versions('transformers')}\n`OMP_NUM_THREADS=1 {command()}`"
        print(text)
        if arguments.write:
            write_table("mamba_cpu_time", text)
        return
    engines = competitors(prompt, new)  # not in inference mode, as users load them
    with torch.inference_mode():
        turns = measure(
            engines,
            repeats=arguments.turns,
            warm_up=0,
            progress=lambda name, done, total: print(f"turn {done + 1} of {total}: {name}", file=sys.stderr),
        )
    names = ("prompt_tokens", "new_tokens", "turns", "threads")
    options = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names)
    text = f"""# Mamba of 130 million parameters on a CPU

Command: `python benchmarks/mamba_cpu.py {options} --write`.
torch {torch.__version__}, transformers {transformers.__version__},
{cpu.describe()}.
24 layers of width 768, state 16, vocabulary {VOCABULARY}; batch 1, {prompt} prompt and {new} new tokens.
Packed weights: symmetric, groups of {GROUP_SIZE}; `dt_proj` stays in 16 bits, and so does the head where nothing else is said.
transformers runs its own loop over time (no mamba-ssm kernels exist for CPUs), without `generate`, which can only help it.

{report(turns, prompt, new)}"""
    print(text)
    if arguments.write:
        write_table("mamba_cpu", text)


if __name__ == "__main__":
    main()
