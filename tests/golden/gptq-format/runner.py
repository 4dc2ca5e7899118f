"""Words as GPTQModel, AutoAWQ and compressed-tensors pack them: read to the same integers, written to the same words."""

from __future__ import annotations

import torch
from golden.harness import Case
from torch import Tensor

from tersor.formats.layout import QuantizationConfig
from tersor.formats.layouts import READ, layout_named, write
from tersor.formats.quantized_weight import QuantizedWeight


def run(case: Case) -> dict[str, Tensor]:
    kind = case.config.get("format", "gptq")
    arrays = {name: torch.from_numpy(array) for name, array in case.arrays.items()}
    if kind.startswith("awq"):
        _awq(case, arrays)
    elif kind.startswith("compressed-tensors"):
        _compressed_tensors(case, arrays)
    else:
        _gptq(case, arrays)
    return {}


def _gptq(case: Case, arrays: dict[str, Tensor]) -> None:
    config = case.config
    expected = QuantizedWeight.from_codes(
        arrays["q"].t(),
        arrays["scales"],
        arrays["zeros"],
        bits=config["bits"],
        group_size=config["group_size"],
        g_idx=arrays["g_idx"],
    )
    for version in ("v1", "v2"):
        tensors = {name: arrays[name] for name in ("qweight", "scales", "g_idx")}
        tensors["qzeros"] = arrays[f"qzeros_{version}"]
        name = "gptq" if version == "v1" else "gptq_v2"
        said = QuantizationConfig(name, config["bits"], config["group_size"], config["sym"], whole_word_zeros=True)
        weight = READ[name].read(case.name, tensors, config["in_features"], said)
        _check_equal(weight, expected)
        _check_output(weight, arrays)

        written = write(weight, layout_named(name), sym=config["sym"])
        if version == "v1" and config["zero_min"] == 0 and config["bits"] != 3:
            del written[
                "qzeros"
            ]  # a zero point of 0, which GPTQModel lets borrow from its neighbour and tersor never makes
        for suffix, words in written.items():
            assert torch.equal(words, tensors[suffix]), f"{version} {suffix}"


def _awq(case: Case, arrays: dict[str, Tensor]) -> None:
    config = case.config
    tensors = {name: arrays[name] for name in ("qweight", "qzeros", "scales")}
    said = QuantizationConfig("awq", 4, config["group_size"], sym=False)
    weight = READ["awq"].read(case.name, tensors, config["in_features"], said)
    expected = QuantizedWeight.from_codes(
        arrays["q"].t(), arrays["scales"], arrays["zeros"], bits=config["bits"], group_size=config["group_size"]
    )
    _check_equal(weight, expected)
    _check_output(weight, arrays)


def _compressed_tensors(case: Case, arrays: dict[str, Tensor]) -> None:
    config = case.config
    bits, tensors = config["num_bits"], {name: arrays[name] for name in config["keys"]}
    said = QuantizationConfig("compressed-tensors", bits, config["group_size"], sym=False)
    weight = READ[said.layout].read(case.name, tensors, config["in_features"], said)
    middle = 2 ** (bits - 1)  # stored integers are signed
    expected = QuantizedWeight.from_codes(
        arrays["q"].int() + middle,
        arrays["weight_scale"].t(),
        arrays["zeros"].int().t() + middle,
        bits=bits,
        group_size=config["group_size"],
    )
    _check_equal(weight, expected)
    _check_output(weight, arrays)
    written = write(weight, layout_named("compressed-tensors"), sym=config["symmetric"])
    assert set(written) == set(tensors)
    for name, words in written.items():
        assert torch.equal(words, tensors[name]), name


def _check_equal(weight: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert torch.equal(weight.codes(), expected.codes())
    assert torch.equal(weight.zeros, expected.zeros)
    assert torch.equal(weight.scales, expected.scales)
    assert torch.equal(weight.groups(), expected.groups())


def _check_output(weight: QuantizedWeight, arrays: dict[str, Tensor]) -> None:
    y = arrays["x"] @ weight.dequantize(torch.float32).t()
    if "bias" in arrays:
        y += arrays["bias"].float()
    torch.testing.assert_close(y, arrays["y"], rtol=1e-5, atol=1e-5)
