import torch
from golden.harness import Case, check_parameters
from torch import Tensor

from tersor.models import key_maps
from tersor.models.vision.fmvit import FMViTConfig, MixingBlock, RepConv

NEXTVIT = (  # timm's names of a block -> ours
    (r"^(patch_embed)\.conv\.", r"\1.proj.conv_kxk.0.conv."),
    (r"^(patch_embed)\.norm\.", r"\1.proj.conv_kxk.0.bn."),
    (r"^e_mhsa\.(q|k|v|proj)\.", r"attention.\1.reparam."),
    (r"^e_mhsa\.", "attention."),
    (r"^projection\.conv\.", "projection.conv_kxk.0.conv."),
    (r"^projection\.norm\.", "projection.conv_kxk.0.bn."),
    (r"^mhca\.group_conv3x3\.", "conv.group_conv3x3.conv_kxk.0.conv."),
    (r"^mhca\.norm\.", "conv.group_conv3x3.conv_kxk.0.bn."),
    (r"^mhca\.", "conv."),
    (r"^mlp\.(fc[12])\.", r"mlp.\1.reparam."),
)


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    return mobileone(case) if "deploy_weight" in case.outputs else nextvit(case)


def nextvit(case: Case) -> dict[str, Tensor]:
    given = case.config
    C, s, head_dim = given["out_chs"], given.get("sr_ratio", 1), given.get("head_dim", 32)
    low_dim = max(32, (int(C * given.get("mix_block_ratio", 0.75)) + 16) // 32 * 32)
    config = FMViTConfig(
        embed_dims=(C,),
        stages=("m",),
        sr_ratios=(s,),
        head_dim=head_dim,
        mix_mlp_ratio=given.get("mlp_ratio", 2),
        conv_branches=1,
        conv_extras=False,
        linear_branches=0,
        mlp_groups=(),
        keep_input=False,
    )
    block = MixingBlock(given["in_chs"], C, low_dim, given.get("stride", 1), s, config).eval()
    load(block, key_maps.rename(case.state_dict(), *NEXTVIT))
    check_parameters(case, block)
    return {"out": block(case.inputs()["map"])}


def mobileone(case: Case) -> dict[str, Tensor]:
    given = case.config
    groups = given["in_chs"] // given["group_size"] if given.get("group_size") else 1
    layer = RepConv(
        given["in_chs"],
        given["out_chs"],
        given["kernel_size"],
        groups=(groups,) * given.get("num_conv_branches", 1),
        stride=given.get("stride", 1),
        scale=given.get("use_scale_branch", True),
        identity=True,
    ).eval()
    load(layer, case.state_dict())
    check_parameters(case, layer)
    merged, x = layer.merged(), case.inputs()["map"]
    out = layer(x).relu() if given.get("use_act", True) else layer(x)
    return {"out": out, "deploy_weight": merged["reparam.weight"], "deploy_bias": merged["reparam.bias"]}


def load(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
