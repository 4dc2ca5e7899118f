"""Feeders with losses and lines without switches: their physics against another power flow, and what restoration lets through."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tersor.data.feeders import NODES_13, NODES_123, SWITCHES_123, ieee13, ieee123, loads_123
from tersor.data.restoration import Feeder, Restoration, best_energy, best_order, trajectories
from tersor.errors import TersorError


def voltages(feeder: Feeder, closed: frozenset[int]) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """V and the power from each source, by the matrix Z of shared paths: V = V_0 - Z conj(S / V), until it stands still."""
    tree = feeder.tree(closed)
    place = {cell: n for n, (cell, _, _) in enumerate(tree)}
    paths: list[frozenset[int]] = []
    root = []
    for cell, parent, line in tree:
        paths.append(paths[place[parent]] | {line} if parent >= 0 else frozenset())
        root.append(root[place[parent]] if parent >= 0 else cell)
    z = np.array(feeder.r) + 1j * np.array(feeder.x)
    Z = np.array([[sum(z[n] for n in a & b) for b in paths] for a in paths])
    S = np.array([feeder.load_p[cell] + 1j * feeder.load_q[cell] for cell, _, _ in tree])
    V = np.full(len(tree), feeder.source_voltage, complex)
    for _ in range(80):
        V = feeder.source_voltage - Z @ np.conj(S / V)
    whole, given = np.zeros(len(feeder.load_p), complex), np.zeros(len(feeder.load_p), complex)
    for n, (cell, _, _) in enumerate(tree):
        whole[cell] = V[n]
        given[root[n]] += feeder.source_voltage * (S[n] / V[n])
    return whole, given


def walk(feeder: Feeder, seed: int) -> list[frozenset[int]]:
    random, run, found = np.random.default_rng(seed), Restoration(feeder), [frozenset[int]()]
    while not run.done():
        run.step(int(random.choice(np.flatnonzero(run.feasible()))))
        found.append(run.closed)
    return found


@pytest.mark.parametrize("feeder", [ieee13(), ieee123()], ids=["13", "123"])
def test_the_flow_is_that_of_another_power_flow(feeder: Feeder) -> None:
    everything = frozenset(range(len(feeder.switches)))
    for closed in (*walk(feeder, 0)[::3], everything):  # the last is overloaded
        volts, power = feeder.flow(closed)
        wanted, given = voltages(feeder, closed)
        np.testing.assert_allclose(volts, np.abs(wanted), atol=1e-8)
        for cell, _, _ in feeder.sources:
            np.testing.assert_allclose(power[cell], (given[cell].real, given[cell].imag), atol=1e-8)
    linear = dataclasses.replace(feeder, losses=False)
    assert (linear.flow(everything)[0] - volts).max() > 1e-4  # neglecting losses would let too much through


def test_pandapower_says_the_same() -> None:
    pp = pytest.importorskip("pandapower", reason="the extra `power`")
    feeder = ieee13()
    closed = frozenset(range(len(feeder.switches)))
    net = pp.create_empty_network(sn_mva=10)
    bus = [pp.create_bus(net, vn_kv=4.16) for _ in NODES_13]
    for cell, parent, line in feeder.tree(closed):
        pp.create_load(net, bus[cell], feeder.load_p[cell] * 10, feeder.load_q[cell] * 10)
        if parent < 0:
            pp.create_ext_grid(net, bus[cell])
        elif feeder.r[line] == 0:
            pp.create_switch(net, bus[parent], bus[cell], et="b")
        else:
            ohm = 4.16**2 / 10
            pp.create_line_from_parameters(
                net, bus[parent], bus[cell], 1.0, feeder.r[line] * ohm, feeder.x[line] * ohm, 0, 9
            )
    pp.runpp(net, numba=False)
    np.testing.assert_allclose(feeder.flow(closed)[0], net.res_bus.vm_pu, atol=1e-7)


def test_the_tables_are_the_published_ones() -> None:
    """Totals of the published load tables: 3,466 kW and 2,102 kvar; 3,490 and 1,920."""
    small, large = ieee13(), ieee123()
    assert sum(small.load_p) * 1e4 == pytest.approx(3466)
    assert sum(small.load_q) * 1e4 == pytest.approx(2102 - 700)
    assert tuple(map(sum, zip(*loads_123().values(), strict=True))) == (3490, 1920)
    assert sum(large.load_q) * 1e4 == pytest.approx(1920 - 750)
    assert len(NODES_123) == 125
    assert len(large.switches) - len(large.fixed) == len(SWITCHES_123) + 8
    for feeder in (small, large):
        assert len(feeder.tree(frozenset(range(len(feeder.switches))))) == len(feeder.load_p)  # all can be reached
    with pytest.raises(TersorError, match="2 factors for the loads of 13 nodes"):
        ieee13(loads=[1.0, 1.0])


def numbers(low: float, high: float, count: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.floats(low, high) for _ in range(count)])


@st.composite
def feeders(draw: st.DrawFn) -> Feeder:
    """Nine cells: a tree, five more lines, two sources, some lines without switches."""
    ends = [(draw(st.integers(0, n - 1)), n) for n in range(1, 9)]
    ends += [
        draw(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda pair: pair[0] != pair[1])) for _ in range(5)
    ]
    try:
        return Feeder(
            load_p=(0.0, 0.0, *draw(numbers(0, 0.4, 7))),
            load_q=(0.0, 0.0, *draw(numbers(-0.2, 0.3, 7))),
            switches=tuple(ends),
            r=draw(numbers(0, 0.1, len(ends))),
            x=draw(numbers(0, 0.1, len(ends))),
            sources=((0, 0.9, 0.5), (1, 0.7, 0.5)),
            fixed=tuple(sorted(draw(st.sets(st.integers(2, len(ends) - 1), max_size=3)))),
            losses=True,
            source_voltage=draw(st.floats(0.96, 1.04)),
        )
    except TersorError:  # a loop of fixed lines, or more load at a source than it can give
        assume(False)
        raise


@settings(max_examples=25, deadline=None, phases=(Phase.generate,))
@given(feeder=feeders(), seed=st.integers(0, 99))
def test_no_feasible_run_ever_has_a_violated_voltage(feeder: Feeder, seed: int) -> None:
    for closed in walk(feeder, seed):
        found, given = voltages(feeder, closed)
        live = [cell for cell, _, _ in feeder.tree(closed)]
        assert (np.abs(found[live]) >= 0.95 - 1e-9).all()
        assert (np.abs(found[live]) <= 1.05 + 1e-9).all()
        for cell, p, q in feeder.sources:
            assert given[cell].real <= p + 1e-9
            assert abs(given[cell].imag) <= q + 1e-9


def test_a_cell_of_many_nodes_is_energised_at_once() -> None:
    feeder = Feeder(load_p=(0, 0.1, 0.2, 0.3), load_q=(0, 0, 0, 0), switches=((0, 1), (2, 1), (2, 3)), r=(0, 0.01, 0.01),
                    x=(0, 0.01, 0.01), sources=((0, 1, 1),), fixed=(1, 2))  # fmt: skip
    run = Restoration(feeder)
    assert run.feasible().tolist() == [True, False, False]
    state, reward, done = run.step(0)
    assert reward == pytest.approx(0.6)
    assert done
    assert state[8:12].tolist() == [0.25, 0.5, 0.75, 1]  # the order of energising
    with pytest.raises(TersorError, match="close a loop with line 3"):
        dataclasses.replace(feeder, switches=(*feeder.switches, (1, 3)), r=(0,) * 4, x=(0,) * 4, fixed=(1, 2, 3))
    with pytest.raises(TersorError, match="joined without a switch"):
        dataclasses.replace(feeder, sources=((1, 1, 1), (3, 1, 1)))
    with pytest.raises(TersorError, match="names line 7"):
        dataclasses.replace(feeder, fixed=(7,))


def test_the_best_energy_is_that_of_the_best_of_all_orders() -> None:
    feeder = Feeder(load_p=(0, 0.1, 0.4, 0.3, 0.2), load_q=(0,) * 5, switches=((0, 1), (1, 2), (0, 3), (3, 4)), r=(0.01,) * 4,
                    x=(0.01,) * 4, sources=((0, 0.8, 1),))  # fmt: skip
    found = []
    for order in itertools.permutations(range(4)):
        run, total = Restoration(feeder, steps=4, energy=True), 0.0
        for switch in order:
            if run.feasible()[switch]:
                total += run.step(switch)[1]
        found.append(total)
    assert best_energy(feeder, 4) == pytest.approx(max(found))
    assert min(found) < max(found)
    data = trajectories(feeder, 30, np.random.default_rng(0), steps=4, energy=True)
    assert float(data["returns_to_go"].max()) <= max(found) + 1e-6
    assert best_order(feeder)[1] == pytest.approx(0.8)


def test_energy_is_the_load_served_at_each_step() -> None:
    feeder, total, served = ieee13(), 0.0, 0.0
    run = Restoration(feeder, steps=12, energy=True)
    first = run.served()
    while not run.done():
        total += run.step(int(np.flatnonzero(run.feasible())[-1]))[1]
        served += run.served() - first
    served += (12 - run.taken) * (run.served() - first)
    assert total == pytest.approx(served)
