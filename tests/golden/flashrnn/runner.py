import torch
from golden.harness import Case
from torch import Tensor

from tersor.kernels.constrint import ValueHeuristic, ValueRefinement, parse_expression, propagated, solve_constrint
from tersor.kernels.flashrnn import flashrnn


def run(case: Case) -> dict[str, Tensor]:
    if "solves" in case.config:
        return solve(case)
    inputs = {name: value.requires_grad_() for name, value in case.inputs().items()}
    states0 = inputs.get("states0")
    states, last = flashrnn(inputs["Wx"], inputs["R"], inputs["b"], states0, function=case.config["function"])
    h = states[0].contiguous()
    loss = (h * torch.arange(h.numel(), dtype=h.dtype).sin().view_as(h)).sum()
    loss.backward()
    results = {"states": states, "last_states": last, "loss": loss[None]}
    for name, value in inputs.items():
        assert value.grad is not None
        results |= {f"grad_{name}": value.grad, f"grad_{name}_norm": value.grad.norm()[None]}
    return {name: results[name].detach() for name in case.outputs}


def solve(case: Case) -> dict[str, Tensor]:
    checksums = []
    for problem in case.config["solves"]:
        constraint, variables = parse_expression(problem["constraints"])
        refinements = _refinements(problem["order"], problem["largest_first"])
        solutions = solve_constrint(constraint, variables, refinements)
        solution = solutions[0] if solutions else None
        assert solution == problem["first_solution"]
        domains = propagated(constraint, variables)
        for name, published in problem["domains_after_propagation"].items():
            check_domain(
                domains[name].values if domains else (), published, None if solution is None else solution[name]
            )
        ranked = enumerate(problem["order"], 1)
        checksums.append(-1 if solution is None else sum(i * solution[name] for i, name in ranked))
    for problem in case.config["documented_enumeration"]:
        constraint, variables = parse_expression(problem["constraints"])
        refinements = _refinements(problem["order"], [])
        expected = problem["all_solutions_in_order"]
        assert list(solve_constrint(constraint, variables, refinements, num_solutions=100)) == expected
        assert list(solve_constrint(constraint, variables, refinements, exclude_solutions=expected[:1])) == [
            problem["excluding_first"]
        ]
    return {"first_solution_checksum": torch.tensor(checksums, dtype=torch.float64)}


def check_domain(ours: tuple[int, ...] | None, published: list, solved: int | None) -> None:
    """The published propagation is not complete: ours may leave less, but never without the solution."""
    if published and published[-1] == "range":
        assert ours is None or all(published[0] <= value <= published[1] for value in ours)
    else:
        assert ours is not None
        assert set(ours) <= set(published)
    assert solved is None or ours is None or solved in ours


def _refinements(order: list[str], largest_first: list[str]) -> list[ValueRefinement]:
    return [
        ValueRefinement(name, ValueHeuristic.LARGEST_FIRST if name in largest_first else ValueHeuristic.SMALLEST_FIRST)
        for name in order
    ]
