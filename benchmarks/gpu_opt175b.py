"""A model of the shape of OPT-175B at 3 bits on one GPU: milliseconds per token, beside the GPTQ paper's.

    python benchmarks/gpu_opt175b.py               prints the table and writes benchmarks/results/gpu_opt175b.md
    python benchmarks/gpu_opt175b.py --layers 2    a quick trial with fewer layers; prints only

transformers' OPT module with random packed weights, groups of 128, symmetric; the embedding, which is the head as well, and all
else in float16. The words are made in the kernel's layout on the GPU: nothing is quantized and no dense weight is ever held. The
time does not depend on their values. Batch 1, greedy, 64 tokens after a prompt of 128 and a few to warm up; a token's time ends
when its number is on the CPU. Both ways run on the same module one after the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from common import RESULTS, gpu
from gpu_decode import GROUP_SIZE, packed_layer
from gpu_matmul import memory_bandwidth
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from tersor.kernels.quantized_matmul import quantized_matmul, reference
from tersor.kernels.tiled_weight import K_TILE, N_BLOCK, TiledWeight, restore
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.runtime.bench import random_prompt
from tersor.runtime.cached_module import CachedModule

SHAPE = {
    "vocab_size": 50272,
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 49152,
    "num_attention_heads": 96,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
}
LAYERS, BITS = 96, 3
PROMPT, WARM_UP, TOKENS = 128, 8, 64
PAPER = "GPTQ's paper: 71 ms with 3 bits on one A100-80GB, 230 ms in float16 on five (OPT-175B, batch 1, 128 tokens)."


def random_prepared(inputs: int, outputs: int) -> TiledWeight:
    """Codes of random bits, which are all valid, and scales that keep the activations' size within float16."""
    code_bytes = N_BLOCK * K_TILE * BITS // 8
    blocks, k_tiles = outputs // N_BLOCK, inputs // K_TILE
    size = 0.2 / (2**BITS * 12**-0.5 * math.sqrt(inputs))  # uniform codes spread by 2^bits / sqrt(12)
    words = torch.randint(-(2**31), 2**31, (blocks, k_tiles, code_bytes // 4), dtype=torch.int32, device="cuda")
    scales = (torch.rand(blocks, k_tiles, N_BLOCK, device="cuda") * 0.5 + 0.75) * size
    tiles = torch.cat([words.view(torch.uint8), scales.half().view(torch.uint8)], dim=-1)
    return TiledWeight(tiles, None, BITS, GROUP_SIZE, 2 ** (BITS - 1), torch.float16, inputs, outputs)


def random_layer(inputs: int, outputs: int) -> QuantizedLinear:
    bias = torch.randn(outputs, device="cuda").mul_(0.01).half()
    return packed_layer(random_prepared(inputs, outputs), dtype=torch.float16, bias=bias)


def random_model(layers: int) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = OPTForCausalLM(OPTConfig(**SHAPE, num_hidden_layers=layers))
    blocks = model.get_submodule("model.decoder.layers")
    shapes = {name: (m.in_features, m.out_features) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    for name in shapes:
        blocks.set_submodule(name, nn.Identity())
    model = model.half().to_empty(device="cuda").eval()
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    for name, (inputs, outputs) in shapes.items():
        blocks.set_submodule(name, random_layer(inputs, outputs))
    torch.cuda.synchronize()
    return model


def check_random_layer() -> None:
    """The tiles mean the same to the kernel as to `restore`."""
    weight = random_prepared(SHAPE["hidden_size"], SHAPE["hidden_size"])
    x = torch.randn(1, weight.in_features, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    expected = reference(x, restore(weight)).float()
    error = (quantized_matmul(x, weight).float() - expected).norm() / expected.norm()
    assert error < 1e-2, f"the kernel and the reference differ by {float(error):.1%}"


def milliseconds(engine: CachedModule, prompt: torch.Tensor) -> list[float]:
    """Of every token after those that warm up."""
    engine.reset()
    token = engine.forward(prompt).argmax(-1, keepdim=True).cpu()
    times = []
    for _ in range(WARM_UP + TOKENS):
        start = time.perf_counter()
        logits = engine.forward(token)
        token = logits.argmax(-1, keepdim=True).cpu()
        times.append(1e3 * (time.perf_counter() - start))
    assert bool(logits.isfinite().all()), "the random model's activations overflow"
    return times[WARM_UP:]


def bytes_read(model: nn.Module, layers: int, positions: float) -> float:
    """Of a step: packed weights, head, and the keys and values of so many positions."""
    packed = sum(m.prepared.tiles.nbytes for m in model.modules() if isinstance(m, QuantizedLinear) and m.prepared)
    head = model.get_submodule("lm_head").weight
    assert isinstance(head, torch.Tensor)
    return packed + head.nbytes + 2 * 2 * positions * SHAPE["hidden_size"] * layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_opt175b.md")
    arguments = parser.parse_args()
    layers: int = arguments.layers

    bandwidth = memory_bandwidth() * 1e6  # bytes a second
    check_random_layer()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = random_model(layers)
    print(f"{layers} layers made in {time.perf_counter() - start:.1f} s", flush=True)
    capacity = PROMPT + WARM_UP + TOKENS
    prompt = random_prompt(SHAPE["vocab_size"], batch=1, tokens=PROMPT)

    lines = [
        "| a step | ms per token | middle half | GB read | share of that bandwidth | tokens/s | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("one CUDA graph", "without"):
        engine = CachedModule(model, capacity=capacity)
        if name == "without":
            engine.why_no_graph = "measured without"
        times = milliseconds(engine, prompt)
        assert engine.graphed == (name == "one CUDA graph"), engine.why_no_graph
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        positions = capacity if engine.graphed else PROMPT + WARM_UP + TOKENS / 2
        size = bytes_read(model, layers, positions)
        lines.append(
            f"| {name} | {median:.1f} | {low:.1f} - {high:.1f} | {size / 1e9:.1f} | {size / median * 1e3 / bandwidth:.0%} | "
            f"{1e3 / median:.1f} | {torch.cuda.max_memory_allocated() / 1e9:.1f} |"
        )
        print(lines[-1], flush=True)
        del engine

    machine = f"{gpu('transformers')}; an elementwise kernel reads and writes {bandwidth / 1e12:.2f} TB/s."
    sections = [
        "# OPT-175B's shape at 3 bits on one GPU",
        f"{machine} Command: `python benchmarks/gpu_opt175b.py`. Hidden size 12288, {layers} layers, 96 heads; random weights\n"
        f"in 3 bits, groups of {GROUP_SIZE}, symmetric; head, embeddings and activations in float16. Batch 1, greedy; medians\n"
        f"of {TOKENS} tokens after a prompt of {PROMPT}. Read are the packed weights, the head, keys and values. Peak memory is\n"
        "torch's, of the whole run so far, without what CUDA itself takes.",
        "\n".join(lines),
        PAPER,
    ]
    if layers == LAYERS:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
