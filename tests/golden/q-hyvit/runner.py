"""One layer or product at a time, as PTQ4ViT's classes quantize it with the settings of Q-HyViT; all in float64."""

from golden.harness import Case
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.formats.twin_grid import GELU_MINIMUM, GeluGrid, SplitGrid
from tersor.methods.activations.interval_search import (
    MapGrids,
    MapProblem,
    ProductGrids,
    ProductProblem,
    Record,
    Search,
    symmetric_steps,
)

EXACT = 5e-7  # what float32 keeps of the expected values


def run(case: Case) -> dict[str, Tensor]:
    kinds = {"linear": linear, "conv": convolution, "matmul": product, None: twins}
    for name, value in kinds[case.config.get("kind")](case).items():
        case.check(name, value, EXACT)
    return {}


def search_of(case: Case) -> Search:
    assert case.config["metric"] == "hessian"
    return Search(case.config["eq_alpha"], case.config["eq_beta"], case.config["eq_n"], case.config["search_round"])


def linear(case: Case) -> dict[str, Tensor]:
    given = {name: value.double() for name, value in case.inputs().items()}
    config, layer = case.config, nn.Linear(*reversed(given["weight"].shape)).double()
    layer.weight.data, layer.bias.data = given["weight"], given["bias"]
    x = given["x"] * given["chan"]
    blocks = (config["n_V"], config["n_H"])
    first, found, y = solve(case, layer, x, given["grad"], blocks, config["n_a"])
    shape = (config["n_V"], 1, config["n_H"], 1)
    return {
        "w_interval_minmax": first.weight.view(shape),
        "w_interval": found.weight.view(shape),
        "a_interval_minmax": first.input.scale.view(-1, 1),
        "a_interval": found.input.scale.view(-1, 1),
        "y": y,
    }


def convolution(case: Case) -> dict[str, Tensor]:
    given = {name: value.double() for name, value in case.inputs().items()}
    config, weight = case.config, given["weight"]
    groups = config["groups"]
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        config["kernel"],
        config["stride"],
        config["padding"],
        groups=groups,
    ).double()
    layer.weight.data, layer.bias.data = weight, given["bias"]
    x = given["x"] * given["chan"][:, None, None]
    first, found, y = solve(case, layer, x, given["grad"], (len(weight), 1), 1)
    shape = (1, -1, 1, 1) if groups > 1 else (1,)
    return {
        "w_interval_minmax": first.weight.view(-1, 1, 1, 1),
        "w_interval": found.weight.view(-1, 1, 1, 1),
        "a_interval_minmax": first.input.scale.view(shape),
        "a_interval": found.input.scale.view(shape),
        "y": y,
    }


def solve(
    case: Case, layer: nn.Module, x: Tensor, gradient: Tensor, blocks: tuple[int, int], input_blocks: int
) -> tuple[MapGrids, MapGrids, Tensor]:
    channelwise = case.config.get("groups", 1) > 1
    record = Record((x,), layer(x).detach(), gradient)
    problem = MapProblem(layer, [record], case.config["w_bit"], case.config["a_bit"], input_blocks)
    input = problem.first_input(channelwise=channelwise, zero_point=False)
    first = problem.start(input, channelwise=channelwise, blocks=blocks)
    found = problem.rounds(first, first, search_of(case))
    return first, found, problem.quantized(found, x).detach()


def product(case: Case) -> dict[str, Tensor]:
    given = {name: value.double() for name, value in case.inputs().items()}
    a, b = given["a"], given["b"]
    if case.config["softmax_input"]:
        a = (2 * a).softmax(-1)
    record = Record((a, b), a @ b, given["grad"], lambda a, b: a @ b)
    problem = ProductProblem([record], (case.config["A_bit"], case.config["B_bit"]))
    first = [problem.first(operand, zero_point=False) for operand in (0, 1)]
    found = problem.rounds(first, ProductGrids((first[0], first[1])), search_of(case))
    return {
        "A_interval": found.pair[0].scale.flatten(),
        "B_interval": found.pair[1].scale.flatten(),
        "y": problem.quantized(found, record),
    }


def twins(case: Case) -> dict[str, Tensor]:
    given, results = case.inputs(), {}
    assert case.config["gelu_negative_min"] == GELU_MINIMUM
    for bits in case.config["bits"]:
        g, s = F.gelu(given["g"].double()), given["s"].double().softmax(-1)
        results[f"gelu{bits}"] = GeluGrid(symmetric_steps(g.max(), bits), bits).round(g)
        for name in case.outputs:
            if name.startswith(f"softmax{bits}-split2^"):
                split = 2.0 ** int(name.rpartition("^")[2])
                results[name] = SplitGrid(s.new_tensor(split), bits).round(s)
    return results
