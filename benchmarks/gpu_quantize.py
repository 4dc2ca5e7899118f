"""How long GPTQ takes on one GPU: single layers, a block of the OPT-175B shape, a checkpoint of the Llama-3-8B shape.

    python benchmarks/gpu_quantize.py            # prints the tables and writes benchmarks/results/gpu_quantize.md
    python benchmarks/gpu_quantize.py --parts layers,precision --layers 4 --out ""        # a quick trial

Weights and samples are random: no step's time depends on their values. 4 bits, symmetric, groups of 128, 128 samples of 2048
tokens, unless said otherwise. The checkpoint is written to --folder, and read from there by the job.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, gpu, gpu_seconds
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import tersor
from tersor.calibrate.hessian import Hessian
from tersor.methods.weights.gptq_solver import Solution, factorize, solve_factorized

SAMPLES, TOKENS = 128, 2048
LAYERS = ((4096, 4096), (4096, 14336), (12288, 12288), (12288, 49152))  # outputs, inputs
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
OPT = {
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 1,
    "num_attention_heads": 96,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
WHOLE_JOB_GOAL, BLOCK_GOAL = 60.0, 10.0  # seconds


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs, after one that does not count."""
    return statistics.median([gpu_seconds(work) for _ in range(repeats + 1)][1:])


def inputs_of(columns: int, tokens: int = TOKENS) -> Tensor:
    """Correlated inputs of different sizes, float16 [tokens, columns]."""
    x = torch.randn(tokens, columns, device="cuda")
    shared = torch.randn(tokens, 64, device="cuda") @ torch.randn(64, columns, device="cuda") / 8
    return ((x + shared) * torch.randn(columns, device="cuda").div(2).exp()).half()


