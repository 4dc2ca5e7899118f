"""H3's FlashConv beside torch.fft and attention: forward and backward over 1k to 64k positions, and the memory they take.

    python benchmarks/flash_conv.py            prints the tables for this machine's GPU
    python benchmarks/flash_conv.py --write    and keeps them in benchmarks/results/flash_conv.md

Every row has 65,536 positions in all, 768 channels, bfloat16. FlashConv and torch.fft compute q ssm(v shift(k)) of an H3 layer,
its kernels included: two convolutions and two gates, without the linear layers. Attention is causal, PyTorch's own, 12 heads of
64, of the same q, k and v. The convolution alone has taps that are given. In every turn the competitors run one after the other;
medians of the turns. Memory is the peak of a forward and backward pass above what its inputs take.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from common import gpu, gpu_seconds, write_table
from torch import Tensor
from torch.nn import functional as F

from tersor.kernels.fft_conv import LONGEST, SHORTEST, causal_taps, faster_on_chip, fft_conv, reference
from tersor.layers.long_convolution import long_convolution
from tersor.models.text.h3 import H3Layer, H3LayerConfig

POSITIONS, CHANNELS, HEADS = 65536, 768, 12
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
Call = Callable[[], Tensor]


def by_torch_fft(layer: H3Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As H3Layer.flash, with torch's transforms of the whole length."""
    length = k.shape[-1]
    shifted = long_convolution(k, layer.ssm_k_kernel(length)) + (layer.ssm_k_D[:, None] * k).to(k.dtype)
    kv = shifted * v
    return q * (long_convolution(kv, layer.kernel(length)) + (layer.D[:, None] * kv).to(k.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # (B, heads, L, 64); of strided views PyTorch takes a form with n^2 memory
    q, k, v = (each.unflatten(1, (HEADS, -1)).transpose(2, 3).contiguous() for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def measured(calls: dict[str, Call], leaves: Sequence[Tensor], turns: int) -> dict[str, tuple[float, float] | str]:
    """Milliseconds and MiB of forward and backward; the reason where one fails."""

    def both(call: Call) -> None:
        torch.autograd.grad(call().float().square().mean(), leaves, allow_unused=True)

    found: dict[str, tuple[float, float] | str] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            both(call)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both(call)
            found[name] = (0.0, (torch.cuda.max_memory_allocated() - before) / 2**20)
        except Exception as error:  # a kernel that does not fit, or memory that does not suffice: the other rows stand
            found[name] = str(error).strip().splitlines()[0][:80]
    for _ in range(turns):
        for name, call in calls.items():
            if not isinstance(found[name], str):
                times[name].append(gpu_seconds(lambda call=call: both(call)))
    for name, each in times.items():
        if each:
            found[name] = (statistics.median(each) * 1e3, found[name][1])  # type: ignore[assignment]
    return found


def cells(found: dict[str, tuple[float, float] | str], ours: str) -> str:
    parts = [each if isinstance(each, str) else f"{each[0]:.2f}" for each in found.values()]
    mine = found[ours]
    for name, each in found.items():
        if name != ours:
            known = not isinstance(each, str) and not isinstance(mine, str)
            parts.append(f"{each[0] / mine[0]:.2f}" if known else "")  # type: ignore[operator]
    parts += ["" if isinstance(each, str) else f"{each[1]:,.0f}" for each in found.values()]
    return " | ".join(parts)


def layers(lengths: Sequence[int], turns: int) -> list[str]:
    lines = ["| length | batch | ms: FlashConv | torch.fft | attention | times torch.fft | times attention |"]
    lines[0] += " MiB: FlashConv | torch.fft | attention |"
    lines += ["| ---: " * 10 + "|"]
    for length in lengths:
        torch.manual_seed(0)
        batch = POSITIONS // length
        layer = H3Layer(CHANNELS, H3LayerConfig()).cuda()
        shape = (batch, CHANNELS, length)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        calls: dict[str, Call] = {
            "FlashConv": lambda layer=layer, q=q, k=k, v=v: layer.flash(q, k, v),
            "torch.fft": lambda layer=layer, q=q, k=k, v=v: by_torch_fft(layer, q, k, v),
            "attention": lambda q=q, k=k, v=v: attention(q, k, v),
        }
        kinds = ("ssm_k_kernel.kernel.C", "kernel.kernel.C", "D", "ssm_k_D")
        weights = [layer.get_parameter(name) for name in kinds]
        lines.append(f"| {length:,} | {batch} | {cells(measured(calls, [q, k, v, *weights], turns), 'FlashConv')} |")
        print(lines[-1], flush=True)
        with torch.no_grad():
            whole = by_torch_fft(layer.double(), q.double(), k.double(), v.double()) if length <= 2 * LONGEST else None
            layer.float()
            if whole is not None:
                off = (layer.flash(q, k, v).double() - whole).norm() / whole.norm()
                print(f"  error of FlashConv against float64, relative: {float(off):.1e}", flush=True)
    return lines


def alone(lengths: Sequence[int], turns: int) -> list[str]:
    lines = ["| length | batch | ms: fft_conv | torch.fft | times | MiB: fft_conv | torch.fft |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for length in lengths:
        batch = POSITIONS // length
        u, a, z = (
            torch.randn(batch, CHANNELS, length, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        taps = causal_taps(torch.randn(CHANNELS, length, device="cuda") / length**0.5).requires_grad_()
        calls: dict[str, Call] = {
            "fft_conv": lambda u=u, a=a, z=z, taps=taps: fft_conv(u, taps, gate_in=a, gate_out=z),
            "torch.fft": lambda u=u, a=a, z=z, taps=taps: reference(u, taps, gate_in=a, gate_out=z),
        }
        found = cells(measured(calls, [u, a, z, taps], turns), "fft_conv")
        lines.append(f"| {length:,} | {batch} | {found} |")
        print(lines[-1], flush=True)
    return lines


def chosen() -> str:
    """Where h3 takes FlashConv on this GPU, by its own measurement."""
    device, said = torch.device("cuda"), []
    for backward in (True, False):
        lengths = [n for n in (SHORTEST, 1024, LONGEST) if faster_on_chip(n, torch.bfloat16, device, backward=backward)]
        said.append(f"{'in training' if backward else 'without gradients'} at {lengths or 'none'}")
    return f"Of {SHORTEST}, 1024 and {LONGEST} positions, h3 takes FlashConv here {', '.join(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    about = (__doc__ or "").split("\n\n")[2].strip()
    text = "\n".join(
        [
            "# H3's FlashConv, forward and backward",
            "",
            about,
            "",
            *layers(LENGTHS, arguments.turns),
            "",
            "One gated convolution, taps given:",
            "",
            *alone([length for length in LENGTHS if length <= LONGEST], arguments.turns),
            "",
            chosen(),
            "",
            gpu(),
            "`python benchmarks/flash_conv.py --write`",
        ]
    )
    print(text)
    if arguments.write:
        write_table("flash_conv", text)


if __name__ == "__main__":
    main()
