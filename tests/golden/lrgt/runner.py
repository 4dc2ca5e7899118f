from typing import Any

import torch
from golden.harness import Case
from torch import Tensor, nn

from tersor.models.loading import load_state
from tersor.models.vision.lrgt import Decoder, Encoder, LRGTConfig, Merger, dice_loss

# Computed in float64, the published configuration's volume is 1.4e-5 away from the case: that is the case's own rounding,
# which the sigmoid's steep logits enlarge. Features and merged tokens of the same case agree to 1e-6.
TOLERANCE = {"volume": 4e-5}

ENCODER = {  # the same names in ours
    name: name
    for name in (
        *("in_chans", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
        *("lga_layer", "patch_group", "drop_rate", "attn_drop_rate", "drop_path_rate"),
    )
}
MERGER = {"OUT_TOKEN_LENS": "merge_tokens", "K": "merge_neighbours", "NUM_HEAD": "merge_heads"}
DECODER = {
    "HEADS": "decoder_heads",
    "DEPTH": "decoder_depth",
    "SOFTMAX_DROPOUT": "decoder_attn_drop",
    "ATTENTION_MLP_DROPOUT": "decoder_drop",
}
PARTS: dict[str, type[nn.Module]] = {"encoder": Encoder, "merger": Merger, "decoder": Decoder}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "smooth" in case.config:
        return loss(case)
    config, state, x = our_config(case.config), case.state_dict(), case.inputs()["x"]
    given = {"encoder": True, "merger": bool(case.config["merger"]), "decoder": bool(case.config["decoder"])}
    results, parameters = [], 0
    for part, build in PARTS.items():
        if not given[part]:
            break
        model = build(config).eval()
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        load_state(model, own, what=part)
        parameters += sum(p.numel() for p in model.parameters())
        x = model(x)
        results.append(x)
    assert parameters == case.parameters
    return dict(zip(("features", "merged", "volume"), results, strict=False))


def our_config(published: dict[str, Any]) -> LRGTConfig:
    fields: dict[str, Any] = {}
    encoder = published["enc"] if isinstance(published["enc"], dict) else {}  # a name: the only variant
    for options, names in ((encoder, ENCODER), (published["merger"], MERGER), (published["decoder"], DECODER)):
        fields |= {names[key]: value for key, value in (options or {}).items() if key in names}
    if not published["merger"]:  # absent parts have the published width, which need not suit the encoder's
        fields["merge_heads"] = 1
    if not published["decoder"]:
        fields |= {"decoder_heads": 1}
    return LRGTConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


@torch.enable_grad()
def loss(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    predict = inputs["predict"].requires_grad_()
    value = dice_loss(predict, (inputs["target_raw"] > 0.6).float(), **case.config)
    value.backward()
    assert predict.grad is not None
    return {"loss": value[None], "gradient": predict.grad}
