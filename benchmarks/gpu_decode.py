"""A whole language model on one GPU: tersor at 16 to 2 bits, and transformers, at the shape of Llama-3-8B.

    python benchmarks/gpu_decode.py               prints the tables and writes benchmarks/results/gpu_decode.md
    python benchmarks/gpu_decode.py --compiled    with transformers' StaticCache under torch.compile too (minutes more)
    python benchmarks/gpu_decode.py --profile     prints where a step's time goes alone, and writes nothing

Method: random weights (the time does not depend on their values), made on the GPU, one model at a time. Decoding: a prompt
of 128 tokens, then 128 new ones, the likeliest each, without a round trip to the host; the time of all but the first, the
median of 5 turns after one that warms up. Bytes a token: all weights but the embedding, and the keys and values of the
positions that a token sees, in the middle of the text. The bandwidth is that of gpu_matmul.py, measured in the same run.
Prefill: 2048 tokens at once to the logits of the last, the median of 5 after one that warms up. transformers: 3 turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, gpu, gpu_seconds
from gpu_matmul import memory_bandwidth, microseconds
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tersor.formats.packing import packed_size
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels.llama_step import PARTS
from tersor.kernels.tiled_weight import K_TILE, N_BLOCK, TiledWeight
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.llama_gpu import LlamaGPU, why_not

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
GROUP_SIZE = 128
PROMPT, NEW, LONG_PROMPT = 128, 128, 2048
BATCHES = (1, 8, 32)
TURNS, PEER_TURNS, WARM_UP = 5, 3, 1
GOAL_SHARE, GOAL_RATIO = 0.85, 3.0  # of the bandwidth in bfloat16, and of 4 bits over bfloat16; both at batch 1


@dataclass(frozen=True)
class Kind:
    """bits of the layers and of the head; 16: bfloat16."""

    bits: int
    head_bits: int

    @property
    def name(self) -> str:
        if self.bits == 16:
            return "bf16"
        head = "" if self.head_bits == 8 else ", head in bf16"
        return f"{self.bits} bits{head}"


KINDS = (Kind(16, 16), Kind(8, 8), Kind(4, 8), Kind(4, 16), Kind(3, 8), Kind(2, 8))


def random_prepared(bits: int, outputs: int, inputs: int) -> TiledWeight:
    """A symmetric weight in the kernel's layout: random codes, one scale, groups of 128."""
    blocks, k_tiles = -(-outputs // N_BLOCK), inputs // K_TILE
    code_bytes, scale_bytes = N_BLOCK * K_TILE * bits // 8, 2 * N_BLOCK * K_TILE // GROUP_SIZE
    tiles = torch.randint(0, 256, (blocks, k_tiles, code_bytes + scale_bytes), dtype=torch.uint8, device="cuda")
    scale = torch.full((N_BLOCK * K_TILE // GROUP_SIZE,), 0.05 / 2**bits, dtype=torch.float16, device="cuda")
    tiles[..., code_bytes:] = scale.view(torch.uint8)
    return TiledWeight(tiles, None, bits, GROUP_SIZE, 2 ** (bits - 1), torch.float16, inputs, outputs)


def random_layer(bits: int, outputs: int, inputs: int) -> nn.Module:
    if bits == 16:
        with torch.device("meta"):
            dense = nn.Linear(inputs, outputs, bias=False)
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        return dense
    return packed_layer(random_prepared(bits, outputs, inputs), dtype=torch.bfloat16)


def packed_layer(weight: TiledWeight, *, dtype: torch.dtype, bias: Tensor | None = None) -> QuantizedLinear:
    """A layer that was never in the standard layout."""
    layer = QuantizedLinear(weight_on_meta(weight), bias, dtype=dtype)
    layer.qweight = layer.scales = layer.zeros = None  # type: ignore[assignment]
    layer.like = torch.empty(0, dtype=dtype, device=weight.tiles.device)
    layer.prepared = weight
    return layer


def weight_on_meta(weight: TiledWeight) -> QuantizedWeight:
    """The standard layout of this weight without its numbers: what a packed layer is made from."""
    outputs, inputs, groups = weight.out_features, weight.in_features, weight.in_features // GROUP_SIZE
    words = torch.empty(packed_size(inputs, weight.bits), outputs, dtype=torch.int32, device="meta")
    scales = torch.empty(groups, outputs, dtype=torch.float16, device="meta")
    zeros = torch.empty(groups, outputs, dtype=torch.uint8, device="meta")
    return QuantizedWeight(words, scales, zeros, None, weight.bits, GROUP_SIZE, inputs)


def build(kind: Kind, shape: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights on the GPU; nothing passes through the host."""
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            bits = kind.head_bits if name == "lm_head" else kind.bits
            model.set_submodule(name, random_layer(bits, module.out_features, module.in_features))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device="cuda")
            if parameter.dim() > 1:
                value.normal_(std=0.02)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).cuda()
    torch.cuda.synchronize()  # the kernel fetches its weight without waiting for who wrote it
    if reason := why_not(model):
        raise SystemExit(f"{kind.name}: {reason}")
    return model.eval()


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Of all weights that a token reads, which is one row of the embedding."""
    dense = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    packed = [each.prepared for each in model.modules() if isinstance(each, QuantizedLinear)]
    return dense + sum(weight.tiles.nbytes for weight in packed if isinstance(weight, TiledWeight))


def cache_bytes(shape: dict[str, Any], batch: int, positions: int) -> int:
    width = shape["hidden_size"] // shape["num_attention_heads"]
    return 2 * 2 * batch * positions * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width


def prompt_of(batch: int, tokens: int, shape: dict[str, Any]) -> Tensor:
    return torch.randint(shape["vocab_size"], (batch, tokens), device="cuda")


def median(measure: Callable[[], float], turns: int = TURNS) -> float:
    return statistics.median([measure() for _ in range(WARM_UP + turns)][WARM_UP:])


def decode_seconds(engine: LlamaGPU, ids: Tensor) -> float:
    """Of one token of each sequence, the first left out."""

    def turn() -> float:
        engine.reset()
        token = engine.forward(ids).argmax(dim=-1, keepdim=True)
        return gpu_seconds(lambda: engine.greedy(token, NEW - 1)) / (NEW - 1)

    return median(turn)


def prefill_seconds(engine: Any, ids: Tensor, turns: int = TURNS) -> float:
    def turn() -> float:
        engine.reset()
        return gpu_seconds(lambda: engine.forward(ids))

    return median(turn, turns)


def loop_seconds(engine: CachedModule, ids: Tensor, turns: int) -> float:
    """As decode_seconds, for an engine without `greedy`; the host waits for no token here either."""

    def turn() -> float:
        engine.reset()
        token = engine.forward(ids).argmax(dim=-1, keepdim=True)

        def loop() -> None:
            following = token
            for _ in range(NEW - 1):
                following = engine.forward(following).argmax(dim=-1, keepdim=True)

        return gpu_seconds(loop) / (NEW - 1)

    return median(turn, turns)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@contextmanager
def lap(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def engine_of(kind: Kind, shape: dict[str, Any], *, capacity: int, batch: int = 1) -> tuple[LlamaGPU, int]:
    """An engine that took a new model over, and the bytes of its weights."""
    free()
    model = build(kind, shape)
    size = weight_bytes(model)
    return LlamaGPU(model, capacity=capacity, batch=batch, take_over=True), size


def with_goal(value: float, form: str, goal: float | None) -> str:
    if goal is None:
        return format(value, form)
    return f"{value:{form}} (goal {goal:{form}}{', missed' if value < goal else ''})"


def decoding(shape: dict[str, Any], bandwidth: float) -> str:
    lines = [
        "| weights | batch | tokens/s | ms a step | faster than bf16 | MB read a step | share of the bandwidth | peak GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    dense: dict[int, float] = {}
    for kind in KINDS:
        for batch in BATCHES:
            with lap(f"{kind.name}, batch {batch}"):
                engine, size = engine_of(kind, shape, capacity=PROMPT + NEW, batch=batch)
                took = decode_seconds(engine, prompt_of(batch, PROMPT, shape))
            peak = torch.cuda.max_memory_allocated()
            del engine
            dense.setdefault(batch, took)  # bf16 comes first
            read = size + cache_bytes(shape, batch, PROMPT + NEW // 2)
            share = read / (took * 1e6) / bandwidth
            share_goal = GOAL_SHARE if (kind.bits, batch) == (16, 1) else None
            ratio_goal = GOAL_RATIO if (kind, batch) == (Kind(4, 8), 1) else None
            lines.append(
                f"| {kind.name} | {batch} | {batch / took:.0f} | {took * 1e3:.3f} | "
                f"{with_goal(dense[batch] / took, '.2f', ratio_goal)} | {read / 1e6:.0f} | "
                f"{with_goal(share, '.0%', share_goal)} | {peak / 1e9:.1f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def prompts(shape: dict[str, Any]) -> str:
    lines = ["| weights | tokens/s | ms | faster than bf16 | peak GB |", "| --- | ---: | ---: | ---: | ---: |"]
    dense = 0.0
    for kind in KINDS:
        with lap(f"{kind.name}, a prompt of {LONG_PROMPT}"):
            engine, _ = engine_of(kind, shape, capacity=LONG_PROMPT)
            took = prefill_seconds(engine, prompt_of(1, LONG_PROMPT, shape))
        peak = torch.cuda.max_memory_allocated()
        del engine
        dense = dense or took
        lines.append(
            f"| {kind.name} | {LONG_PROMPT / took:.0f} | {took * 1e3:.1f} | {dense / took:.2f} | {peak / 1e9:.1f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def transformers_loop(shape: dict[str, Any], *, compiled: bool) -> str:
    """In bfloat16 at batch 1; the bf16 engine again, right before."""
    free()
    model = build(KINDS[0], shape)
    ids, long = prompt_of(1, PROMPT, shape), prompt_of(1, LONG_PROMPT, shape)
    loop = CachedModule(model, capacity=LONG_PROMPT)
    rows: dict[str, tuple[float, float | None]] = {}
    with lap("transformers, eager"), torch.inference_mode():
        rows["transformers, eager"] = loop_seconds(loop, ids, PEER_TURNS), prefill_seconds(loop, long, PEER_TURNS)
    if compiled:
        with lap("transformers, compiled"), torch.inference_mode():
            rows["transformers, StaticCache and torch.compile"] = generate_seconds(model, ids), None
    del loop
    with lap("tersor, again"):
        engine = LlamaGPU(model, capacity=LONG_PROMPT, take_over=True)
        took = decode_seconds(engine, ids), prefill_seconds(engine, long)
    lines = [
        "| bf16, batch 1 | tokens/s | ms a token | tersor is faster by | prompt, ms | tersor is faster by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| tersor | {1 / took[0]:.0f} | {took[0] * 1e3:.3f} | | {took[1] * 1e3:.1f} | |",
    ]
    for name, (token, prompt) in rows.items():
        end = "| |" if prompt is None else f"{prompt * 1e3:.1f} | {prompt / took[1]:.2f} |"
        lines.append(f"| {name} | {1 / token:.0f} | {token * 1e3:.3f} | {token / took[0]:.2f} | {end}")
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def generate_seconds(model: LlamaForCausalLM, ids: Tensor) -> float:
    """A token by transformers' generate with its static cache, which compiles the decoding in mode reduce-overhead."""

    def run(new: int) -> float:
        return gpu_seconds(
            lambda: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, cache_implementation="static",
            )
        )  # fmt: skip

    run(NEW)  # compiles
    return median(lambda: (run(NEW) - run(1)) / (NEW - 1), PEER_TURNS)


@torch.inference_mode()
def profile(shape: dict[str, Any]) -> str:
    """Where a step's time goes at batch 1. Every multiprocessor reads its clock at each part's end; a part's time is the mean
    over the multiprocessors, and over the layers but the first and last four, scaled so that a layer's parts add up to its
    time."""
    lines = [
        "| weights | step, us | layers | head | the rest | bytes over the bandwidth | kernel by kernel |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    shares: dict[str, list[float]] = {}
    bandwidth = memory_bandwidth()
    free()
    for kind in KINDS:
        engine, size = engine_of(kind, shape, capacity=PROMPT + NEW)
        ids = prompt_of(1, PROMPT, shape)
        whole = decode_seconds(engine, ids) * 1e6
        at_once = engine._at_once
        assert at_once is not None, "the layers do not run as one launch here"
        engine._position.fill_(PROMPT + NEW // 2)
        layers, head = microseconds([at_once] * 4), microseconds([partial(engine._head, at_once.y)] * 4)
        engine._at_once = marked = engine._one_launch(profile=True)
        assert marked is not None
        for _ in range(3):
            marked()
        marks = marked.marks
        assert marks is not None
        parts = marks[:, 4:-4].diff(dim=-1).double().mean(dim=(0, 1))
        shares[kind.name] = (parts / parts.sum() * layers / shape["num_hidden_layers"]).tolist()
        engine._at_once, engine._graph = None, None
        one_by_one = decode_seconds(engine, ids) * 1e6
        least = (size + cache_bytes(shape, 1, PROMPT + NEW // 2)) / bandwidth
        lines.append(
            f"| {kind.name} | {whole:.0f} | {layers:.0f} | {head:.0f} | {whole - layers - head:.0f} | {least:.0f} | "
            f"{one_by_one:.0f} |"
        )
        print(lines[-1], flush=True)
        del engine, at_once, marked, marks
        free()
    lines += [
        "",
        "A layer, us, the mean over the multiprocessors:",
        "",
        "| part | " + " | ".join(shares) + " |",
        "| --- |" + " ---: |" * len(shares),
    ]
    for index, part in enumerate(PARTS):
        lines.append(f"| {part} | " + " | ".join(f"{each[index]:.1f}" for each in shares.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_decode.md")
    parser.add_argument("--compiled", action="store_true", help="transformers under torch.compile too")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, and nothing else")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, for a quick trial")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": arguments.layers}
    if arguments.profile:
        print(profile(shape))
        return
    bandwidth = memory_bandwidth()
    free()
    command = "python benchmarks/gpu_decode.py" + (" --compiled" if arguments.compiled else "")
    command += "" if arguments.layers == SHAPE["num_hidden_layers"] else f" --layers {arguments.layers}"
    machine = f"{gpu('transformers')}; an elementwise kernel reads and writes {bandwidth / 1e6:.2f} TB/s."
    print(machine, flush=True)
    # A section a table: a title and what makes it.
    sections: dict[str, Callable[[], str]] = {
        f"{NEW} new tokens after a prompt of {PROMPT}": lambda: decoding(shape, bandwidth),
        f"A prompt of {LONG_PROMPT} tokens, batch 1": lambda: prompts(shape),
        "Beside transformers": lambda: transformers_loop(shape, compiled=arguments.compiled),
        "Where a step's time goes, batch 1": lambda: profile(shape),
    }
    text = [
        "# A language model of the shape of Llama-3-8B on one GPU",
        f"{machine} Command: `{command}`.\n"
        f"Hidden size {shape['hidden_size']}, {shape['num_hidden_layers']} layers, {shape['num_attention_heads']} heads, "
        f"{shape['num_key_value_heads']} key-value heads,\nfeed-forward {shape['intermediate_size']}, "
        f"vocabulary {shape['vocab_size']}; random weights, activations in bfloat16.\n"
        f"Packed weights: symmetric, groups of {GROUP_SIZE}; the head in 8 bits where nothing else is said. A step makes one\n"
        "token of each sequence; tokens/s are those of all sequences together.",
        *(f"## {title}\n\n{make()}" for title, make in sections.items()),
    ]
    kept = arguments.out.read_text().partition("## What limits it")[2] if arguments.out.exists() else ""
    text += [f"## What limits it{kept.rstrip()}"] if kept else []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
