"""The GPTQ reference implementation's own results: layers, grids, 3-bit words and whole models.

A case is told by its config: a `layer`, a `model`, 3-bit words (a `qweight` among the outputs), or a dictionary of grids.
"""

from __future__ import annotations

from typing import Any

import torch
from golden.harness import Case
from torch import Tensor, nn

import tersor
from tersor import GPTQ, RTN
from tersor.calibrate.hessian import Hessian
from tersor.formats.grid import Bits, ClipSearch, fit_grid
from tersor.layers.linear_map import columns_of, input_matrix, set_weight_matrix, weight_matrix
from tersor.methods.weights.gptq_solver import Solution, solve_gptq, solve_rtn

TOLERANCE = {"qweight": 0.0, "levels": 0.0, "perm": 0.0}


def run(case: Case) -> dict[str, Tensor]:
    if "layer" in case.config:
        return _layer(case)
    if "model" in case.config:
        return _model(case)
    return _packed_three_bits(case) if "qweight" in case.outputs else _grids(case)


def _layer(case: Case) -> dict[str, Tensor]:
    """In float64 the reference's numbers, in float32 the same levels but for those that the reference itself flips."""
    exact, module, hessian = _solve(case, torch.float64)
    for name, got in _layer_outputs(case, exact, module, hessian).items():
        case.check(name, got, 1e-6)
    single, *_ = _solve(case, torch.float32)
    flips = int((single.codes != exact.codes).sum())
    assert flips <= 2 * case.config["flips32"], f"{flips} levels differ in float32"
    return {"error32": torch.tensor(single.error)}


def _solve(case: Case, dtype: torch.dtype) -> tuple[Solution, nn.Module, Hessian]:
    config, inputs = case.config, case.inputs()
    module = _module(config, inputs["weight"].to(dtype))
    hessian = Hessian(columns_of(module), dtype=dtype)
    for sample in _calibration(config, inputs):
        hessian.add(*input_matrix(module, sample.to(dtype)))
    solution = solve_gptq(
        weight_matrix(module),
        hessian.matrix,
        bits="ternary" if config["trits"] else config["bits"],
        group_size=config["groupsize"],
        sym=config["sym"],
        desc_act=config["act_order"],
        static_groups=config["static_groups"],
        clip_search=ClipSearch() if config["mse"] else None,
        damp=config["percdamp"],
        block_size=config["blocksize"],
    )
    return solution, module, hessian


