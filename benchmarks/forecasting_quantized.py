"""What GPTQ costs each registered forecaster: test MSE before, and after at 8, 4 and 3 bits.

    TERSOR_DATA=../shared/data python benchmarks/forecasting_quantized.py
    TERSOR_DATA=../shared/data python benchmarks/forecasting_quantized.py tempo gpht

ETTh1 in the protocol of tersor.data.series, horizon 96, all variates. Look-back 96; GPHT and TEMPO look back 336 and have a
table of their own. Each model is trained here for a few hundred steps only, and all but iTransformer and S-Mamba at a reduced
size (in the table): the MSE before quantization is no result of the architecture, the change of it is what is measured.
Weights of so short a training lie near where they began, and a longer one may lose more.

Scored on every 16th test window (175 of them), before and after on the same ones; Informer draws its keys by one seed. GPTQ
of all linear maps of the repeated blocks, one scale for each row (group_size=-1), true-sequential, on 64 windows of the
training part. RTN: the same grid, rounded to nearest. Embeddings, heads and convolutions stay as they are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import DATA, hardware, kept_numbers, versions, write_numbers, write_table
from forecasting import RECIPE
from torch.utils.data import Subset, default_collate

import tersor
from tersor.data.series import SeriesConfig, load_series
from tersor.train.objectives import forecasting
from tersor.train.trainer import train, validate

BITS = (8, 4, 3)
STRIDE, CALIBRATION = 16, 64
FORECASTERS: dict[str, tuple[str, int, dict[str, Any]]] = {  # system -> variant, steps, what differs from it
    "itransformer": ("itransformer_etth1", 264, {}),
    "s_mamba": ("s_mamba_etth1", 264, {}),
    "autoformer": ("autoformer", 120, {"d_model": 128, "d_ff": 256}),
    "informer": ("informer_etth1", 120, {"out_len": 96, "d_model": 128, "d_ff": 256}),
    "gpht": (
        "gpht",
        150,
        {"GT_d_model": 128, "GT_d_ff": 256, "GT_e_layers": 1, "n_heads": 4, "pred_len": 96, "dropout": 0.0},
    ),
    "tempo": ("tempo_80m", 100, {"d_model": 128, "n_head": 4, "gpt_layers": 2}),
}
RATES = {"itransformer": 1e-4, "s_mamba": 1e-4}  # of the published recipes; the few steps of the others get more
RATE, BATCH = 5e-4, {"tempo": 8}


def measure(name: str, data: Path) -> dict[str, Any]:
    variant, steps, differs = FORECASTERS[name]
    torch.manual_seed(RECIPE.seed)
    model = tersor.models.create(variant, **differs)
    config: Any = model.config
    lengths = {"seq_len": config.seq_len, "pred_len": config.pred_len, "label_len": getattr(config, "label_len", 0)}
    parts = load_series(data / "ett" / "ETTh1.csv.gz", SeriesConfig(**lengths))
    test = Subset(parts.test, range(0, len(parts.test), STRIDE))
    started = time.perf_counter()
    recipe = replace(
        RECIPE,
        max_steps=steps,
        batch_size=BATCH.get(name, 32),
        lr=RATES.get(name, RATE),
        lr_schedule="cosine",
        patience=0,
    )
    with tempfile.TemporaryDirectory() as out:
        train(model, parts.train, objective=forecasting, out=out, config=recipe)
    model.eval()
    trained = time.perf_counter() - started
    windows = [parts.train[int(n)] for n in torch.linspace(0, len(parts.train) - 1, CALIBRATION)]
    batches = [default_collate(windows[n : n + 16]) for n in range(0, CALIBRATION, 16)]
    for batch in batches:
        batch.pop("target")
    found: dict[str, Any] = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "size": ", ".join(f"{key} {value}" for key, value in differs.items() if key not in ("pred_len", "out_len")),
        "look-back": config.seq_len,
        "steps": steps,
        "before": _score(model, test),
    }
    for method in (tersor.GPTQ, tersor.RTN):
        for bits in BITS:
            result = tersor.compress(model, method(bits=bits, group_size=-1), calibration=batches, format=None)
            assert result.model is not None
            found[f"{method.name} {bits}"] = _score(result.model, test)
            found["layers"] = len(result.summary.layers)
    found["seconds"] = {"training": trained, "all": time.perf_counter() - started}
    return found | {"machine": hardware(), "versions": versions()}


def _score(model: torch.nn.Module, test: Any) -> float:
    torch.manual_seed(0)  # Informer draws keys
    return validate(model, test, forecasting, batch_size=64)["loss"]


def table(results: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# Forecasters by GPTQ: ETTh1, horizon 96", "", described[described.index("ETTh1 in") :], ""]
    for look_back in sorted({found["look-back"] for found in results.values()}):
        rows = {name: found for name, found in results.items() if found["look-back"] == look_back}
        methods = [f"{method} {bits}" for bits in BITS for method in ("gptq", "rtn")]
        heads = [f"{each.partition(' ')[0].upper()} {each.partition(' ')[2]} bits" for each in methods]
        lines += [f"## Look-back {look_back}", "", f"| model | size | steps | MSE before | {' | '.join(heads)} |"]
        lines += ["| --- | --- | ---: | ---: | " + " | ".join(["---:"] * len(heads)) + " |"]
        for name, found in rows.items():
            size = f"{found['parameters']:,} parameters" + (f" ({found['size']})" if found["size"] else " (published)")
            cells = [f"{found[each]:.4f} ({found[each] / found['before'] - 1:+.1%})" for each in methods]
            lines.append(f"| {name} | {size} | {found['steps']} | {found['before']:.4f} | {' | '.join(cells)} |")
        lines.append("")
    seconds = sum(found["seconds"]["all"] for found in results.values())
    last = list(results.values())[-1]
    lines += [f"{seconds / 60:.0f} minutes in all on {last['machine']}, shared with others; {last['versions']}."]
    lines += ["`python benchmarks/forecasting_quantized.py`", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FORECASTERS), help=", ".join(FORECASTERS))
    for name in parser.parse_args().names:
        measured = measure(name, DATA)
        print(name, measured, flush=True)
        results = kept_numbers("forecasting_quantized")
        results[name] = measured
        results = {each: results[each] for each in FORECASTERS if each in results}
        write_numbers("forecasting_quantized", results)
        write_table("forecasting_quantized", table(results))


if __name__ == "__main__":
    main()
