"""Pruning: the pattern and the count are exact, what stays makes up for what goes, and a zero stays one on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps, weight_matrix
from tersor.methods.method import from_options
from tersor.methods.weights import magnitude, wanda
from tersor.methods.weights.gptq_solver import factorize, solve_gptq
from tersor.methods.weights.magnitude import Magnitude
from tersor.methods.weights.sparse_solver import solve_sparse
from tersor.methods.weights.sparsegpt import SparseGPT
from tersor.methods.weights.sparsity import PATTERNS, Pruner, zeros_in
from tersor.methods.weights.wanda import Wanda

ROWS, COLUMNS = 6, 48


def problem(seed: int, *, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Weights and the Hessian of correlated inputs of different sizes, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(4 * columns, columns) @ (torch.eye(columns, dtype=torch.float64) + 0.3 * normal(columns, columns))
    x *= torch.exp(normal(columns))
    return normal(rows, columns), 2 * x.t() @ x / len(x)


def solved(W: Tensor, H: Tensor, pruner: Pruner, **how: Any) -> Any:
    return solve_sparse(W, factorize(H), pruner, **how)


def check_pattern(weight: Tensor, pattern: str) -> None:
    kept = PATTERNS[pattern]
    assert kept is not None
    assert bool((weight.reshape(len(weight), -1, kept[1]).count_nonzero(-1) == kept[0]).all())


seeds, blocks = st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 128])


@given(seeds, blocks, st.sampled_from([0.0, 0.1, 0.5, 0.77]))
def test_exactly_the_asked_share_of_a_layer_goes(seed: int, block_size: int, sparsity: float) -> None:
    W, H = problem(seed)
    gone = round(sparsity * W.numel())
    assert int((solved(W, H, Pruner(sparsity), block_size=block_size).weight == 0).sum()) == gone
    assert int((magnitude.prune(W, Pruner(sparsity), None).weight == 0).sum()) == gone
    a_row = (wanda.prune(W, H, Pruner(sparsity), None).weight == 0).sum(1)
    assert a_row.tolist() == [round(sparsity * COLUMNS)] * ROWS


@given(seeds, blocks, st.sampled_from(["2:4", "4:8"]))
def test_a_pattern_holds_in_every_group_of_every_row(seed: int, block_size: int, pattern: str) -> None:
    W, H = problem(seed)
    pruner = Pruner(0.5, pattern)
    check_pattern(solved(W, H, pruner, block_size=block_size).weight, pattern)
    check_pattern(magnitude.prune(W, pruner, None).weight, pattern)
    check_pattern(wanda.prune(W, H, pruner, None).weight, pattern)


@given(seeds, st.sampled_from(list(PATTERNS)))
def test_what_magnitude_and_wanda_keep_is_the_largest_by_their_score_and_untouched(seed: int, pattern: str) -> None:
    W, H = problem(seed)
    for found, scores in (
        (magnitude.prune(W, Pruner(0.5, pattern), None).weight, W.abs()),
        (wanda.prune(W, H, Pruner(0.5, pattern), None).weight, W.abs() * H.diagonal().sqrt()),
    ):
        assert torch.equal(found[found != 0], W[found != 0])
        if pattern == "unstructured" and not torch.equal(scores, W.abs()):
            assert bool(
                (scores.masked_fill(found == 0, torch.inf).amin(1) >= scores.masked_fill(found != 0, 0).amax(1)).all()
            )
        elif pattern == "unstructured":
            assert scores[found != 0].min() >= scores[found == 0].max()
        else:
            size = int(pattern[-1])
            groups, zero = scores.reshape(-1, size), found.reshape(-1, size) == 0
            assert bool((groups.masked_fill(zero, torch.inf).amin(1) >= groups.masked_fill(~zero, 0).amax(1)).all())


@given(seeds, st.sampled_from(list(PATTERNS)), st.sampled_from([16, 128]))
def test_sparsegpt_loses_less_than_removing_the_smallest(seed: int, pattern: str, block_size: int) -> None:
    W, H = problem(seed)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(COLUMNS, dtype=H.dtype)

    def loss(weight: Tensor) -> float:
        D = W - weight
        return float(((D @ damped) * D).sum() / 2)

    found = solved(W, H, Pruner(0.5, pattern), block_size=block_size)
    assert loss(found.weight) <= loss(magnitude.prune(W, Pruner(0.5, pattern), None).weight)
    assert found.error == pytest.approx(loss(found.weight), rel=1e-8)


@given(seeds)
def test_one_removed_weight_is_the_cheapest_and_the_others_move_as_the_optimal_brain_surgeon_says(seed: int) -> None:
    W, H = problem(seed, rows=1, columns=4)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(4, dtype=H.dtype)
    found = solved(W, H, Pruner(0.25)).weight
    losses, candidates = [], []
    for p in range(4):  # weight p goes; those after it are free, those before it had their turn
        inverse = torch.linalg.inv(damped[p:, p:])
        moved = W.clone()
        moved[:, p:] -= W[0, p] / inverse[0, 0] * inverse[0]
        free = torch.arange(p + 1, 4)
        if len(free):  # least squares by the normal equations: H_FF d = -H_Fp · (-w_p)
            by_force = W[0, free] + torch.linalg.solve(damped[free][:, free], damped[free, p] * W[0, p])
            torch.testing.assert_close(moved[0, free], by_force, rtol=1e-7, atol=1e-9)
        moved[:, p] = 0
        d = W - moved
        losses.append(float((d @ damped * d).sum() / 2))
        candidates.append(moved)
    torch.testing.assert_close(found, candidates[losses.index(min(losses))], rtol=1e-8, atol=1e-10)


def test_updates_of_a_whole_row_are_the_best_for_its_last_columns() -> None:
    """With the zeros given, no other values of the columns after the last zero lose less."""
    W, H = problem(3, rows=2, columns=8)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(8, dtype=H.dtype)
    found = solved(W, H, Pruner(0.5, "4:8")).weight
    for row, original in zip(found, W, strict=True):
        last = int((row == 0).nonzero().max())
        free, fixed = torch.arange(last + 1, 8), torch.arange(last + 1)
        if len(free):
            d = (original - row)[fixed]
            best = original[free] + torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ d)
            torch.testing.assert_close(row[free], best, rtol=1e-7, atol=1e-9)


@given(seeds, st.sampled_from([2, 3, 4, "ternary"]), st.booleans(), st.sampled_from([-1, 16]))
def test_without_sparsity_it_is_gptq_bit_for_bit(seed: int, bits: Any, sym: bool, group_size: int) -> None:
    W, H = problem(seed)
    how: dict[str, Any] = {"bits": bits, "sym": sym, "group_size": group_size}
    one, other = solved(W, H, Pruner(0.0), **how), solve_gptq(W, H, **how)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.error == other.error


@given(seeds, st.sampled_from([2, 3, 4, 8, "ternary"]), st.booleans(), st.sampled_from(list(PATTERNS)))
def test_what_is_removed_is_exactly_zero_on_every_grid(seed: int, bits: Any, sym: bool, pattern: str) -> None:
    W, H = problem(seed)
    found = solved(W, H, Pruner(0.5, pattern), bits=bits, sym=sym, group_size=16)
    weight = found.dequantize()
    assert int((weight == 0).sum()) >= W.numel() // 2
    assert found.sparsity == zeros_in(weight)
    if pattern != "unstructured":
        size = int(pattern[-1])
        assert bool((weight.reshape(-1, size).count_nonzero(1) <= size // 2).all())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sparsegpt", {"sparsity": 1.0}, "sparsity=1.0 is not allowed: 0 or more, below 1"),
        ("wanda", {"sparsity": -0.1}, "sparsity=-0.1 is not allowed"),
        ("magnitude", {"sparsity": "half"}, "sparsity='half' is not allowed"),
        ("magnitude", {"sparsity": 0.0}, "sparsity=0.0 is not allowed: above 0, below 1"),
        ("wanda", {"pattern": "1:4"}, "pattern='1:4' is not allowed: one of unstructured, 2:4, 4:8"),
        ("sparsegpt", {"pattern": "2:4", "sparsity": 0.6}, "sparsity=0.6 does not go with pattern 2:4"),
        ("sparsegpt", {"sparsity": 0.0}, "sparsity=0 without bits changes nothing"),
        ("sparsegpt", {"group_size": 64}, "group_size=64 does nothing without bits"),
        ("sparsegpt", {"sym": False}, "sym=False does nothing without bits"),
        ("sparsegpt", {"bits": 5}, "bits=5 is not allowed"),
    ],
)
def test_what_makes_no_sense_is_named(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        from_options(method, options)


def test_a_width_that_the_pattern_does_not_divide_and_formats_that_do_not_fit_are_named() -> None:
    odd = nn.Sequential(nn.Sequential(nn.Linear(30, 32)), nn.Sequential(nn.Linear(32, 8)))
    with pytest.raises(TersorError, match=r"0\.0 has 30 inputs, which pattern 2:4 does not divide"):
        tersor.compress(odd, Magnitude(pattern="2:4"))
    with pytest.raises(TersorError, match="method magnitude cannot be stored as gptq; it can as safetensors"):
        tersor.compress(odd, Magnitude(), format="gptq")
    with pytest.raises(TersorError, match="method gptq cannot be stored as safetensors; it can as gptq"):
        tersor.compress(odd, GPTQ(), format="safetensors")
    with pytest.raises(TersorError, match="wanda does not compress embeddings"):
        Wanda().without_inputs()


def saved(name: str, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A tiny model on disk, and samples for it."""
    model = build(name).float()
    model.save_pretrained(folder / name)  # type: ignore[operator]
    return folder / name, samples(name, 3)


