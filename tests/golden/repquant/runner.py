"""Quantizers as array cases; the whole pipeline step by step, and once more as a user runs it."""

import torch
from golden.harness import TOLERANCE as OF_SINGLE
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor
from tersor.calibrate.batches import call
from tersor.formats.activation_grid import fit_logarithmic, fit_uniform
from tersor.formats.grid import Grid
from tersor.methods.activations.repquant import RepQuant, fit_weights_again, reparameterize, wrap

EXACT = 5e-7  # what float32 keeps of the expected values; everything is computed in float64


def run(case: Case) -> dict[str, Tensor]:
    return quantizers(case) if "bits" in case.config else pipeline(case)


def quantizers(case: Case) -> dict[str, Tensor]:
    given = case.inputs()
    act = given["act"] * given["chan"] + given["off"]
    softmax = given["logits"].double().softmax(-1).float()
    results = {}
    for bits in case.config["bits"]:
        fits = {
            "act": (act, fit_uniform(act, bits)),
            "act-channel": (act, fit_uniform(act, bits, channel=2)),
            "linear-channel": (given["linear"], fit_uniform(given["linear"], bits, channel=0)),
            "conv-channel": (given["conv"], fit_uniform(given["conv"], bits, channel=0)),
        }
        for name, (x, grid) in fits.items():
            found = {"y": grid.round(x), "delta": grid.scale, "zero": grid.zero}
            results |= {f"b{bits}/{name}/{key}": value for key, value in found.items()}
        grid = fit_logarithmic(softmax, bits)
        results |= {f"b{bits}/softmax/y": grid.round(softmax), f"b{bits}/softmax/delta": grid.scale}
    return results


@torch.no_grad()
def pipeline(case: Case) -> dict[str, Tensor]:
    dtype = getattr(torch, case.config["dtype"])
    tolerance = EXACT if dtype == torch.float64 else OF_SINGLE
    model = tersor.models.load("vit", case.state_dict(), **case.config["model"])
    check_parameters(case, model)
    model.to(dtype)
    batch, test = ({"image": case.inputs()[name].to(dtype)} for name in ("calib", "test"))
    method = RepQuant(
        w_bits=case.config["w_bits"], a_bits=case.config["a_bits"], dual_clipping=False, reconstruct=False
    )
    as_user = tersor.compress(model, method, calibration=[batch])
    case.check("logits", call(as_user.model, test), tolerance)

    results = {"fp_logits": call(model, test)}
    places = wrap(model, method, test, lambda name: True)
    call(model, batch)
    results["initial_logits"] = call(model, test)
    for place in ("blocks.0.norm1", "blocks.0.norm2"):
        grid = input_grid(places, reader(places, place))
        results |= {f"{place}/act_delta": grid.scale, f"{place}/act_zero": grid.zero}
    reparameterize(model, places)
    fit_weights_again(places, reconstruct=False)
    for place in ("blocks.0.norm1", "blocks.0.norm2"):
        linear, norm = reader(places, place), model.get_submodule(place)
        grid = input_grid(places, linear)
        results |= {f"{place}/target": torch.stack([grid.scale, grid.zero]), f"{place}/weight": norm.weight}
        results |= {f"{place}/bias": norm.bias, f"{place}/next_bias": places.maps[linear].original.bias}
    for each in places.everything():
        each.enabled = False
    results["fp_logits_after_reparam"] = call(model, test)
    for each in places.everything():
        each.enabled = True
    results["calib_logits"] = call(model, batch)
    results["logits"] = call(model, test)
    qkv, ((weights, values),) = places.maps["blocks.0.attn.qkv"].grid, places.products["blocks.0.attn.av"].grids
    image = input_grid(places, "patch_embed.proj")
    results |= {
        "blocks.0.attn.qkv/weight_delta": qkv.scale,
        "blocks.0.attn.qkv/weight_zero": qkv.zero,
        "blocks.0.attn.matmul2/A_delta": weights.scale,
        "blocks.0.attn.matmul2/B": torch.stack([values.scale, values.zero]),
        "patch_embed/input": torch.stack([image.scale, image.zero]),
    }
    for name, value in results.items():
        case.check(name, value, tolerance)
    return {}


def reader(places, norm: str) -> str:
    (linear,) = next(pair.linears for pair in places.pairs if pair.norm == norm)
    return linear


def input_grid(places, linear: str) -> Grid:
    return places.maps[linear].input.found
