"""The index of models: read without importing them, exact in its errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

import tersor.models
from tersor.errors import TersorError
from tersor.models.config import config_from_dict, config_to_dict


def test_listing_imports_no_model_and_no_torch() -> None:
    script = "import sys, tersor.models as m; assert m.list('vision/*'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_patterns_match_names_and_families() -> None:
    by_family = [info.name for info in tersor.models.list("vision/shvit*")]
    assert by_family == ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"]
    assert [info.name for info in tersor.models.list("shvit_s[12]")] == ["shvit_s1", "shvit_s2"]
    assert tersor.models.list("no-such-family/*") == []


def test_a_variant_with_the_systems_own_name_is_the_configs_defaults() -> None:
    assert all(info.overrides == {} for info in tersor.models.list() if info.name == info.system)


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(TersorError, match=r"'shvit_s9'; did you mean .*shvit_s1"):
        tersor.models.create("shvit_s9")
    with pytest.raises(TersorError, match="`tersor models` lists"):
        tersor.models.create("zzzzzz")


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TersorError, match="shvit_s1 has no option 'embed_dims'; did you mean 'embed_dim'"):
        tersor.models.create("shvit_s1", embed_dims=(8, 16, 24))


@pytest.mark.parametrize(
    ("name", "option", "value", "told"),
    [
        ("vit", "num_classes", -1, "vit's num_classes is a whole number from 0 on, not -1"),
        ("shvit_s1", "num_classes", None, "shvit_s1's num_classes is a whole number from 0 on, not None"),
        ("driver", "in_chans", 0, "driver's in_chans is a whole number from 1 on, not 0"),
        ("smt_t", "in_chans", 2.5, r"smt_t's in_chans is a whole number from 1 on, not 2\.5"),
        ("hopfield_bags", "num_classes", 0, "hopfield_bags needs num_classes of at least 1, not 0"),
        ("pp_mobileseg_tiny", "num_classes", 0, "num_classes of at least 1, not 0"),
    ],
)
def test_numbers_that_no_model_can_have_are_a_value_error(name: str, option: str, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        tersor.models.create(name, **{option: value})
    assert isinstance(raised.value, TersorError)


def test_what_is_no_model_of_ours_has_no_config() -> None:
    import torch

    with pytest.raises(TersorError, match="Linear is no model"):
        tersor.models.config_of(torch.nn.Linear(2, 2))


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Outer:
    sizes: tuple[tuple[int, ...], ...] = ()
    inner: Inner | None = None


def test_configs_nest_and_come_back_from_json_lists() -> None:
    config = Outer(sizes=((1, 2), (3,)), inner=Inner(width=7))
    assert config_from_dict(Outer, {"sizes": [[1, 2], [3]], "inner": {"width": 7}}, of="outer") == config
    assert config_from_dict(Outer, config_to_dict(config), of="outer") == config
    with pytest.raises(TersorError, match=r"outer\.inner has no option 'wide'"):
        config_from_dict(Outer, {"inner": {"wide": 1}}, of="outer")
