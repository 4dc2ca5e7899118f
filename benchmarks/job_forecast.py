"""What a job says beforehand of its time and memory, beside what it took.

    OMP_NUM_THREADS=2 python benchmarks/job_forecast.py --write    about five minutes on two cores; one process a job
    ... --only opt                                                 the jobs whose names hold a word

Models: `demo`, `demo-vit`, and small ones with random weights: a wide LLaMA, an OPT, a Mamba. Time is counted from the line with
the forecast to the end; memory is the most that the process had resident, as the job itself reports it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import DATA, machine, write_table

import tersor
import tersor.checkpoint.source
import tersor.devices
from tersor.compress import from_options

ADVISED = {"desc_act": True, "static_groups": True, "weighted": True}
SAID = re.compile(r"forecast: ([\d.]+) (s|min), ([\d.]+) GB of memory, ([\d.]+) GB of disk")


@dataclass(frozen=True)
class Asked:
    model: str
    method: str
    options: dict[str, Any]
    samples: int = 0
    seq_len: int = 0

    @property
    def name(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.model}: {self.method} {options}".strip()


@dataclass(frozen=True)
class Outcome:
    seconds_said: float
    seconds: float
    memory_said: float  # GB
    memory: float
    before: float  # GB that the process had resident at most before the forecast


JOBS = (
    Asked("demo", "gptq", {}, 8, 256),
    Asked("demo", "gptq", {"bits": 3, **ADVISED}, 8, 256),
    Asked("demo", "gptq", {"bits": 2, "mse": True}, 8, 1024),
    Asked("demo", "gptq", {}, 32, 512),
    Asked("demo", "gptq", {"asymmetric": 0.5}, 8, 256),
    Asked("demo", "rtn", {}),
    Asked("demo", "rtn", {"bits": 3, "mse": True}),
    Asked("demo", "sparsegpt", {"pattern": "2:4"}, 8, 256),
    Asked("wide llama", "gptq", {}, 8, 256),
    Asked("opt", "gptq", {}, 16, 256),
    Asked("mamba", "gptq", {}, 8, 128),
    Asked("demo-vit", "gptq", {"group_size": 64}, 64),
)


def built(kind: str, folder: Path) -> str:
    """A small model with random weights and `demo`'s tokenizer."""
    import transformers

    torch.manual_seed(0)
    config: Any
    if kind == "wide llama":
        config = transformers.LlamaConfig(
            vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8
        )
    elif kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=8192, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=512,
        )  # fmt: skip
    else:
        config = transformers.MambaConfig(vocab_size=8192, hidden_size=256, num_hidden_layers=6)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    transformers.AutoTokenizer.from_pretrained(tersor.checkpoint.source.resolve("demo")).save_pretrained(folder / kind)
    return str(folder / kind)


def measure(asked: Asked) -> Outcome:
    began: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if total == 0 and (found := SAID.match(what)):
            began.update(at=time.perf_counter(), said=found, before=tersor.devices.peak_memory(torch.device("cpu")))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model if asked.model.startswith("demo") else built(asked.model, folder)
        job: dict[str, Any] = {}
        if asked.samples:
            job["samples"] = asked.samples
            if asked.model == "demo-vit":
                job["calibration"] = str(DATA / "images" / "cifar10_train_512.npz")
            else:
                job["seq_len"] = asked.seq_len
        method = from_options(asked.method, asked.options)
        result = tersor.compress(model, method, out=folder / "out", progress=progress, device="cpu", **job)
        seconds = time.perf_counter() - began["at"]
    said = began["said"]
    return Outcome(
        float(said[1]) * (60 if said[2] == "min" else 1),
        seconds,
        float(said[3]),
        result.summary.peak_memory / 1e9,
        began["before"] / 1e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="jobs whose names hold this")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/")
    arguments = parser.parse_args()
    lines = [
        "| job | samples | said, s | took, s | took / said | said, GB | peak, GB | peak / said |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for asked in JOBS:
        if arguments.only not in asked.name:
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(measure, asked).result()
        samples = (
            "" if not asked.samples else f"{asked.samples} x {asked.seq_len}" if asked.seq_len else f"{asked.samples}"
        )
        lines.append(
            f"| {asked.name} | {samples} | {found.seconds_said:.0f} | {found.seconds:.1f} | "
            f"{found.seconds / found.seconds_said:.2f} | {found.memory_said:.1f} | {found.memory:.2f} | "
            f"{found.memory / found.memory_said:.2f} |"
        )
        print(lines[-1], f"(before {found.before:.2f} GB)", flush=True)
    about = (__doc__ or "").split("\n\n")[-1].strip()
    text = "\n\n".join(
        [
            f"# {(__doc__ or '').split(chr(10))[0]}",
            about,
            "\n".join(lines),
            f"Command: `python benchmarks/job_forecast.py --write`. {machine()}.",
        ]
    )
    print(text)
    if arguments.write:
        write_table("job_forecast", text)


if __name__ == "__main__":
    main()
