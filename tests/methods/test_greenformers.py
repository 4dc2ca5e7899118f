"""Greenformers: the published rules, the optimum of each solver, budgets, ties, and results that are saved and quantized."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tersor
from tersor.layers.ced import CED
from tersor.layers.led import LED
from tersor.methods.structure.factorize import factorize, nmf, rank_of, snmf, svd
from tersor.methods.structure.greenformers import Greenformers, rank_by_energy, ranks_by_budget, spectrum


class Net(nn.Module):
    """A convolution, linear maps of both kinds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "conv": nn.Conv2d(8, 24, 3, padding=1, stride=2),
                "grouped": nn.Conv2d(24, 24, 3, groups=4),
                "conv1": nn.Conv1d(24, 32, 3, padding=1),
                "wide": nn.Linear(32, 96),
                "transposed": Conv1D(40, 96),
            }
        )
        self.head = nn.Linear(40, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["grouped"](self.body["conv"](x).relu()).relu()
        x = self.body["conv1"](x.flatten(2)).transpose(1, 2)
        y: Tensor = self.head(self.body["transposed"](self.body["wide"](x).relu()).mean(1))
        return y


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 12, 12, generator=generator) for _ in range(count)]


def quietly(*args: Any, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factorize(*args, **kwargs)


def layers_of(model: nn.Module) -> dict[str, str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D, LED, CED)
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, kinds) and "_unit" not in n}


# the published function


def test_direct_children_stay_unless_they_are_listed_or_wrapped() -> None:
    assert layers_of(quietly(net(), 0.5))["head"] == "Linear"
    assert layers_of(quietly(nn.ModuleDict({"net": net()}), 0.5))["net.head"] == "LED"
    model = net()
    listed = layers_of(quietly(model, 0.5, submodules=[model.head, model.body["wide"]]))
    assert {name for name, kind in listed.items() if kind == "LED"} == {"head", "body.wide"}
    assert isinstance(factorize(nn.Linear(20, 20), 3), LED)


def test_it_works_in_place_unless_told_to_copy() -> None:
    model = net()
    assert quietly(model, 0.5) is model
    model = net()
    copy = quietly(model, 0.5, submodules=[model.body], deepcopy=True)
    assert layers_of(model) == layers_of(net())
    assert layers_of(copy)["body.wide"] == "LED"


def test_units_are_factorized_again_only_on_request() -> None:
    model = quietly(nn.ModuleDict({"net": net()}), 16)
    quietly(model, 4)
    assert isinstance(model.get_submodule("net.body.wide.led_unit.0"), nn.Linear)
    again = quietly(model, 4, fact_led_unit=True)
    assert isinstance(again.get_submodule("net.body.wide.led_unit.0"), LED)


@pytest.mark.parametrize(
    ("layer", "rank", "found"),
    [
        (nn.Linear(48, 64), 0.5, 13),  # limit 27
        (nn.Linear(48, 64), 26, 26),
        (nn.Linear(48, 64), 27, 0),
        (nn.Linear(48, 64), 2.9, 2),
        (nn.Linear(2, 2), 0.5, 0),  # limit 1
        (Conv1D(64, 48), 0.5, 13),
        (nn.Conv2d(48, 64, 3), 0.5, 13),  # whatever the kernel
        (nn.Conv1d(48, 64, 3, groups=4), 0.5, 8),  # limit 12: 6, rounded up
        (nn.Conv1d(48, 64, 3, groups=4), 11, 0),  # 12 after rounding, which is the limit
    ],
)
def test_rank_rule(layer: nn.Module, rank: float, found: int) -> None:
    assert rank_of(layer, rank) == found


def test_a_grouped_convolution_keeps_its_form() -> None:
    conv = nn.Conv2d(48, 64, 3, stride=2, padding=1, groups=4)
    lower = factorize(conv, 0.5, solver="random")
    assert {n: tuple(p.shape) for n, p in lower.named_parameters()} == {
        "ced_unit.0.weight": (8, 12, 3, 3),
        "ced_unit.1.weight": (64, 8, 1, 1),
        "ced_unit.1.bias": (64,),
    }
    x = torch.randn(1, 48, 9, 9)
    assert lower(x).shape == conv(x).shape
    dense = nn.functional.conv2d(x, lower.weight, lower.bias, stride=2, padding=1)  # type: ignore[arg-type]
    torch.testing.assert_close(lower(x), dense)