@pytest.mark.parametrize(
    "method", [Magnitude(), Wanda(pattern="2:4"), SparseGPT(sparsity=0.6)], ids=lambda method: method.name
)
def test_a_pruned_checkpoint_is_the_models_own_and_transformers_reads_it(method: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batches = saved("llama", tmp_path)
    result = tersor.compress(model, method, calibration=batches, include=["*.0.*"], out=tmp_path / "pruned")
    original = open_checkpoint(model)
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    assert written.keys() == original.shard_of.keys()
    assert "quantization_config" not in open_checkpoint(tmp_path / "pruned").config
    changed = {report.name for report in result.summary.layers}
    before = original.read(written)
    for name, tensor in written.items():
        assert tensor.dtype == before[name].dtype
        layer = name.removesuffix(".weight")
        assert torch.equal(tensor, before[name]) == (layer not in changed)
        if layer in changed:
            assert zeros_in(tensor) == pytest.approx(method.sparsity, abs=1e-3)
    assert result.summary.format == "safetensors"
    assert result.summary.sparsity == pytest.approx(method.sparsity, abs=1e-3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    ours = tersor.load(tmp_path / "pruned", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batches[0]).logits, theirs(**batches[0]).logits)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("sym", [True, False])
def test_sparse_and_quantized_keeps_its_zeros_on_disk(format: str, sym: bool, tmp_path: Path) -> None:
    model, batches = saved("llama", tmp_path)
    method = SparseGPT(pattern="2:4", bits=4, sym=sym, group_size=32)
    result = tersor.compress(model, method, calibration=batches, out=tmp_path / "out", format=format)
    dense = LazyModel(open_checkpoint(tmp_path / "out"), dtype=torch.float32).load_all()
    for report in result.summary.layers:
        weight = dense.get_submodule(report.name).weight
        assert isinstance(weight, Tensor)
        assert bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())
        assert zeros_in(weight) == report.row()["sparsity"]