def _layer_outputs(case: Case, solution: Solution, module: nn.Module, hessian: Hessian) -> dict[str, Tensor]:
    original = weight_matrix(module).clone()
    set_weight_matrix(module, solution.dequantize())
    difference = original - weight_matrix(module)
    diagonal = hessian.matrix.diagonal()
    found = {
        "dequantized": module.weight.detach(),
        "scale": solution.scales,
        "zero": solution.zeros,
        "error": torch.tensor(solution.error, dtype=torch.float64),
        "hessian_diag": diagonal,
        "output_error": torch.einsum("oi,ij,oj->", difference, hessian.matrix, difference) / 2,
    }
    if case.config["act_order"]:
        order = torch.argsort(diagonal.where(diagonal != 0, 1), descending=True)
        found["perm"] = order
        if not case.config["static_groups"] and case.config["groupsize"] > 0:
            assert torch.equal(solution.g_idx, torch.argsort(order) // case.config["groupsize"])
    return {name: value for name, value in found.items() if name in case.outputs}


def _module(config: dict[str, Any], weight: Tensor) -> nn.Module:
    """The layer with this weight [out, in]."""
    rows, columns = weight.shape
    if config["layer"] == "conv2d":
        conv = config["conv"]
        module: nn.Module = nn.Conv2d(
            conv["in_channels"], rows, conv["kernel"], conv["stride"], conv["padding"], bias=False
        )
    elif config["layer"] == "conv1d":
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(rows, columns)
    else:
        module = nn.Linear(columns, rows, bias=False)
    module.to(weight.dtype)
    set_weight_matrix(module, weight)
    return module.requires_grad_(False)


def _calibration(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    """Inputs as the case's notes make them, one sample along the first axis, each with a batch axis of one."""
    z = inputs["z"].double()
    if config["layer"] == "conv2d":
        return (z + 0.6 * z.roll(-1, -1)).unsqueeze(1)
    gain = inputs["gain"].double()
    gain[config["dead"]] = 0
    shared = 0.8 * inputs["u"].double().unsqueeze(-1) * inputs["a"].double()
    return (gain * (z + 0.6 * z.roll(-1, -1) + shared)).unsqueeze(1)


def _grids(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    inputs["w"][2] = 0
    found = {}
    for name, options in case.config.items():
        x = inputs[options["src"]]
        rows, restore = _rows(x, options)
        bits: Bits = "ternary" if options.get("trits") else options["bits"]
        search = ClipSearch(options.get("norm", 2.4), options.get("grid", 100), options.get("maxshrink", 0.8))
        clip = search if options.get("mse") else None
        grid = fit_grid(rows, bits, sym=options["sym"], clip_search=clip, as_published=True)
        found[f"{name}/dequantized"] = restore(grid.round(rows))
        for parameter, values in (("scale", grid.scale), ("zero", grid.zero)):
            per_row = values.expand(len(x), 1) if options["weight"] else values.view(1, 1, -1)
            found[f"{name}/{parameter}"] = per_row
    return found


def _rows(x: Tensor, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """x with one grid a row, and the way back. Activations have one a channel: the last axis, axis 1 of images."""
    if not options["perchannel"]:
        return x.reshape(1, -1), lambda rows: rows.view(x.shape)
    if options["weight"]:
        return x.flatten(1), lambda rows: rows.view(x.shape)
    axis = 1 if x.dim() == 4 else -1
    moved = x.movedim(axis, 0)
    return moved.flatten(1), lambda rows: rows.view(moved.shape).movedim(0, axis)


def _packed_three_bits(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    solution = solve_rtn(inputs["weight"], bits=case.config["bits"], sym=case.config["sym"])
    packed = solution.pack(None)
    return {
        "qweight": packed.qweight,
        "levels": packed.codes(),
        "scales": packed.scales.t(),
        "zeros": packed.scales.t() * packed.zeros.t(),
        "y": inputs["x"] @ packed.dequantize().t() + inputs["bias"],
    }


def _model(case: Case) -> dict[str, Tensor]:
    """A whole model, block by block, in float64."""
    config, inputs = case.config, case.inputs()
    model = _llama(case)
    common: dict[str, Any] = {"bits": config["bits"], "group_size": config["groupsize"], "sym": config["sym"]}
    method = GPTQ(
        desc_act=config["act_order"],
        static_groups=config["static_groups"],
        true_sequential=config["true_sequential"],
        damp=config["percdamp"],
        **common,
    )
    samples = [{"input_ids": ids[None]} for ids in inputs["calib"][: config["nsamples"]]]
    solved = tersor.compress(model, method, calibration=samples, format=None)
    rounded = tersor.compress(model, RTN(**{**common, "group_size": -1}), calibration=samples, format=None)

    window = config["model"]["max_position_embeddings"]
    perplexities = [
        float(tersor.perplexity(each, inputs["test"][0], seq_len=window))
        for each in (model, rounded.model, solved.model)
    ]
    errors = {layer.name: layer.error for layer in solved.summary.layers}
    order = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj"]
    order += ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
    if not config["true_sequential"]:
        order = [name.removeprefix("model.layers.0.") for name, each in model.named_modules() if _in_block(name, each)]
    layers = range(config["model"]["num_hidden_layers"])
    case.check("errors", torch.tensor([errors[f"model.layers.{n}.{name}"] for n in layers for name in order]), 1e-6)
    case.check("ppl", torch.tensor(perplexities), 1e-6)
    for name in set(case.outputs) - case.compared:
        case.check(name, solved.model.get_submodule(name).weight, 1e-6)
    return {}


def _in_block(name: str, module: nn.Module) -> bool:
    return name.startswith("model.layers.0.") and isinstance(module, nn.Linear)


def _llama(case: Case) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**case.config["model"])).eval()
    model.load_state_dict(case.state_dict(), strict=True)
    return model.double()