def test_random_keeps_nothing_of_the_old_layer() -> None:
    layer = nn.Linear(20, 20)
    nn.init.constant_(layer.bias, 7.0)
    assert isinstance(lower := factorize(layer, 3, solver="random"), LED)
    assert lower.bias is not None
    assert float(lower.bias.detach().abs().max()) < 1
    assert factorize(layer, 3).bias is layer.bias


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"rank": -1.0}, {"rank": float("inf")}, {"solver": "qr"}, {"num_iter": 0}]
)
def test_bad_arguments_of_the_function(bad: dict[str, Any]) -> None:
    with pytest.raises(tersor.TersorError, match=str(next(iter(bad)))):
        factorize(net(), **{"rank": 0.5, **bad})
    with pytest.raises(tersor.TersorError, match="no part of the model"):
        factorize(net(), 0.5, submodules=[nn.Linear(2, 2)])


def test_nmf_refuses_negative_weights() -> None:
    with pytest.raises(tersor.TersorError, match=r"body\.conv has negative weights"):
        quietly(net(), 0.5, solver="nmf")


@pytest.mark.slow  # builds BERT-base and GPT-2, without weights
@pytest.mark.parametrize(
    ("kind", "rank", "parameters"),
    [("bert", 100, 40_700_160), ("bert", 0.5, 66_701_568), ("bert", 0.25, 45_283_584), ("gpt2", 100, 54_250_752)],
)
def test_published_sizes(kind: str, rank: float, parameters: int) -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = BertModel(BertConfig()) if kind == "bert" else GPT2LMHeadModel(GPT2Config())
        assert sum(p.numel() for p in model.parameters()) == {"bert": 109_482_240, "gpt2": 124_439_808}[kind]
        quietly(model, rank, solver="random")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, LED) for m in model.modules()) == {"bert": 73, "gpt2": 48}[kind]


# solvers


@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 99))
def test_svd_loses_what_the_discarded_singular_values_hold(rows: int, columns: int, seed: int) -> None:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for rank in range(1, min(rows, columns) + 1):
        found = svd(W, rank)
        assert found.encoder.shape == (rank, columns)
        error = (W - found.decoder @ found.encoder).square().sum()
        torch.testing.assert_close(error, torch.linalg.svdvals(W)[rank:].square().sum(), rtol=1e-7, atol=1e-9)


