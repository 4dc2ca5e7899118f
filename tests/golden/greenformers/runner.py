"""The factorizer (auto-*, svd-*, snmf-*) and Linformer."""

import warnings

import torch
from golden.harness import Case, capture, check_parameters, run_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tersor.layers.led import LED
from tersor.methods.structure.factorize import factorize, nmf, snmf
from tersor.models.text.linformer import Attention, LinformerConfig

TOLERANCE = {
    "product": 1e-3,  # the published SVD is randomized: its product is that far from the optimum, its error is not
    "y": 2e-4,  # reversible blocks whose streams grow: the published float32 is 8e-5 from our float64
}


def run(case: Case) -> dict[str, Tensor]:
    if "class" in case.config:
        return linformer(case)
    if "net" in case.config:
        return auto(case)
    return one_layer(case) if "in_features" in case.config else non_negative(case)


def arguments(case: Case) -> dict[str, object]:
    given = {key: case.config[key] for key in ("num_iter", "fact_led_unit", "deepcopy") if key in case.config}
    return {"rank": case.config["rank"], **given}


class Block(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.c1d = nn.Linear(d, h), nn.Linear(h, d, bias=False), Conv1D(2 * d, d)


class Net(nn.Module):
    def __init__(self, d: int, h: int, ch: int) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(3, ch, 3, padding=1)
        self.conv2b = nn.Conv2d(ch, 2 * ch, 3, stride=2, padding=1, bias=False)
        self.conv1 = nn.Conv1d(2 * ch, d, 5, padding=2)
        self.block = Block(d, h)
        self.small, self.head = nn.Linear(4, 4), nn.Linear(2 * d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2b(self.conv2(x).relu()).relu()
        x = self.conv1(x.flatten(2)).transpose(1, 2)  # tokens
        x = x + self.block.fc2(F.gelu(self.block.fc1(x)))
        return self.head(self.block.c1d(x).mean(1))


class Whole(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.net = Net(**sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def auto(case: Case) -> dict[str, Tensor]:
    model: nn.Module = Whole(**case.config["net"])
    before = sum(p.numel() for p in model.parameters())
    assert before == case.config.get("parameters_before", before)
    listed = case.config.get("submodules")
    submodules = None if listed is None else [model.get_submodule(name) for name in listed]
    solver = case.config.get("solver", "random")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are kept
        model = factorize(model, solver=solver, submodules=submodules, **arguments(case))
    for name, kind in case.config["layers"].items():
        assert type(model.get_submodule(name)).__name__ == kind, f"{name} should be {kind}"
    check_parameters(case, model)
    model.load_state_dict(case.state_dict())
    return {"y": capture(model.eval(), [""], case.inputs())[""]}


@torch.no_grad()
def one_layer(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs(), case.config
    layer = nn.Linear(config["in_features"], config["out_features"])
    layer.weight.copy_(inputs["weight"])
    layer.bias.copy_(inputs["bias"])
    lower = factorize(layer, solver=config["solver"], **arguments(case))
    assert isinstance(lower, LED)
    product = lower.led_unit[1].weight @ lower.led_unit[0].weight
    error = (inputs["weight"].double() - product.double()).norm().reshape(1)
    case.check("y", lower(inputs["x"]), 1e-3)
    return {"product": product, "error": error, "optimal_error": error}


def non_negative(case: Case) -> dict[str, Tensor]:
    start = {name: value.double() for name, value in case.inputs().items()}
    rounds = case.config["num_iter"]
    results: dict[str, Tensor] = {}
    for name, solve, weight in (("snmf", snmf, start["weight"]), ("nmf", nmf, start["weight"].abs())):
        W, H, errors = solve(weight.t(), start["w0"], start["h0"], rounds)
        results |= {f"{name}_W": W, f"{name}_H": H, f"{name}_errors": torch.tensor(errors)}
    return results


def linformer(case: Case) -> dict[str, Tensor]:
    config = {key: value for key, value in case.config.items() if key != "class"}
    inputs = case.inputs()
    if case.config["class"] == "LinformerSelfAttention":
        layer = Attention(LinformerConfig(**config)).eval()
        layer.load_state_dict(case.state_dict())
        return {"y": capture(layer, [""], inputs)[""]}
    if case.config["class"] == "LinformerLM":
        return run_model(case, "linformer_lm", config=config, inputs={"input_ids": inputs["ids"]})
    return run_model(case, "linformer", config=config)
