"""Conversions of official checkpoints are recorded, and each tensor is computed from those that it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.checkpoint.published_layout import ValuesNeededError, compute, recorded, sources


def described(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def test_each_result_is_computed_from_the_tensors_that_it_is_made_of() -> None:
    state = {
        "qkv": torch.randn(6, 2),
        "conv": torch.randn(3, 2, 1, 1),
        "a": torch.randn(2, 2),
        "b": torch.randn(2, 2),
        "same": torch.randn(5),
        "index": torch.arange(4),
    }

    def convert(given: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k, v = given["qkv"].chunk(3)
        return {
            "q": q,
            "v": 2 * v.t().contiguous(),
            "k": k[..., None],
            "linear": given["conv"][:, :, 0, 0] if given["conv"].dim() == 4 else given["conv"],
            "joined": torch.cat((given["a"], given["b"].float())),
            "same": given["same"],
            "length": torch.tensor(7),
        }

    layout, wanted = recorded(convert, described(state)), convert(state)
    assert layout.keys() == wanted.keys()
    assert sources(layout["joined"]) == ["a", "b"]
    for name, tensor in layout.items():
        asked: list[str] = []

        def read(key: str, asked: list[str] = asked) -> Tensor:
            asked.append(key)
            return state[key]

        assert tensor.shape == wanted[name].shape
        assert torch.equal(compute(tensor, read), wanted[name])
        assert set(asked) == set(sources(tensor)) <= {"qkv", "conv", "a", "b", "same"}


@pytest.mark.parametrize(
    "convert",
    [
        lambda state: {"w": state["w"] if state["w"].sum() > 0 else -state["w"]},
        lambda state: {"w": state["w"].mul_(2)},
        lambda state: {"w": state["w"] * state["w"].abs().max().item()},
    ],
    ids=["looks at values", "changes in place", "takes a number out"],
)
def test_what_cannot_be_recorded_says_so(convert: object) -> None:
    with pytest.raises(ValuesNeededError):
        recorded(convert, {"w": ((2, 2), torch.float32)})  # type: ignore[arg-type]


def test_our_models_conversions_are_recorded() -> None:
    """A published layout of every kind: shapes that differ by ones, packed projections, other names."""
    model = tersor.models.create("itransformer", seq_len=8, pred_len=4, d_model=8, d_ff=8, n_heads=2)
    state = {
        name: value[..., None] if name.endswith(("conv1.weight", "conv2.weight")) else value
        for name, value in model.state_dict().items()
    }
    layout = recorded(model.convert_checkpoint, described(state))
    for name, value in model.state_dict().items():
        assert torch.equal(compute(layout[name], state.__getitem__), value)