@given(st.integers(3, 24), st.integers(3, 24), st.integers(1, 40), st.integers(0, 99))
def test_whitened_is_never_worse_on_its_samples(rows: int, columns: int, tokens: int, seed: int) -> None:
    """... and is the optimum: no D E of this rank comes nearer to W X than the singular values allow."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    X *= torch.logspace(0, 2, columns, dtype=torch.float64)[:, None]
    for rank in range(1, min(rows, columns)):
        white, plain = svd(W, rank, X @ X.t()), svd(W, rank)
        errors = [((W - each.decoder @ each.encoder) @ X).square().sum() for each in (white, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-6
        torch.testing.assert_close(errors[0], torch.linalg.svdvals(W @ X)[rank:].square().sum(), rtol=1e-6, atol=1e-4)


def test_semi_nmf_never_gets_worse_and_stays_non_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    F, H = torch.rand(30, 5, generator=generator).double(), torch.rand(5, 20, generator=generator).double()
    _, H_signed, errors = snmf(M, F, H, 50)
    assert float(H_signed.min()) >= 0
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    exact = F @ H
    W, H_nmf, errors = nmf(exact, torch.rand(30, 5, generator=generator).double(), H, 3000)
    assert float(W.min()) >= 0
    assert float(H_nmf.min()) >= 0
    assert errors[-1] < 0.01 * float(exact.norm())


def test_a_rank_that_loses_nothing_changes_nothing() -> None:
    for layer, x in ((nn.Linear(64, 40), torch.randn(3, 5, 64)), (nn.Conv1d(32, 48, 3), torch.randn(2, 32, 9))):
        with torch.no_grad():
            layer.weight.copy_(
                (torch.randn(len(layer.weight), 4) @ torch.randn(4, layer.weight[0].numel())).view_as(layer.weight)
            )
            torch.testing.assert_close(factorize(layer, 4)(x), layer(x), rtol=1e-4, atol=1e-4)


# the choice of ranks


def test_energy_takes_the_smallest_rank_that_is_enough() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert [rank_by_energy(shares, (100, 100), e) for e in (0.4, 0.5, 0.6, 0.9)] == [1, 1, 2, 3]
    assert rank_by_energy(shares, (4, 4), 0.9) == 0  # rank 2 saves nothing


SHAPES = {"a": (9, 12), "b": (16, 8), "c": (10, 10)}


def saves(name: str, rank: int) -> int:
    return rank and SHAPES[name][0] * SHAPES[name][1] - rank * sum(SHAPES[name])


@given(st.integers(0, 999), st.floats(1e-4, 1e-2), st.integers(1, 190))
def test_a_budget_is_met_and_the_least_energy_is_lost(seed: int, price: float, to_save: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = {name: spectrum(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    possible = {name: [r for r in range(6) if r == 0 or saves(name, r) > 0] for name in SHAPES}

    def loses(name: str, rank: int) -> float:
        return float(spectra[name][rank:].sum()) if rank else 0.0

    # What pays at a price, layer by layer, saves an amount; asked for that amount, the greedy choice is as good.
    paying = {n: min(ranks, key=lambda r, n=n: loses(n, r) - price * saves(n, r)) for n, ranks in possible.items()}
    amount = sum(saves(n, r) for n, r in paying.items())
    assert ranks_by_budget(spectra, SHAPES, amount) == (paying, amount)
    # And that is the best of all choices of ranks.
    choices = [dict(zip(SHAPES, ranks, strict=True)) for ranks in itertools.product(*possible.values())]
    enough = [c for c in choices if sum(saves(n, r) for n, r in c.items()) >= amount]
    best = min(sum(loses(n, r) for n, r in choice.items()) for choice in enough)
    assert sum(loses(n, r) for n, r in paying.items()) <= best + 1e-6

    ranks, saved = ranks_by_budget(spectra, SHAPES, to_save)
    assert saved == sum(saves(name, rank) for name, rank in ranks.items()) >= to_save
    assert all(rank in possible[name] for name, rank in ranks.items())


# the method


def test_ranks_are_rounded_to_a_multiple() -> None:
    rows = {row.name: row.rank for row in compressed(Greenformers(rank=0.9, multiple=8)).summary.layers if row.rank}
    assert rows == {"body.conv": 16, "body.conv1": 16, "body.wide": 16, "body.transposed": 24}  # kernels count


def compressed(method: Greenformers, model: nn.Module | None = None) -> Any:
    return tersor.compress(net() if model is None else model, method, calibration=images())


def test_the_method_takes_what_lies_deeper_and_says_what_it_kept() -> None:
    result = compressed(Greenformers(rank=0.5))
    rows = {row["name"]: row for row in result.summary.as_dict()["layers"]}
    assert layers_of(result.model) == {
        "body.conv": "CED", "body.grouped": "Conv2d", "body.conv1": "CED", "body.wide": "LED", "body.transposed": "LED",
        "head": "Linear",
    }  # fmt: skip
    assert rows["body.grouped"]["note"] == "grouped convolution"
    assert rows["head"]["note"].startswith("direct child")
    assert rows["body.wide"]["rank"] == 12
    assert rows["body.wide"]["parameters"] == 12 * (32 + 96)
    assert isinstance(compressed(Greenformers(rank=0.5, head=True)).model.head, LED)
    assert result.summary.parameters_after == sum(p.numel() for p in result.model.parameters())


def test_energy_is_kept_and_the_budget_is_met() -> None:
    rows = compressed(Greenformers(energy=0.6)).summary.layers
    assert all(row.lost <= 0.4 for row in rows)
    assert any(row.lost > 0.3 for row in rows)
    for budget in (0.9, 0.5, 0.3):
        summary = compressed(Greenformers(budget=budget)).summary
        assert summary.parameters_after <= budget * summary.parameters_before
        assert summary.parameters_after > (budget - 0.02) * summary.parameters_before


def test_whitened_outputs_are_nearer_on_the_samples() -> None:
    """One layer at a time: what it computes for the samples is nearer to the original than with plain SVD."""
    x = torch.cat(images(3)).flatten(2).transpose(1, 2)[:, :, :8] * torch.logspace(0, 2, 8)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 40)))
    errors = []
    for whiten in (True, False):
        result = tersor.compress(model, Greenformers(rank=3, whiten=whiten), calibration=[x])
        with torch.no_grad():
            errors.append(float((result.model(x) - model(x)).norm()))
        (row,) = result.summary.layers
        assert row.note == ""
    assert errors[0] < 0.9 * errors[1]
    notes = {row.name: row.note for row in compressed(Greenformers(rank=3, whiten=True)).summary.layers}
    assert notes["body.conv1"] == "not whitened: Conv1d"
    assert notes["body.conv"] == notes["body.transposed"] == ""


def test_shared_weights_stay_shared() -> None:
    inner = nn.Linear(32, 32)
    model = nn.Sequential(
        nn.Sequential(inner, nn.Linear(32, 32), inner), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    )
    model[1][1].weight = model[1][0].weight
    result = tersor.compress(model, Greenformers(rank=4), calibration=[torch.randn(2, 32)])
    assert layers_of(result.model) == {"0.0": "Linear", "0.1": "LED", "1.0": "Linear", "1.1": "Linear"}
    assert result.model[0][0] is result.model[0][2]
    assert result.model[1][0].weight is result.model[1][1].weight
    kept = {row.name for row in result.summary.layers if row.note == "shares its weight with another module"}
    assert kept == {"0.0", "1.0", "1.1"}
    with pytest.warns(UserWarning, match="shares its weight"):
        factorize(model, 4)


def test_code_that_looks_at_a_weight_instead_of_calling_the_layer_still_works() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    lower = quietly(encoder.eval(), 8, deepcopy=True)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():  # the fused path of eval mode hands weights to a kernel
        fused = lower(x)
    torch.testing.assert_close(lower(x), fused, rtol=1e-4, atol=1e-5)
    assert isinstance(lower.layers[0].linear1, LED)
    assert not isinstance(lower.layers[0].self_attn.out_proj, LED)  # a subclass, used without being called


def test_training_from_scratch_reaches_every_factor() -> None:
    model = quietly(net(), 0.5, solver="random", submodules=None).train()
    model(images()[0]).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0 is not allowed"),
        ({"energy": 1.0}, "energy=1.0 is not allowed"),
        ({"budget": 1.5}, "budget=1.5 is not allowed"),
        ({"rank": 4, "budget": 0.5}, "rank and budget exclude each other"),
        ({"solver": "lu"}, "solver='lu' is not allowed"),
        ({"solver": "snmf", "whiten": True}, "whiten needs the solver svd"),
        ({"solver": "random", "budget": 0.5}, "budget needs the solver svd"),
        ({"multiple": 0}, "multiple=0 is not allowed"),
        ({"num_iter": 0}, "num_iter=0 is not allowed"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(tersor.TersorError, match=said):
        Greenformers(**options)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(
        tersor.TersorError, match=r"budget=0\.01 cannot be met: the lowest ranks in all 4 layers leave 0\."
    ):
        compressed(Greenformers(budget=0.01))
    with pytest.raises(tersor.TersorError, match=r"no layer to factorize in this Sequential \(0: direct child"):
        compressed(Greenformers(), nn.Sequential(nn.Linear(12, 12)))
    with pytest.raises(tersor.TersorError, match="none of the 4 layers would become smaller"):
        compressed(Greenformers(rank=500))


@pytest.mark.parametrize("solver", ["svd", "snmf", "random"])
def test_saved_and_loaded_with_equal_outputs(tmp_path: Path, solver: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    samples = [{"input_ids": torch.randint(0, 96, (1, 32))} for _ in range(4)]
    result = tersor.compress(model, Greenformers(rank=12, solver=solver), calibration=samples)
    assert sum(isinstance(m, LED) for m in result.model.modules()) == 8
    result.save(tmp_path / "saved")
    again = tersor.load(tmp_path / "saved")
    assert "transformer.h.0.attn.c_attn.led_unit.1.bias" in again.state_dict()
    with torch.no_grad():
        assert torch.equal(again(**samples[0]).logits, result.model(**samples[0]).logits)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_model_with_convolutions_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tersor.models.create("shvit", **next(i.small for i in tersor.models.list() if i.system == "shvit")).eval()
    sample = model.example_inputs(2)
    result = tersor.compress(model, Greenformers(budget=0.7), calibration=[sample])
    assert any(isinstance(m, CED) for m in result.model.modules())
    result.save(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(tersor.load(tmp_path / "saved")(**sample), result.model(**sample))


def test_from_the_command_line_and_then_quantized(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Ran]
) -> None:
    lower, packed = tmp_path / "lower", tmp_path / "packed"
    calibrated = ("--samples", 2, "--seq-len", 64)
    ran = tersor_command(
        "compress", small, "--method", "greenformers", "--rank", 0.9, "--whiten", "--multiple", 32, "--out", lower,
        "--json", *calibrated
    )  # fmt: skip
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert told["method"]["rank"] == 0.9
    assert told["method"]["budget"] is None
    lowered = {row["name"] for row in told["layers"] if row["rank"] == 32}
    assert lowered == {f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up", "down")}
    assert told["parameters_after"] < told["parameters_before"]
    ids = {"input_ids": torch.arange(20)[None]}
    with torch.no_grad():
        expected = tersor.load(lower)(**ids).logits

    ran = tersor_command("quantize", lower, "--out", packed, "--bits", 8, "--group-size", 32, *calibrated)
    assert ran.status == 0, ran.err
    quantized = tersor.load(packed)
    parts = quantized.get_submodule("model.layers.0.mlp.up_proj.led_unit")
    assert {type(part).__name__ for part in parts} == {"QuantizedLinear"}
    with torch.no_grad():
        logits = quantized(**ids).logits
    assert 0 < float((logits - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", 0.5, "--energy", 0.9), "energy and budget exclude each other"),
        (("--budget", 0.001), "cannot be met"),
        (("--rank", -3), "rank=-3.0 is not allowed: above 0, below inf"),
    ],
)
def test_bad_options_on_the_command_line_are_one_line(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Ran], arguments: tuple[object, ...], said: str
) -> None:
    ran = tersor_command("compress", small, "--method", "greenformers", "--out", tmp_path / "out", *arguments)
    assert ran.status != 0
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
