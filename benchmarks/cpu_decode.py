"""A whole language model on a CPU: tersor at 16 to 2 bits beside transformers and llama.cpp, turn by turn in one run.

    python benchmarks/cpu_decode.py --llama-python PYTHON            prints the tables
    python benchmarks/cpu_decode.py --llama-python PYTHON --write    and keeps them in benchmarks/results/cpu_decode.md

PYTHON is that of an environment with llama-cpp-python and gguf; llama.cpp is left out without it. The model is a LLaMA of 1.1
billion random parameters (the time does not depend on their values), batch 1. In every turn each competitor reads a prompt and
makes new tokens, one competitor after the other, all with the same number of threads. Ratios are medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tersor.formats.packing import packed_size
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear, prepare_layers
from tersor.runtime.bench import Spread, Turn, measure, random_prompt, ratios, speeds, take_turn
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.llama_cpu import LlamaCPU

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
GROUP_SIZE, HEAD_BITS = 128, 8
SLOW = "transformers bf16"
LLAMA = "llama.cpp Q4_0"


def dense_model(shape: dict[str, int]) -> LlamaForCausalLM:
    """Random bfloat16 weights."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).eval()
    finally:
        torch.set_default_dtype(previous)


def packed_model(dense: LlamaForCausalLM, bits: int) -> nn.Module:
    """The same model with random packed weights: groups of 128, symmetric; the head in 8 bits."""
    with torch.device("meta"):
        model = LlamaForCausalLM(dense.config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            width = HEAD_BITS if name == "lm_head" else bits
            model.set_submodule(name, QuantizedLinear(random_weight(width, *module.weight.shape)))
    shared = dict(dense.named_parameters())
    for name, _ in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, shared[name])
    model.model.rotary_emb = dense.model.rotary_emb
    prepare_layers(model)
    return model.eval()


def random_weight(bits: int, outputs: int, inputs: int) -> QuantizedWeight:
    groups = inputs // GROUP_SIZE
    words = torch.randint(-(2**31), 2**31, (packed_size(inputs, bits), outputs), dtype=torch.int32)
    scales = torch.full((groups, outputs), 0.05 / 2**bits, dtype=torch.float16)
    zeros = torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(words, scales, zeros, None, bits, GROUP_SIZE, inputs)