def hessian_of(columns: int) -> Tensor:
    hessian = Hessian(columns, device="cuda")
    for _ in range(-(-2 * columns // TOKENS)):
        hessian.add(inputs_of(columns), 1)
    return hessian.matrix


def single_layers() -> list[str]:
    lines = [
        "| outputs x inputs | statistics of a sample, ms | TFLOP/s | factorizing, s | solving, s | together, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rows, columns in LAYERS:
        x, hessian = inputs_of(columns), Hessian(columns, device="cuda")
        adding = seconds(partial(hessian.add, x, 1), 5)
        del hessian
        rate = columns * (columns + 1) * TOKENS / adding
        H, W = hessian_of(columns), torch.randn(rows, columns, device="cuda").half()
        factorizing = seconds(partial(factorize, H), 2)
        factor = factorize(H)
        del H
        solving = seconds(partial(solve_factorized, W, factor, bits=4, group_size=128, sym=True), 2)
        del factor
        lines.append(
            f"| {rows} x {columns} | {adding * 1e3:.2f} | {rate / 1e12:.0f} | {factorizing:.3f} | {solving:.3f} | "
            f"{factorizing + solving:.2f} |"
        )
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    return lines


def precision() -> list[str]:
    """One layer of 4096 x 4096, solved from statistics of different precision and on different devices."""
    columns, parts = 4096, [inputs_of(4096) for _ in range(8)]
    W = torch.randn(1024, columns, device="cuda") / 64
    tensor_cores = Hessian(columns, device="cuda")
    for part in parts:
        tensor_cores.add(part, 1)
    exact = sum((part.double().t() @ part.double() for part in parts), torch.zeros((), device="cuda")) * 2 / len(parts)
    single = sum((part.float().t() @ part.float() for part in parts), torch.zeros((), device="cuda")) * 2 / len(parts)

    def solved(H: Tensor, weight: Tensor = W) -> Solution:
        return solve_factorized(weight.to(H.dtype), factorize(H), bits=4, group_size=128, sym=True)

    best = solved(exact)
    lines = [
        "| statistics | solved in | distance of H from float64's | levels that differ | the layer's error |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, how, H in (
        ("float64", "float64, GPU", exact),
        ("float64", "float32, GPU", exact.float()),
        ("float32", "float32, GPU", single),
        ("float16 on tensor cores", "float32, GPU", tensor_cores.matrix),
        ("float16 on tensor cores", "float32, CPU", tensor_cores.matrix.cpu()),
    ):
        found = solved(H, W.to(H.device))
        away = float((H.double().to(exact.device) - exact).norm() / exact.norm())
        flips = int((found.codes.to(best.codes.device) != best.codes).sum())
        d = W.double() - found.dequantize().double().to(W.device)
        error = float(((d @ exact) * d).sum())
        lines.append(f"| {name} | {how} | {away:.1e} | {flips} of {W.numel()} | {error:.6g} |")
        print(lines[-1], flush=True)
    gpu, cpu = (solved(H, W.to(H.device)).codes.cpu() for H in (tensor_cores.matrix, tensor_cores.matrix.cpu()))
    lines += ["", f"GPU and CPU, from the same statistics: {int((gpu != cpu).sum())} of {gpu.numel()} levels differ."]
    return lines


def samples(vocabulary: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(vocabulary, (1, TOKENS), generator=generator)} for _ in range(SAMPLES)]


def randomize(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)


def opt_block() -> list[str]:
    """One block of the OPT-175B shape: its six linear maps with both forward passes, in memory."""
    lines = ["| | s | peak memory, GB |", "| --- | ---: | ---: |"]
    for name, method in (
        ("as the paper: all layers from one pass", tersor.GPTQ(bits=4, group_size=128, true_sequential=False)),
        ("true-sequential (tersor's default)", tersor.GPTQ(bits=4, group_size=128)),
    ):
        with torch.device("cuda"):
            model = OPTForCausalLM(OPTConfig(**OPT, dtype="float16")).half().eval()
        randomize(model)
        torch.cuda.reset_peak_memory_stats()
        laps: list[float] = []

        def progress(what: str, done: int, total: int, laps: list[float] = laps) -> None:
            if what.startswith(("compressing", "compressed")):
                torch.cuda.synchronize()
                laps.append(time.perf_counter())

        tersor.compress(model, method, calibration=samples(OPT["vocab_size"]), progress=progress)
        peak = torch.cuda.max_memory_allocated() / 1e9
        lines.append(f"| {name} | {laps[-1] - laps[0]:.2f} | {peak:.1f} |")
        print(lines[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    return lines


def write_checkpoint(folder: Path, layers: int) -> float:
    """A random bfloat16 checkpoint of the Llama-3-8B shape, a shard for every block; its size in GB."""
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": layers}, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        shard = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        value = value.normal_(0, 0.02) if parameter.dim() > 1 else value.fill_(1)
        shards.setdefault(shard, {})[name] = value.cpu()
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def whole_job(folder: Path | None, layers: int) -> list[str]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="tersor-bench-") as place:
        source, out = Path(place) / "original", Path(place) / "packed"
        source.mkdir()
        size = write_checkpoint(source, layers)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        marks: dict[str, float] = {}

        def progress(what: str, done: int, total: int) -> None:
            marks.setdefault(what.split(" model.")[0], time.perf_counter() - started)

        calibration = samples(LLAMA["vocab_size"])
        result = tersor.compress(
            str(source), tersor.GPTQ(bits=4, group_size=128), calibration=calibration, out=out, progress=progress
        )
        total = time.perf_counter() - started
        summary = result.summary
        blocks = list(summary.seconds_per_block.values())[1:]
        solving = sum(layer.seconds for layer in summary.layers)
        packed = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9
    missed = "" if total <= WHOLE_JOB_GOAL else " (missed)"
    steps = ", ".join(f"{what} from {when:.1f} s" for what, when in marks.items())
    print(steps)
    return [
        "| blocks | original, GB | packed, GB | whole job, s | goal | a block, s | solving, s | peak memory, GB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {layers} | {size:.1f} | {packed:.1f} | {total:.1f} | {WHOLE_JOB_GOAL:.0f}{missed} | "
        f"{statistics.median(blocks):.2f} | {solving:.1f} | {summary.peak_memory / 1e9:.1f} |",
        "",
        f"The job's steps: {steps}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="layers,precision,block,model")
    parser.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"], help="blocks of the whole model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (30 GB)")
    parser.add_argument("--out", default=str(RESULTS / "gpu_quantize.md"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    machine = gpu("transformers")
    print(machine)
    parts = {
        "layers": ("Single layers", single_layers),
        "precision": ("What the precision costs", precision),
        "block": (f"A block of the OPT-175B shape (goal: {BLOCK_GOAL:.0f} s)", opt_block),
        "model": ("A checkpoint of the Llama-3-8B shape", lambda: whole_job(arguments.folder, arguments.layers)),
    }
    sections = [
        "# GPTQ on one GPU",
        "",
        f"{machine}. Command: `python benchmarks/gpu_quantize.py`. Random weights and samples; 4 bits, symmetric, groups of",
        f"128; {SAMPLES} samples of {TOKENS} tokens.",
    ]
    for name in arguments.parts.split(","):
        title, work = parts[name]
        sections += ["", f"## {title}", "", *work()]
        torch.cuda.empty_cache()
    print("\n".join(sections))
    if arguments.out:
        path = Path(arguments.out)
        kept = path.read_text().partition("\n## What limits it")[2] if path.exists() else ""
        path.write_text("\n".join(sections) + "\n" + (f"\n## What limits it{kept}" if kept else ""))


if __name__ == "__main__":
    main()