def test_a_quantized_result_without_sparsity_has_the_bytes_of_gptqs(tmp_path: Path) -> None:
    model, batches = saved("llama", tmp_path)
    how = {"bits": 4, "group_size": 32}
    tersor.compress(model, GPTQ(**how), calibration=batches, out=tmp_path / "one")
    tersor.compress(model, SparseGPT(sparsity=0.0, **how), calibration=batches, out=tmp_path / "other")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_every_layout_of_a_weight_is_written_as_the_model_has_it(name: str, tmp_path: Path) -> None:
    """GPT-2 holds its weights transposed, Mixtral its experts in stacks that are published apart."""
    path, batches = saved(name, tmp_path)
    model = tersor.load(path, dtype="float32")
    tersor.compress(path, SparseGPT(), calibration=batches, out=tmp_path / "out")
    found = linear_maps(tersor.load(tmp_path / "out", dtype="float32"))
    result = tersor.compress(model, SparseGPT(), calibration=batches)
    expected = linear_maps(result.model)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == open_checkpoint(path).shard_of.keys()
    for report in result.summary.layers:
        weight = weight_matrix(found[report.name])
        torch.testing.assert_close(weight, weight_matrix(expected[report.name]))
        assert zeros_in(weight) == pytest.approx(0.5, abs=1e-3)


