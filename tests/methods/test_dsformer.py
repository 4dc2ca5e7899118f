"""Dense times sparse weights: the property checks of the paper's form, training through the choice, results that load equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import tersor
from tersor.layers.dense_sparse import (
    DenseSparse,
    index_bits,
    joined_blocks,
    largest,
    pack_indices,
    split_blocks,
    unpack_indices,
)
from tersor.methods.structure.dsformer import DSFormer, StraightThroughFactors, freeze, size_ratio
from tersor.methods.structure.factorize import svd
from tersor.methods.structure.sparse_coding import code, fit_basis, learn, project


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def lost(W: Tensor, S: Tensor, D: Tensor) -> float:
    return float((W - S @ D).norm() / W.norm())


# 1. exactness


@pytest.mark.parametrize(("p", "q"), [(24, 16), (12, 20)])
def test_as_many_numbers_as_basis_vectors_reproduce_the_weight(p: int, q: int) -> None:
    W = random(2, p, q)
    S, D = learn(W, min(p, q), min(p, q), 0, chance())
    assert lost(W, S, D) < 1e-6


def test_the_weight_as_its_own_basis_is_exact_with_one_number_a_row() -> None:
    W = random(1, 12, 20)
    S = code(W, W, 1)
    assert torch.equal((S != 0).sum(-1), torch.ones(1, 12, dtype=torch.long))
    torch.testing.assert_close(S @ W, W, rtol=1e-8, atol=1e-8)


# 2. nesting


def test_errors_do_not_grow_with_more_numbers_or_more_basis_vectors() -> None:
    W, D = random(1, 40, 16), random(1, 24, 16, seed=1)
    errors = [lost(W, code(W, D, s), D) for s in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    one = [
        lost(W, code(W, D[:, :k], 1), D[:, :k]) for k in range(1, 25)
    ]  # of one vector the pursuit's choice is optimal
    assert one == sorted(one, reverse=True)
    for row in range(4):  # and it is the optimum over all vectors
        best = min(float((W[0, row] - (W[0, row] @ d / (d @ d)) * d).norm()) for d in D[0])
        assert float((W - code(W, D, 1) @ D)[0, row].norm()) == pytest.approx(best, rel=1e-6)


# 3. a union of subspaces


def test_it_beats_low_rank_of_equal_size_on_a_union_of_subspaces() -> None:
    bases = torch.linalg.qr(random(8, 64, 4))[0].mT  # 8 subspaces of R^64, of dimension 4
    W = torch.cat([random(64, 4, seed=n + 1) @ basis for n, basis in enumerate(bases)])[None]  # [1, 512, 64]
    true = bases.reshape(1, 32, 64)
    assert lost(W, code(W, true, 4), true) < 1e-8
    S, D = learn(W, 32, 4, 30, chance())
    rank = int((32 * 64 + 4 * 512 * (1 + index_bits(32) / 32)) / (512 + 64))
    low = svd(W[0], rank)
    low_rank = float((W[0] - low.decoder @ low.encoder).norm() / W.norm())
    assert rank == 7
    assert low_rank == pytest.approx(0.72, abs=0.02)
    assert lost(W, S, D) < 0.25  # the sheet's own runs reach 0.14


# 4. gradients


def test_all_latent_entries_get_the_gradient_of_the_sparse_matrix() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 12).double()
    factors = StraightThroughFactors(layer, random(4, 6, 4), random(4, 4, 5, seed=1), 2)
    x, weight = random(7, 10, seed=2), random(7, 12, seed=3)

    def loss() -> Tensor:
        return (factors(x) * weight).sum().sin()

    loss().backward()
    G = split_blocks(
        torch.autograd.functional.jacobian(lambda W: ((x @ W.mT + layer.bias) * weight).sum().sin(), _weight(factors)),
        6,
        5,
    )
    torch.testing.assert_close(factors.latent.grad, G @ factors.basis.mT)
    assert bool((factors.latent.grad != 0).all())
    torch.testing.assert_close(factors.basis.grad, factors.sparse().mT @ G)
    before, at = factors.basis.data.clone(), (2, 1, 3)
    step = 1e-6
    values = []
    for sign in (1, -1):
        factors.basis.data = before.clone()
        factors.basis.data[at] += sign * step
        values.append(float(loss().detach()))
    assert float(factors.basis.grad[at]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def _weight(factors: StraightThroughFactors) -> Tensor:
    return joined_blocks(factors.sparse() @ factors.basis, factors.grid).detach()


# 5. learning what is sparse


def test_a_support_that_learns_beats_one_that_is_fixed() -> None:
    D = torch.nn.functional.normalize(random(1, 8, 12, seed=1), dim=-1)
    true = project(random(1, 20, 8, seed=2), D, 2)
    W, x = (true @ D)[0], random(64, 12, seed=3)
    losses = {}
    for fixed in (False, True):
        start = random(1, 20, 8, seed=4) * 0.3  # of another support
        factors = StraightThroughFactors(nn.Linear(12, 20, bias=False).double(), start, D, 2)
        if fixed:
            freeze(factors)
        optimizer = torch.optim.Adam([factors.latent], lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (factors(x) - x @ W.mT).square().mean()
            loss.backward()
            optimizer.step()
        losses[fixed] = float(loss.detach())
    assert losses[False] < 0.5 * losses[True]


# 6. structure and size


@pytest.mark.parametrize(("p", "q", "k", "s"), [(24, 16, 5, 2), (8, 4, 8, 3), (24, 8, 1, 1), (12, 16, 9, 9)])
@torch.no_grad()
def test_rows_have_s_numbers_products_are_dense_ones_and_size_is_the_formula(p: int, q: int, k: int, s: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 24)
    blocks = (24 // p) * (16 // q)
    exported = StraightThroughFactors(layer, random(blocks, p, k), random(blocks, k, q, seed=1), s).exported(layer)
    assert int((exported.sparse() != 0).sum(-1).max()) == s
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(exported(x), nn.functional.linear(x, exported.weight, layer.bias), rtol=1e-5, atol=1e-5)
    bits = 32 * (exported.basis.numel() + exported.values.numel()) + 8 * exported.indices.numel()
    formula = 32 * blocks * p * q / size_ratio(p, q, k, s)
    assert formula <= bits < formula + 8  # the last byte is filled up


@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 1000))
def test_indices_survive_packing(basis: int, count: int, seed: int) -> None:
    places = torch.randint(basis, (count,), generator=torch.Generator().manual_seed(seed))
    bits = index_bits(basis)
    assert 2**bits >= basis
    packed = pack_indices(places, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_indices(packed, bits, count), places)


def test_of_equal_entries_the_first_count_and_scale_does_not() -> None:
    assert largest(torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]]), 2).tolist() == [[1, 2]]
    Z, D = random(1, 6, 5), random(1, 5, 4, seed=1)
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 0.5], dtype=torch.float64)
    scaled = project(Z / scale, D * scale[:, None], 2)
    assert torch.equal(scaled != 0, project(Z, D, 2) != 0)
    assert torch.equal(joined_blocks(split_blocks(Z[0], 3, 5), (2, 1)), Z[0])


def test_unused_basis_vectors_take_what_is_fitted_worst() -> None:
    W, D = random(1, 10, 6), torch.eye(6, dtype=torch.float64)[None, :4]
    S = torch.zeros(1, 10, 4, dtype=torch.float64)
    S[0, :, 0] = W[0, :, 0]  # only the first vector is used
    found = fit_basis(W, S, D)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 4, dtype=torch.float64))
    assert lost(W, code(W, found, 1), found) < lost(W, S, D)


# the method


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.2, **sizes)).eval()


def texts(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": each[None]} for each in torch.randint(64, (count, 12), generator=chance())]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(texts()[0]["input_ids"]).logits
    return found


@pytest.mark.parametrize("options", [{}, {"rows": 16, "columns": 8}, {"nonzeros": 2, "loss": "task", "weighted": True}])
def test_results_are_smaller_and_load_equal(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    method = DSFormer(ratio=1.5, rounds=2, epochs=2, **options)
    result: Any = tersor.compress(model, method, calibration=texts(), format=None)
    result.save(tmp_path / "small")
    assert torch.equal(logits(tersor.load(tmp_path / "small")), logits(result.model))
    rows = [report.row() for report in result.summary.layers]
    assert len(rows) == 14
    assert all(row["ratio"] >= 1.5 for row in rows)
    assert not any(isinstance(module, StraightThroughFactors) for module in result.model.modules())
    assert sum(isinstance(module, DenseSparse) for module in result.model.modules()) == 14
    assert isinstance(result.model.lm_head, nn.Linear)


def test_training_brings_it_closer_to_the_original() -> None:
    model = llama()

    def distance(**options: Any) -> float:
        method = DSFormer(ratio=1.8, rounds=2, **options)
        result: Any = tersor.compress(model, method, calibration=texts(), format=None)
        found = logits(result.model).log_softmax(-1)
        return float((found.exp() * (found - logits(model).log_softmax(-1))).sum(-1).mean())

    start = distance(epochs=0)
    assert distance(epochs=30, lr=1e-3, latent_lr=1e-2, batch_size=4) < 0.5 * start


def test_weighting_fits_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)))
    x = torch.randn(200, 32) * torch.logspace(-1.5, 1, 32)
    errors = {}
    for weighted in (False, True):
        method = DSFormer(ratio=2.0, epochs=0, weighted=weighted)
        result: Any = tersor.compress(model, method, calibration=[x], format=None)
        layer, original = result.model[0][0], model[0][0]
        errors[weighted] = float((layer(x) - original(x)).norm().detach())
    assert errors[True] < 0.8 * errors[False]


def test_transposed_layers_are_taken_and_shared_or_excluded_ones_are_not() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), Conv1D(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).relu())
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Pair(), Pair(), nn.Linear(16, 16))
    model[1].up.weight = model[0].up.weight  # type: ignore[union-attr, assignment]
    method = DSFormer(ratio=1.2, epochs=1, nonzeros=3)
    result: Any = tersor.compress(model, method, calibration=[torch.randn(4, 16)], exclude=["1.down"], format=None)
    kinds = {name for name, module in result.model.named_modules() if isinstance(module, DenseSparse)}
    assert kinds == {"0.down"}


def test_labels_are_the_task_where_there_are_any() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 3)))
    batches = [{"args": (torch.randn(16, 8),)} for _ in range(4)]
    labelled = [{**batch, "target": batch["args"][0][:, :3].argmax(-1)} for batch in batches]
    method = DSFormer(ratio=1.1, epochs=60, loss="task", batch_size=1, lr=1e-2, latent_lr=1e-2, nonzeros=2)
    result: Any = tersor.compress(model, method, calibration=labelled, format=None)
    right = [(result.model(*batch["args"]).argmax(-1) == batch["target"]).double().mean() for batch in labelled]
    assert float(sum(right)) / 4 > 0.8
    with pytest.raises(tersor.TersorError, match="loss='task' needs a language model, or samples with a target"):
        tersor.compress(model, method, calibration=batches, format=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio=1.0 is not allowed: above 1"),
        ({"nonzeros": 0.0}, "nonzeros=0.0 is not allowed"),
        ({"loss": "mse"}, "loss='mse' is not allowed: one of distill, task"),
        ({"rows": 24}, r"model.layers.0.self_attn.q_proj of 32 x 32 cannot be cut into blocks of 24 x 32"),
        ({"ratio": 200.0}, r"q_proj: no basis makes blocks of 32 x 32 200 times smaller with nonzeros=0.25"),
        ({"nonzeros": 40}, "no basis makes blocks"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tersor.TersorError, match=message):
        tersor.compress(llama(), DSFormer(**options), calibration=texts(), format=None)
