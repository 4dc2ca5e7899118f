"""The quantizers as array cases; a BERT classifier of transformers, its quantized student, one pass with each intervention."""

from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor, nn

from tersor.formats.clipped_grid import codes_of, inside, symmetric
from tersor.layers.dynamic_products import rounded_through
from tersor.layers.straight_through import straight_through
from tersor.methods.training.signals import parts_of
from tersor.methods.training.signals import run as run_parts
from tersor.methods.training.teacher_intervention import TeacherIntervention, losses, prepare

KIND = {"none": "", "MI": "map", "CI": "context", "OI": "output"}
OVER = {"layer": None, "row": (-1,), "head": (-2, -1)}


def run(case: Case) -> dict[str, Tensor]:
    return model_pass(case) if "mode" in case.config else quantizers(case)


def quantizers(case: Case) -> dict[str, Tensor]:
    given, clip = case.inputs(), case.config["clip"][1]
    results = {}
    for name in case.outputs:
        first, how, *gradient = name.split("-", 2)
        x = given["w"] if first == "ternary" else given["act4" if how == "head" else "act3"]
        x = x.requires_grad_(True)
        if first == "ternary":
            y = straight_through(codes_of(x, "ternary", clip, OVER[how]).dequantize(), inside(x, clip))
        elif first.startswith("asym"):
            y = straight_through(codes_of(x, int(first[4:]), clip, OVER[how]).dequantize(), inside(x, clip))
        elif how == "layer":
            y = rounded_through(x, int(first[3:]), clip)
        else:
            y = straight_through(symmetric(x, int(first[3:]), clip, OVER[how]), inside(x, clip))
        if gradient:
            assert gradient == ["grad-of-sum-of-squares"]
            (y,) = torch.autograd.grad(y.square().sum(), x)
        results[name] = y.detach()
    return results


def model_pass(case: Case) -> dict[str, Tensor]:
    config, state = case.config, case.state_dict()
    teacher, student = (bert(config, state, prefix) for prefix in ("teacher.", "student."))
    check_parameters(case, nn.ModuleList([teacher, student]))
    given = case.inputs()
    shown = torch.arange(given["ids"].shape[1]) < given["lengths"][:, None]
    batch = {"input_ids": given["ids"], "token_type_ids": given["segments"], "attention_mask": shown.long()}
    method = TeacherIntervention(clip=config["clip_val"])
    weights = dict(student.named_parameters())
    trained = prepare(student, method, batch, lambda name: is_quantized(name, config))
    trained.model.train()
    with torch.no_grad():
        wanted = run_parts(parts_of(teacher, trained.places), batch)
    found = run_parts(trained.parts, batch, kind=KIND[config["mode"]], teacher=wanted)
    each = losses(found, wanted)
    each["total"].backward()
    results = {
        "teacher_logits": wanted.output.logits,
        "logits": found.output.logits,
        "last_hidden": found.hidden[-1],
        "probs0": found.maps[0],
        "losses": torch.stack([each[name] for name in ("output", "hidden", "attended", "scores", "total")]),
    }
    for name in case.outputs:
        if name.startswith("grad_norm/"):
            layer = trained.layers.get(name.removeprefix("grad_norm/").removesuffix(".weight"))
            weight = layer.weight if layer else weights[name.removeprefix("grad_norm/")]
            results[name] = weight.grad.norm()[None]
    return {name: value.detach() for name, value in results.items()}


def bert(config: dict[str, Any], state: dict[str, Tensor], prefix: str) -> Any:
    """transformers' classifier with the weights under a prefix; clip buffers are the config's `clip_val`."""
    from transformers import BertConfig, BertForSequenceClassification

    names = BertConfig().to_dict()
    given = {name: value for name, value in config.items() if name in names}
    model = BertForSequenceClassification(BertConfig(**given, num_labels=config["num_labels"])).eval()
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    clips = {key for key in own if "clip_" in key.rpartition(".")[2]}
    for key in clips:
        assert own[key].allclose(torch.tensor([-config["clip_val"], config["clip_val"]]))
    model.load_state_dict({key: value for key, value in own.items() if key not in clips})
    return model


def is_quantized(name: str, config: dict[str, Any]) -> bool:
    """What the published flags switch on; the attention's last layer follows `qkv_q` alone."""
    if name.endswith("attention.output.dense"):
        return config["qkv_q"]
    if name.endswith("attention.self"):
        return True  # its products are always rounded
    flags = {"attention.self": "qkv_q", "intermediate.dense": "ffn_q_1", "output.dense": "ffn_q_2"}
    flags |= {"word_embeddings": "emb_q", "pooler.dense": "cls_q"}
    flag = next((flag for part, flag in flags.items() if part in name), None)
    return flag is not None and config["quantize"] and config[flag]