def test_experts_in_one_tensor_stay_as_they_are_and_a_line_says_so(tmp_path: Path) -> None:
    path, batches = saved("gpt_oss", tmp_path)
    told: list[str] = []
    result = tersor.compress(
        path, Magnitude(), calibration=batches, out=tmp_path / "out", progress=lambda what, _, __: told.append(what)
    )
    assert any("experts stay as they are: one tensor holds all of a stack" in line for line in told)
    assert not any(".experts." in report.name for report in result.summary.layers)
    with pytest.raises(TersorError, match="compress the model as a module in memory"):
        tersor.compress(path, Magnitude(), include=["*.experts.*"], out=tmp_path / "no")
    in_memory = tersor.compress(tersor.load(path), Magnitude())
    assert any(".experts." in report.name for report in in_memory.summary.layers)


def test_a_stopped_job_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = saved("llama", tmp_path)
    asked: dict[str, Any] = {"calibration": batches}
    tersor.compress(model, Wanda(), out=tmp_path / "whole", **asked)
    real, calls = Wanda.compress_block, itertools.count()

    def stopping(self: Wanda, block: Any) -> None:
        if block.name and next(calls) == 1:  # a forecast solves blocks without a name
            raise KeyboardInterrupt
        real(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(Wanda, "compress_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(model, Wanda(), out=tmp_path / "stopped", **asked)
    again = tersor.compress(model, Wanda(), out=tmp_path / "stopped", **asked)
    assert again.summary.resumed_blocks == 1
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other
    redone = tersor.compress(model, Wanda(), out=tmp_path / "stopped", redo=["*.1.mlp.*"], **asked)
    assert redone.summary.resumed_blocks == 1
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == one


def test_a_pruned_model_may_be_the_step_before_another(tmp_path: Path) -> None:
    model, batches = saved("llama", tmp_path)
    steps = [Magnitude(sparsity=0.2), GPTQ(bits=8, group_size=32)]
    result = tersor.compress(model, steps, calibration=batches, out=tmp_path / "out", format="gptq")
    assert result.summary.format == "gptq"
    with pytest.raises(TersorError, match="step 1, sparsegpt, packs the weights"):
        tersor.compress(model, [SparseGPT(bits=4), GPTQ()], out=tmp_path / "no")


def test_the_command_shows_the_sparsity(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    model, _ = saved("llama", tmp_path)
    where = ["--out", str(tmp_path / "out")]
    ran = tersor_command("compress", "magnitude", str(model), "--pattern", "2:4", "--include", "*.0.mlp.*", *where)
    assert ran.status == 0
    assert "50.0% of the weights in 3 layers are zero" in " ".join(ran.out.split())
    wrong = tersor_command("quantize", "demo", "--method", "wanda", "--out", str(tmp_path / "no"))
    assert wrong.status != 0
    assert "wanda prunes weights: tersor compress wanda MODEL" in wrong.err
