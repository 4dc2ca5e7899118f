"""Any module in memory: compressed as a copy, saved, and loaded into a fresh module of its class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor import GPTQ, RTN
from tersor.layers.quantized_linear import QuantizedConv2d, QuantizedLinear


class Mixer(nn.Module):
    """A convolution, two blocks of linear layers with a second input, and a tied pair outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 64, 2, stride=2))
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=n == 0) for n in range(2))
        self.head = nn.Linear(64, 32, bias=False)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).mean(2) + shift
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        y: Tensor = self.head(self.norm(x))
        return y


def inputs(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(2, 32, 8, 8), torch.randn(2, 64)) for _ in range(count)]


def mixer(seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    return Mixer().eval()


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_plain_module_is_saved_and_loaded_into_a_fresh_one(tmp_path: Path, format: str) -> None:
    model, samples = mixer(), inputs(8)
    result = tersor.compress(model, GPTQ(bits=8, group_size=32), calibration=samples, format=format)
    assert not any(isinstance(each, QuantizedLinear) for each in model.modules())  # the original is left alone
    kinds = {type(result.model.get_submodule(name)) for name in ("stem.0", "stem.1", "blocks.0", "blocks.1")}
    assert kinds <= {QuantizedConv2d, QuantizedLinear, nn.Conv2d}
    assert isinstance(result.model.get_submodule("blocks.1"), QuantizedLinear)
    with torch.no_grad():
        expected, original = result.model(*samples[0]), model(*samples[0])
    assert 0 < float((expected - original).norm() / original.norm()) < 0.02

    result.save(tmp_path / "saved")
    fresh = mixer(seed=5)
    assert tersor.load(tmp_path / "saved", into=fresh) is fresh
    with torch.no_grad():
        assert torch.equal(fresh(*samples[0]), expected)


class Named(nn.Module):
    """Its layers have the names of parts of packed convolutions and packed experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(32, 32)
        self.linears = nn.ModuleList([nn.Linear(32, 32)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linears[0](torch.tanh(self.matrix(x)))
        return y


def test_layers_of_any_name_are_saved_packed(tmp_path: Path) -> None:
    samples = [torch.randn(4, 32) for _ in range(3)]
    result = tersor.compress(nn.Sequential(Named()), GPTQ(group_size=32), calibration=samples, format="gptq")
    result.save(tmp_path / "saved")
    again = tersor.load(tmp_path / "saved", into=nn.Sequential(Named()).eval())
    assert isinstance(again.get_submodule("0.linears.0"), QuantizedLinear)
    assert isinstance(again.get_submodule("0.matrix"), QuantizedLinear)
    with torch.no_grad():
        assert torch.equal(again(samples[0]), result.model(samples[0]))


@pytest.mark.parametrize(
    ("samples", "why"),
    [([], "the calibration is empty"), ([3], "calibration sample 0 is a int"), ([("a",)], "calibration sample 0")],
)
def test_samples_that_are_none(samples: list[object], why: str) -> None:
    with pytest.raises(tersor.TersorError, match=why):
        tersor.compress(mixer(), GPTQ(group_size=32), calibration=samples)


def test_one_tensor_a_sample_is_the_first_argument() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    result = tersor.compress(model, GPTQ(group_size=32), calibration=[torch.randn(4, 32) for _ in range(3)])
    assert [layer.tokens for layer in result.summary.layers] == [12, 12]


def test_loading_into_a_module_of_another_structure_says_what_does_not_fit(tmp_path: Path) -> None:
    result = tersor.compress(mixer(), RTN(group_size=32), calibration=inputs(1))
    result.save(tmp_path / "saved")

    def refused(other: nn.Module, match: str) -> None:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(tersor.TersorError, match=match):
            tersor.load(tmp_path / "saved", into=other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    other = mixer()
    other.blocks = nn.ModuleList([nn.Linear(64, 64)])
    refused(other, r"holds a quantized blocks\.1; the Mixer has no linear layer there")
    other = mixer()
    other.blocks[0] = nn.Linear(64, 32)
    refused(other, r"blocks\.0 has 64 outputs; the module's layer has 32")
    other = mixer()
    other.norm = nn.BatchNorm1d(63)
    refused(other, r"norm\.\w+ is \(64,\); the module's is \(63,\)")
    other = mixer()
    other.extra = nn.Linear(2, 2)
    refused(other, r"lacks extra\.weight of the Mixer")
    other = mixer()
    del other.norm
    refused(other, r"holds norm\.bias, which the Mixer has no place for")


def test_gpt2_with_its_transposed_layers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    samples = [{"input_ids": torch.randint(0, 96, (1, 32))} for _ in range(4)]
    result = tersor.compress(model, GPTQ(bits=8, group_size=32, desc_act=True), calibration=samples)
    result.save(tmp_path / "saved")
    with torch.no_grad():
        expected = result.model(**samples[0]).logits
        read = tersor.load(tmp_path / "saved")(**samples[0]).logits
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)  # kernels add up in another order
        assert float((expected - model(**samples[0]).logits).norm() / expected.norm()) < 0.02
    with pytest.raises(
        tersor.TersorError, match=r"h\.0\.attn\.c_attn is one of transformers' Conv1D .* use --format gptq"
    ):
        tersor.compress(model, GPTQ(group_size=32), calibration=samples, format="compressed-tensors")


def test_a_saved_module_keeps_what_was_there_where_it_cannot_be_written(tmp_path: Path) -> None:
    result = tersor.compress(mixer(), RTN(group_size=32), calibration=inputs(1))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("Dear")
    for overwrite in (False, True):
        with pytest.raises(tersor.TersorError, match=r"exists and is not empty|is no model directory"):
            result.save(tmp_path / "letters", overwrite=overwrite)
    assert (tmp_path / "letters" / "one.txt").read_text() == "Dear"
