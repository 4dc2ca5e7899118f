"""Files made of other files' tensors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from tersor.checkpoint.splice import pieces_of, splice

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn)
tensors = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(tensors, min_size=1, max_size=8), files=st.integers(1, 3))
def test_every_tensor_arrives_bit_for_bit(
    drawn: list[tuple[torch.dtype, list[int], int]], files: int, tmp_path: Path
) -> None:
    made = {
        f"tensor.{n}": (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 200).to(dtype)
        for n, (dtype, shape, seed) in enumerate(drawn)
    }
    pieces = {}
    for n in range(files):
        part = {name: tensor for k, (name, tensor) in enumerate(made.items()) if k % files == n}
        save_file(part, tmp_path / f"{n}.safetensors", {"format": "pt"})
        pieces |= pieces_of(tmp_path / f"{n}.safetensors")
    written = io.BytesIO()
    splice(pieces, written)
    found = load(written.getvalue())
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].untyped_storage().tolist() == tensor.untyped_storage().tolist()


def test_a_file_of_one_source_is_that_source(tmp_path: Path) -> None:
    made = {"b": torch.ones(3), "a": torch.zeros(2, 2), "c": torch.ones(5, dtype=torch.uint8)}
    save_file(made, tmp_path / "one", {"format": "pt"})
    with (tmp_path / "two").open("wb") as file:
        splice(pieces_of(tmp_path / "one"), file)
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_file_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "one")
    pieces = pieces_of(tmp_path / "one")
    (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-8])
    with pytest.raises(OSError, match="ends before the tensor"):
        splice(pieces, io.BytesIO())
