"""PP-MobileSeg beyond its golden cases: the valid interpolate module, Paddle's names, refusals."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.pp_mobileseg import resize, valid_classes

SMALL = tersor.models.list("pp_mobileseg_tiny")[0].small


def test_the_valid_interpolate_module_is_the_argmax_among_classes_that_win_somewhere() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 3, 4)
    present = logits.argmax(1).unique()
    others_out = torch.full_like(logits, -torch.inf)
    others_out[:, present] = logits[:, present]
    expected = torch.stack([resize(others_out[:, [c]], (24, 32))[:, 0] for c in present], 1).argmax(1)
    got = valid_classes(logits, (24, 32))
    assert got.dtype == torch.int32
    assert torch.equal(got, present[expected].int())
    full = resize(logits, (24, 32)).argmax(1)
    agree = got == full
    assert not torch.isin(full[~agree], present).any()  # it differs only where an absent class would win
    assert (~agree).any()


def test_it_gives_classes_in_eval_mode_only_and_logits_where_the_classes_are_few() -> None:
    image = torch.randn(2, 3, 64, 96)
    model = tersor.models.create("pp_mobileseg", **SMALL, upsample="vim")
    assert model.train()(image).shape == (2, 40, 64, 96)
    assert model.eval()(image).shape == (2, 64, 96)
    few = tersor.models.create("pp_mobileseg", **{**SMALL, "num_classes": 29}, upsample="vim").eval()
    assert few(image).shape == (2, 29, 64, 96)


def test_any_size_works_and_features_have_strides_8_16_32() -> None:
    model = tersor.models.create("pp_mobileseg", **SMALL).eval()
    image = torch.randn(1, 3, 75, 33)
    with torch.no_grad():
        assert model(image).shape == (1, 40, 75, 33)
        assert [list(each.shape[1:]) for each in model.features(image)] == [[16, 10, 5], [16, 5, 3], [24, 3, 2]]


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(TersorError, match="out_feat_chs is the last three"):
        tersor.models.create("pp_mobileseg", **{**SMALL, "out_feat_chs": (16, 16, 16)})
    with pytest.raises(TersorError, match="origin"):
        tersor.models.create("pp_mobileseg", **{**SMALL, "inj_type": "origin"})
    with pytest.raises(TersorError, match="at least 16 x 16"):
        tersor.models.create("pp_mobileseg", **SMALL)(torch.randn(1, 3, 8, 64))


def test_reads_paddles_own_file_and_nothing_that_runs(tmp_path: Path) -> None:
    model = tersor.models.create("pp_mobileseg", **SMALL)
    names = {"running_mean": "_mean", "running_var": "_variance"}
    state: dict[str, object] = {}
    for key, value in model.state_dict().items():
        before, _, last = key.rpartition(".")
        if last != "num_batches_tracked":
            state[f"{before}.{names.get(last, last)}"] = (key, value.numpy())  # newer files hold (name, array)
    state["decode_head.conv_seg.bias"] = model.decode_head.conv_seg.bias.detach().numpy()  # older ones the array
    state["StructuredToParameterName@@"] = {"decode_head.conv_seg.bias": "conv2d_0.b_0"}
    file = tmp_path / "model.pdparams"
    file.write_bytes(pickle.dumps(state, protocol=4))
    again = tersor.models.load("pp_mobileseg", file, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    file.write_bytes(pickle.dumps({"weight": Path}))
    with pytest.raises(TersorError, match="pathlib"):
        tersor.models.load("pp_mobileseg", file, **SMALL)
