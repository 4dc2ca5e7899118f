"""What more processes save in one quantization job, and whether the result stays the same, on one machine's CPU.

    python benchmarks/several_processes.py           # prints the table and writes benchmarks/results/several_processes.md

Method: GPTQ (4 bits, groups of 128) of a random model of two blocks (4 maps of 1024 x 1024, one of 4096 x 1024, one of
1024 x 4096 each) in memory, 32 samples of 256 tokens; torchrun on gloo, 2 threads a process; seconds of `tersor.compress` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from common import processor, versions, write_table
from torch import Tensor, nn

WIDTH, THREADS = 1024, 2


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


def job() -> None:
    """In each process: compress, and print seconds and a hash of the result."""
    from tersor.compress import GPTQ, compress

    torch.manual_seed(0)
    model = nn.Sequential(Mixer(), Mixer())
    samples = [torch.randn(1, 256, WIDTH) for _ in range(32)]
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    found = compress(model, GPTQ(), calibration=samples)
    digest = hashlib.sha256()
    for name, tensor in sorted(found.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps([found.summary.seconds, digest.hexdigest()]))


def measure(processes: int) -> tuple[float, str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, *launch, __file__, "job"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, digest = json.loads(done.stdout)
    return seconds, digest


def main() -> None:
    lines = ["| processes | seconds | speed-up | same result |", "| ---: | ---: | ---: | --- |"]
    alone, same = measure(1)
    lines.append(f"| 1 | {alone:.1f} | 1.0 | |")
    for processes in (2, 4):
        seconds, digest = measure(processes)
        lines.append(f"| {processes} | {seconds:.1f} | {alone / seconds:.2f} | {'yes' if digest == same else 'no'} |")
    where = f"{processor()}, {os.cpu_count()} cores; {versions()}"
    text = f"{(__doc__ or '').strip()}\n\nMachine: {where}.\n\n" + "\n".join(lines) + "\n"
    print(text)
    write_table("several_processes", "# Several processes\n\n" + text)


if __name__ == "__main__":
    job() if sys.argv[1:] == ["job"] else main()