class LlamaCpp:
    """llama.cpp in its own process, which waits between turns."""

    def __init__(self, python: str, folder: Path, shape: dict[str, int], context: int, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_peer.py")
        command = [python, str(script), str(folder), json.dumps(shape), str(context), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.info = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("llama.cpp did not start: does --llama-python have llama-cpp-python and gguf?")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, prompt_tokens: int, new_tokens: int) -> Turn:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{prompt_tokens} {new_tokens}\n")
        self.process.stdin.flush()
        return Turn(**self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def competitors(
    arguments: argparse.Namespace, shape: dict[str, int], llama: LlamaCpp | None
) -> tuple[dict[str, Callable[[], Turn]], dict[str, int]]:
    """By name: one turn, and the bytes of weights that a new token reads."""
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    capacity = prompt + new
    ids = random_prompt(shape["vocab_size"], batch=1, tokens=prompt)
    dense = dense_model(shape)
    read = sum(p.numel() for p in dense.parameters()) - dense.model.embed_tokens.weight.numel()
    head = dense.lm_head.weight.numel()
    engines: dict[str, tuple[Any, int]] = {
        SLOW: (CachedModule(dense, capacity=capacity), 2 * read),
        "tersor bf16": (LlamaCPU(dense, capacity=capacity), 2 * read),
    }
    if arguments.fp32:
        engines["transformers fp32"] = CachedModule(dense_model(shape).float(), capacity=capacity), 4 * read
    for bits in (8, 4, 3, 2):
        size = (read - head) * (bits + 16 / GROUP_SIZE) + head * (HEAD_BITS + 16 / GROUP_SIZE)
        engine = LlamaCPU(packed_model(dense, bits), capacity=capacity)
        engines[f"tersor {bits} bits"] = engine, int(size / 8)
    turns: dict[str, Callable[[], Turn]] = {}
    for name, (engine, _) in engines.items():
        part = ids[:, : min(prompt, arguments.slow_prompt)] if name == SLOW else ids
        turns[name] = lambda engine=engine, part=part: scaled(take_turn(engine, part, new), prompt / part.shape[1])
    sizes = {name: size for name, (_, size) in engines.items()}
    if llama is not None:
        turns[LLAMA] = lambda: llama.turn(prompt, new)
        sizes[LLAMA] = int(llama.info["bytes"] - dense.model.embed_tokens.weight.numel() * 4.5 / 8)
    return turns, sizes


def scaled(turn: Turn, factor: float) -> Turn:
    """The seconds of a whole prompt from those of its part."""
    return Turn(turn.prefill * factor, turn.decode)


GOALS = (  # of tersor at 4 bits: part of a turn, peer, how many times as fast
    ("decode", LLAMA, 1.3),
    ("decode", SLOW, 3.2),
    ("prefill", LLAMA, 4.0),
    ("prefill", SLOW, 1.0),
    ("decode", "tersor 3 bits", None),
    ("decode", "tersor 2 bits", None),
)


def show(found: Spread) -> str:
    return f"{found.median:.1f} ({found.low:.1f} - {found.high:.1f})"


def report(turns: dict[str, list[Turn]], sizes: dict[str, int], arguments: argparse.Namespace) -> str:
    peers = [name for name in (SLOW, "transformers fp32", LLAMA) if name in turns]
    lines = ["### Tokens per second: median (middle half of the turns)", ""]
    lines += ["| | prompt | new | weights read for a new token, MB | GB/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, each in turns.items():
        found = speeds(each, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, batch=1)
        bandwidth = sizes[name] * found["decode"].median / 1e9
        lines.append(
            f"| {name} | {show(found['prefill'])} | {show(found['decode'])} | {sizes[name] / 1e6:.0f} | {bandwidth:.1f} |"
        )
    for part, title in (("decode", "New tokens"), ("prefill", "Prompt")):
        lines += ["", f"### {title}: times as fast as", "", f"| | {' | '.join(peers)} |"]
        lines.append("| --- " + "| ---: " * len(peers) + "|")
        for name in turns:
            if name.startswith("tersor"):
                cells = [f"{ratios(turns[name], turns[peer])[part].median:.2f}" for peer in peers]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "### Goals, for 4 bits", "", "| | goal | found | |", "| --- | ---: | ---: | --- |"]
    for part, other, goal in GOALS:
        if other not in turns:
            continue
        if goal is None:  # fewer bits shall not be slower
            found = ratios(turns[other], turns["tersor 4 bits"])[part].median
            lines.append(
                f"| {part}: {other} against 4 bits | 1.0 | {found:.2f} | {'met' if found >= 1 else 'missed'} |"
            )
        else:
            found = ratios(turns["tersor 4 bits"], turns[other])[part].median
            lines.append(f"| {part} against {other} | {goal} | {found:.2f} | {'met' if found >= goal else 'missed'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llama-python", help="Python with llama-cpp-python and gguf")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slow-prompt", type=int, default=64, help="prompt of transformers' bf16, scaled to the whole")
    parser.add_argument("--fp32", action="store_true", help="transformers in float32 too, which takes 4.4 GB more")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, for a quick trial")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": arguments.layers}
    with tempfile.TemporaryDirectory(prefix="tersor-bench-") as folder:
        llama = None
        if arguments.llama_python:
            context = arguments.prompt_tokens + arguments.new_tokens
            llama = LlamaCpp(arguments.llama_python, Path(folder), shape, context, arguments.threads)
        with torch.inference_mode():
            runners, sizes = competitors(arguments, shape, llama)
            turns = measure(
                runners,
                repeats=arguments.turns,
                progress=lambda name, done, total: print(f"turn {done} of {total - 1}: {name}", file=sys.stderr),
            )
        if llama is not None:
            llama.close()
    peer = "" if llama is None else f"llama-cpp-python {llama.info['version']} ({llama.info['features']}),\n"
    options = " ".join(
        f"--{name.replace('_', '-')} {getattr(arguments, name)}"
        for name in ("prompt_tokens", "new_tokens", "slow_prompt", "turns", "threads", "layers")
    )
    options += " --fp32" if arguments.fp32 else ""
    text = f"""# A LLaMA of 1.1 billion parameters on a CPU

Command: `python benchmarks/cpu_decode.py --llama-python PYTHON {options} --write`.
torch {torch.__version__}, transformers {transformers.__version__},
{peer}{cpu.describe()}.
Hidden size {shape["hidden_size"]}, {shape["num_hidden_layers"]} layers, {shape["num_attention_heads"]} heads, \
{shape["num_key_value_heads"]} key-value heads, feed-forward {shape["intermediate_size"]}, vocabulary {shape["vocab_size"]}; \
batch 1, {arguments.prompt_tokens} prompt and {arguments.new_tokens} new tokens.
Packed weights: symmetric, groups of {GROUP_SIZE}, the head in {HEAD_BITS} bits (llama.cpp's Q4_0 files have it in 6.6).
transformers' bf16 reads the first {min(arguments.slow_prompt, arguments.prompt_tokens)} tokens of the prompt only; \
its time is taken times {arguments.prompt_tokens / min(arguments.slow_prompt, arguments.prompt_tokens):g}.
transformers' modules run without `generate` and with buffers for the cache, which can only help them.

{report(turns, sizes, arguments)}"""
    print(text)
    if arguments.write:
        path = RESULTS / "cpu_decode.md"
        kept = path.read_text().partition("## What limits it")[2] if path.exists() else ""
        path.write_text(text + (f"\n## What limits it{kept}" if kept else ""))


if __name__ == "__main__":
    main()
