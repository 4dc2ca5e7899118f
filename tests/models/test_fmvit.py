import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.fmvit import RLMHSA, FMViTConfig, FusionBlock, GroupedMLP, MixingBlock, RepConv, regrouped

SMALL = {
    "num_classes": 3,
    "stem_dims": (8, 8, 8),
    "embed_dims": (16, 16, 32, 32),
    "stages": ("c", "cm", "cm", "m"),
    "head_dim": 4,
    "sr_ratios": (4, 2, 2, 1),
}


def trained(module):
    """Norms with statistics and weights of their own: with fresh ones, merging is an identity and shows nothing."""
    torch.manual_seed(1)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d):
            each.running_mean.normal_(std=0.3)
            each.running_var.uniform_(0.5, 2)
            nn.init.normal_(each.weight, 1, 0.2)
            nn.init.normal_(each.bias, std=0.2)
    return module.eval()


def small(**overrides):
    torch.manual_seed(0)
    return trained(tersor.models.create("fmvit", **(SMALL | overrides)))


def config(**overrides):
    return FMViTConfig(**(SMALL | overrides))


def assert_close_to(got, expected):
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("overrides", [{}, {"keep_input": False, "linear_branches": 0}, {"num_classes": 0}])
@torch.no_grad()
def test_deployed_model_computes_the_same(overrides):
    model = small(**overrides)
    image = torch.randn(2, 3, 45, 70)
    assert_close_to(model.deploy()(image), model(image))


@torch.no_grad()
def test_each_part_merged_computes_the_same():
    norm = trained(nn.BatchNorm2d(16))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    before = (scale, norm.bias - norm.running_mean * scale)
    x = torch.randn(2, 16, 6, 6)
    tokens, normed_tokens = (each.flatten(2).transpose(1, 2) for each in (x, norm(x)))

    mlp, plain = trained(GroupedMLP(16, 3.0, config())), GroupedMLP(16, 3.0, config(deployed=True))
    plain.load_state_dict(mlp.merged(before))
    assert_close_to(plain(x), mlp(norm(x)))

    attention, plain = trained(RLMHSA(16, 2, config())), RLMHSA(16, 2, config(deployed=True)).eval()
    plain.load_state_dict(attention.merged(before))
    assert_close_to(plain(tokens), attention(normed_tokens))

    block, plain = trained(FusionBlock(8, 16, 2, config())), FusionBlock(8, 16, 2, config(deployed=True)).eval()
    plain.load_state_dict(block.merged())
    assert_close_to(plain(x[:, :8]), block(x[:, :8]))


def test_deployed_model_has_no_norm_and_no_branches_and_deploys_to_itself():
    model = small()
    deployed = model.deploy()
    assert not any(isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d) for each in deployed.modules())
    assert not any("conv_kxk" in name or "linears" in name for name, _ in deployed.named_modules())
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())
    again = deployed.deploy()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in deployed.state_dict().items())
    loaded = tersor.models.load("fmvit", deployed.state_dict(), **SMALL, deployed=True)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(image), deployed(image))


@torch.no_grad()
def test_attention_branch_is_of_lower_frequency_than_the_convolution_branch():
    """On an image with the spectrum of natural ones, amplitude 1 / f."""
    torch.manual_seed(0)
    block = MixingBlock(16, 16, 8, 1, 2, config()).eval()
    f = torch.fft.fftfreq(32)[:, None].square() + torch.fft.fftfreq(32)[None].square()
    x = torch.fft.ifft2(torch.fft.fft2(torch.randn(4, 16, 32, 32)) / f.sqrt().clamp(min=1 / 32)).real
    x = x / x.std()
    tokens = block.norm1(block.patch_embed(x)).flatten(2).transpose(1, 2)
    attended = block.attention.proj.linears[0](mixed_values(block.attention, tokens))
    low = attended.transpose(1, 2).reshape(4, 8, 32, 32)
    high = block.conv(block.own(x))

    def low_share(y):
        power = torch.fft.fft2(y - y.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
        return float(power[f < 1 / 8**2].sum() / power.sum())

    assert low_share(low) > low_share(high)


def mixed_values(attention, tokens):
    """softmax(q k^T) v alone, without the input that the output layer's branches add."""
    results = []
    handle = attention.proj.register_forward_pre_hook(lambda _module, inputs: results.append(inputs[0]))
    attention(tokens)
    handle.remove()
    return results[0]


@pytest.mark.parametrize("part", ["attention.proj", "projection", "own.proj", "conv.projection", "mlp.fc2"])
@torch.no_grad()
def test_every_branch_of_the_mixing_block_matters(part):
    block, x = trained(MixingBlock(16, 32, 24, 1, 2, config())), torch.randn(1, 16, 8, 8)
    before = block(x)
    block.get_submodule(part).register_forward_hook(lambda _module, _inputs, result: torch.zeros_like(result))
    assert (block(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("s", [1, 2, 4])
def test_keys_are_fewer_by_s_squared(s):
    attention, seen = RLMHSA(16, s, config()).eval(), []
    attention.k.register_forward_hook(lambda _module, inputs, _result: seen.append(inputs[0].shape[1]))
    assert attention(torch.randn(1, 64, 16)).shape == (1, 64, 16)
    assert seen == [64 // s**2]


def test_without_branches_and_pooling_it_is_multi_head_attention():
    attention = RLMHSA(16, 1, config(linear_branches=0)).eval()
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    parts = [attention.q.reparam, attention.k.reparam, attention.v.reparam]
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([each.weight for each in parts]))
        reference.in_proj_bias.copy_(torch.cat([each.bias for each in parts]))
        reference.out_proj.load_state_dict(attention.proj.reparam.state_dict())
    x = torch.randn(2, 10, 16)
    torch.testing.assert_close(attention(x), reference(x, x, x)[0])


def test_kernels_of_many_groups_are_kernels_of_few_with_zeros():
    x, weight = torch.randn(1, 12, 5, 5), torch.randn(24, 2, 1, 1)
    torch.testing.assert_close(F.conv2d(x, weight, groups=6), F.conv2d(x, regrouped(weight, 6, 2), groups=2))
    with torch.no_grad():
        layer = trained(RepConv(12, 12, 3, groups=(4, 12, 2), scale=True, identity=True))
        merged = layer.merged()
        expected = F.conv2d(x, merged["reparam.weight"], merged["reparam.bias"], padding=1, groups=2)
        assert_close_to(layer(x), expected)


def test_refuses_unknown_blocks_and_images_that_are_too_small():
    with pytest.raises(TersorError, match="'cx'"):
        config(stages=("c", "cx", "c", "c"))
    with pytest.raises(TersorError, match="at least 32 x 32 pixels, not 16 x 64"):
        small()(torch.zeros(1, 3, 16, 64))
