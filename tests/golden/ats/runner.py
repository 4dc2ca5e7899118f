import torch
from golden.harness import Case
from torch import Tensor

import tersor.models
from tersor.models.vision.ats import sample_tokens, token_scores

# Twelve blocks in float32: of the published logits 2.5e-5 is their own rounding (so far is our float64 from them).
TOLERANCE = {"logits": 5e-5, "first_ats/sorted_scores": 2e-5}
FIELDS = {
    "IMG_SIZE": "img_size",
    "PATCH_SIZE": "patch_size",
    "IN_CHANNELS": "in_chans",
    "NUM_CLASSES": "num_classes",
    "EMBED_DIM": "embed_dim",
    "DEPTH": "depth",
    "NUM_HEADS": "num_heads",
    "MLP_RATIO": "mlp_ratio",
    "QKV_BIAS": "qkv_bias",
    "ATS_BLOCKS": "ats_blocks",
    "NUM_TOKENS": "num_tokens",
    "DROP_TOKENS": "drop_tokens",
}
UNUSED = {  # what our model does not have, at the value that stands for "none"
    "QK_SCALE": None,
    "HYBRID_BACKBONE": None,
    "NORM_LAYER": None,
    "DROP_RATE": 0.0,
    "ATTN_DROP_RATE": 0.0,
    "DROP_PATH_RATE": 0.0,
}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    for name, value in UNUSED.items():
        assert case.config.get(name, value) == value, f"{name}={case.config[name]} is not supported"
    config = {ours: case.config[theirs] for theirs, ours in FIELDS.items()}
    config["representation_size"] = case.config.get("REPRESENTATION_SIZE") or 0
    state = case.state_dict()
    model = tersor.models.load("ats", state, **config)
    zeros = sum(tensor.numel() for name, tensor in state.items() if name.endswith("out_zero_mask"))
    assert sum(p.numel() for p in model.parameters()) + zeros == case.parameters

    image = case.inputs()["image"]
    chosen = sorted(config["ats_blocks"])
    seen: dict[str, Tensor] = {}

    def watch(attention, args, result):  # the first ATS block again, step by step
        x, policy = args
        captured = {}
        hooks = [
            attention.qkv.register_forward_hook(lambda m, a, out: captured.update(qkv=out)),
            attention.av.register_forward_pre_hook(lambda m, a: captured.update(kept=a[0], v=a[1])),
        ]
        handle.remove()
        points, attention.points = attention.points, 0
        attention(x, policy)  # with all rows of the attention matrix
        attention.points = points
        for hook in hooks:
            hook.remove()
        scores = token_scores(captured["kept"], captured["v"])
        seen["sorted_scores"], seen["sorted_indices"] = scores.sort(-1)
        kept = sample_tokens(scores, points) < scores.shape[1]
        full = torch.cat([torch.ones_like(kept[:, :1]), kept], 1)
        full = torch.nn.functional.pad(full, (0, x.shape[1] - full.shape[1]))
        seen["policy"] = full[..., None].float()
        seen["sampler"] = seen["policy"].nonzero()
        policy = torch.ones_like(result[1][..., 0]) if result[2] is None else result[2]  # None: all are there
        assert torch.equal(policy, full[:, : policy.shape[1]].float())  # what the model itself took

    handle = model.blocks[chosen[0]].attn.register_forward_hook(watch)
    logits = model(image)
    tokens = model.tokens(image)[:, chosen].float()
    found = {"logits": logits, "tokens_kept": tokens, **{f"first_ats/{name}": value for name, value in seen.items()}}
    return {name: found[name] for name in case.outputs}
