"""Is the advisor right? Its first choice beside an exhaustive run, and predicted latencies beside measured ones.

    OMP_NUM_THREADS=1 python benchmarks/advisor.py

Choice: `demo` under three budgets, at most four recipes of the nine measured for each. What the first budget measured, later ones
know, as a user's would. Then all nine are measured, and each choice is compared with the best of all by the advisor's own
measure: loss where only size is limited, else size times latency. The ratio is choice over best: 1 is the best.

Latency: a new token of five LLaMAs (demo, and random weights in four sizes), each rounded to 8, 4, 3 and 2 bits: 20 pairs.
The fastest of 21 turns counts, as other work on the machine only adds to them. Predicted from the original's latency and the
kernels' speed on this machine, with nothing of the pair measured.
Spearman's rank correlation over all pairs; and over the ratios to each original, in which the sizes of models play no part.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from common import machine, write_table
from transformers import LlamaConfig, LlamaForCausalLM

import tersor
from tersor.advise import Budget, advise
from tersor.advise.advisor import layers_of
from tersor.advise.budget import shown
from tersor.advise.plans import objective
from tersor.advise.predict import latency_formula
from tersor.advise.size import packed_maps, size_on_disk, skeleton
from tersor.advise.workloads import Workload, run
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.evaluate.machine import examine
from tersor.methods.weights.rtn import RTN

BEST = "desc_act=yes static_groups=yes mse=yes"
ONLY = [
    "rtn bits=8",
    "rtn bits=4 mse=yes",
    "rtn bits=4 group_size=32 mse=yes",
    f"gptq bits=4 {BEST}",
    f"gptq bits=4 group_size=32 {BEST}",
    f"gptq bits=3 {BEST}",
    f"gptq bits=3 group_size=32 {BEST}",
    f"gptq bits=2 {BEST}",
    "drop-blocks blocks=0.1",
]
BUDGETS = {
    "at most 12 MB on disk": Budget(disk=12e6),
    "at most 5 % loss": Budget(loss=0.05),
    "at most 30 % loss, 11 MB": Budget(loss=0.3, disk=11e6),
}
SIZES = {"llama-256": (256, 4), "llama-512": (512, 4), "llama-768": (768, 6), "llama-1024": (1024, 6)}
BITS = (8, 4, 3, 2)


def choices(evidence: Path) -> list[str]:
    how = {
        "samples": 16,
        "seq_len": 256,
        "max_eval_samples": 12,
        "turns": 15,
        "evidence": evidence,
        "only": ONLY,
        "seconds": 3600.0,
    }
    tell = lambda what, done, total: print(what, flush=True)  # noqa: E731
    first = {name: advise("demo", budget, most=4, progress=tell, **how) for name, budget in BUDGETS.items()}
    lines = [
        "| budget | first choice | its size | loss | best of nine | choice / best |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    # A budget that all keep, by which nothing is left out as hopeless.
    every = advise("demo", Budget(loss=1e9, disk=1e9), most=99, progress=tell, **how)
    all_plans = {plan.name: plan for plan in every.plans if plan.measured}
    missing = set(ONLY) - set(all_plans)
    for name in missing:  # those that could not have been best were not measured
        one = advise("demo", Budget(loss=1e9), most=1, progress=tell, **{**how, "only": [name]})
        all_plans |= {plan.name: plan for plan in one.plans if plan.measured}
    assert set(ONLY) <= set(all_plans), set(ONLY) - set(all_plans)
    for name, advice in first.items():
        budget = BUDGETS[name]
        bounded = budget.loss is not None
        chosen = advice.chosen
        assert chosen is not None
        best = min(
            (plan for plan in all_plans.values() if budget.allows(plan)),
            key=lambda p: objective(p, bounded_loss=bounded),
        )
        values = [objective(all_plans[plan.name], bounded_loss=bounded) for plan in (chosen, best)]
        ratio = values[0] / values[1] if values[1] > 0 else float(values[0] == values[1])
        assert chosen.disk is not None
        assert chosen.loss is not None
        lines.append(
            f"| {name} | {chosen.name} | {shown('disk', chosen.disk.value)} | {shown('loss', chosen.loss.value)} "
            f"| {best.name} | {ratio:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def latencies(scratch: Path) -> list[str]:
    demo = resolve("demo")
    folders = {"demo": str(demo)}
    for name, (width, depth) in SIZES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=8192,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(scratch / name)
        for each in demo.glob("tokenizer*"):
            shutil.copy(each, scratch / name)
        folders[name] = str(scratch / name)
    probe = examine()
    lines = [
        "| model | bits | predicted ms | measured ms | size formula / bytes on disk |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    work = Workload("text", (), 2, 64, 21, "cpu")
    predicted, measured, ratios = [], [], []
    for name, folder in folders.items():
        checkpoint = open_checkpoint(folder)
        lazy = skeleton(checkpoint)
        base = min(run(folder, work).seconds)
        for bits in BITS:
            method = RTN(bits=bits, group_size=128)
            out = scratch / f"{name}-{bits}"
            tersor.compress(folder, method, out=out)
            packed = packed_maps(lazy, [method])
            predicted.append(latency_formula(base, layers_of(lazy, packed, "text"), packed, probe, rows=1))
            measured.append(min(run(out, work).seconds))
            ratios.append((predicted[-1] / base, measured[-1] / base))
            size = size_on_disk(checkpoint, lazy, [method])
            assert size is not None
            share = size / open_checkpoint(out).size()
            lines.append(f"| {name} | {bits} | {1e3 * predicted[-1]:.3f} | {1e3 * measured[-1]:.3f} | {share:.4f} |")
            print(lines[-1], flush=True)
    over_all = spearman(predicted, measured)
    over_ratios = spearman([a for a, _ in ratios], [b for _, b in ratios])
    found = (
        f"Spearman over {len(predicted)} pairs: {over_all:.3f}; over the ratios to the originals: {over_ratios:.3f}."
    )
    print(found, flush=True)
    return [*lines, "", found]


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks; no two values are equal."""
    ranks = [[sorted(values).index(each) for each in values] for values in (one, other)]
    return statistics.correlation(*ranks)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        timed = latencies(Path(scratch))
        chosen = choices(Path(scratch) / "evidence.jsonl")
        kept = [json.loads(line) for line in (Path(scratch) / "evidence.jsonl").read_text().splitlines()]
    described = (__doc__ or "").strip()
    text = ["# The advisor", "", described[described.index("Choice:") :], "", *chosen, "", *timed, ""]
    text += [
        f"{len(kept)} runs were measured for the choices.",
        "",
        machine(),
        "`OMP_NUM_THREADS=1 python benchmarks/advisor.py`",
        "",
    ]
    write_table("advisor", "\n".join(text))


if __name__ == "__main__":
    main()
