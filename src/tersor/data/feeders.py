"""Two published test feeders for service restoration: IEEE's of 13 and of 123 nodes (Kersting, 1991, DOI 10.1109/59.119237).

    feeder = ieee13()                       # a tersor.data.restoration.Feeder; names: NODES_13
    feeder = ieee123(loads=0.8 * ones)      # NODES_123; loads: a factor for each node's

Lines, loads and capacitors are those of the published tables, as a balanced equivalent: positive-sequence impedances, three
phases' loads as one, loads of constant power; a line of one phase counts three times, of two phases one and a half times, which
keeps its drop and its loss. Charging currents and regulators are left out; the spread load on 632-671 is at its ends. Per unit of
10 MVA and 4.16 kV.

What the tables do not say is ours: which generators still run, together smaller than the load (13: 1.8 MW at 650, 1.2 MW at
680; 123: 1.3 MW at 149, 0.7 MW at 83, 0.5 MW at 300), that every line of the smaller feeder has a switch, and which lines of the
larger do: six published switches, the two ties 151-300 and 54-94, and eight lines more (ADDED_123).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tersor.data.restoration import Feeder
from tersor.errors import TersorError

BASE_MVA, BASE_KV = 10.0, 4.16
OHM = BASE_MVA / BASE_KV**2  # per unit of one ohm
MILE = 5280.0

# ohm a mile, of the balanced equivalent
_CODES_13 = {
    601: (0.1860, 0.5967),
    602: (0.5921, 0.7603),
    603: (1.5 * 1.1200, 1.5 * 0.8929),  # two phases
    604: (1.5 * 1.1200, 1.5 * 0.8929),
    605: (3 * 1.3292, 3 * 1.3475),  # one phase
    606: (0.4874, 0.4151),
    607: (3 * 1.3425, 3 * 0.5124),
}
_TRANSFORMER_13 = (0.011 * BASE_MVA / 0.5, 0.02 * BASE_MVA / 0.5)  # 500 kVA, per unit
_LINES_13 = (  # from, to, feet, code
    (650, 632, 2000, 601),
    (632, 645, 500, 603),
    (645, 646, 300, 603),
    (632, 633, 500, 602),
    (633, 634, 0, 0),  # the transformer
    (632, 671, 2000, 601),
    (671, 680, 1000, 601),
    (671, 684, 300, 604),
    (684, 652, 800, 607),
    (684, 611, 300, 605),
    (671, 692, 0, 601),  # the published switch
    (692, 675, 500, 606),
)
NODES_13 = (650, 632, 645, 646, 633, 634, 671, 680, 684, 652, 611, 692, 675)
# kW and kvar of all phases; capacitors (675: 600 kvar, 611: 100 kvar) are deducted
_LOADS_13 = {
    632: (100, 58),
    634: (400, 290),
    645: (170, 125),
    646: (230, 132),
    652: (128, 86),
    671: (1155 + 100, 660 + 58),
    675: (843, 462 - 600),
    692: (170, 151),
    611: (170, 80 - 100),
}

# ohm in 1000 feet: three phases (codes 1 to 6), cable (12), one phase (9 to 11), two phases (7, 8)
_OVERHEAD, _CABLE, _ONE, _TWO = (
    (0.0580, 0.1188),
    (0.1921, 0.0949),
    (3 * 0.2517, 3 * 0.2552),
    (1.5 * 0.0580, 1.5 * 0.1188),
)
# node, node, feet; by kind
_THREE_123 = (
    "149 1 400, 1 7 300, 7 8 200, 8 13 300, 13 18 825, 18 21 300, 21 23 250, 23 25 275, 25 28 200, 28 29 300, 29 30 350, "
    "30 250 200, 35 40 250, 40 42 250, 42 44 200, 44 47 250, 47 48 150, 47 49 250, 49 50 250, 50 51 250, 51 151 500, "
    "52 53 200, 53 54 125, 54 55 275, 54 57 350, 55 56 275, 57 60 750, 60 61 550, 67 72 275, 67 97 250, 72 76 200, 76 77 400, "
    "76 86 700, 77 78 100, 78 79 225, 78 80 475, 80 81 175, 81 82 250, 82 83 250, 86 87 450, 87 89 275, 89 91 225, 91 93 225, "
    "93 95 300, 97 98 275, 98 99 550, 99 100 300, 100 450 800, 197 101 250, 101 105 275, 105 108 325, 108 300 1000, "
    "135 35 375, 152 52 400, 160 67 350"
)
_CABLES_123 = "60 62 250, 62 63 175, 63 64 350, 64 65 425, 65 66 325"
_ONE_123 = (
    "1 2 175, 1 3 250, 3 4 200, 3 5 325, 5 6 250, 8 12 225, 8 9 225, 9 14 425, 13 34 150, 14 11 250, 14 10 250, 15 16 375, "
    "15 17 350, 18 19 250, 19 20 325, 21 22 525, 23 24 550, 26 31 225, 27 33 500, 31 32 300, 34 15 100, 36 37 300, 36 38 250, "
    "38 39 325, 40 41 325, 42 43 500, 44 45 200, 45 46 300, 57 58 250, 58 59 250, 67 68 200, 68 69 275, 69 70 325, 70 71 275, "
    "72 73 275, 73 74 350, 74 75 400, 81 84 675, 84 85 475, 87 88 175, 89 90 250, 91 92 300, 93 94 275, 95 96 200, "
    "101 102 225, 102 103 325, 103 104 700, 105 106 225, 106 107 575, 108 109 450, 109 110 300, 110 111 575, 110 112 125, "
    "112 113 525, 113 114 325"
)
_TWO_123 = "25 26 350, 26 27 275, 35 36 650"
SWITCHES_123 = ((150, 149), (13, 152), (18, 135), (60, 160), (97, 197), (61, 610), (151, 300), (54, 94))
ADDED_123 = ((18, 21), (44, 47), (54, 57), (67, 72), (76, 77), (76, 86), (101, 105), (81, 82))
_TRANSFORMER_123 = (0.0127 * BASE_MVA / 0.15, 0.0272 * BASE_MVA / 0.15)  # 150 kVA at 61-610, per unit
# Nodes with a load of one phase: 40 kW and 20 kvar, or half of it
_FULL_123 = (
    "1 4 6 9 11 16 19 20 22 24 28 29 30 33 34 35 37 43 50 52 53 62 63 69 71 73 74 75 77 79 80 82 85 87 88 90 92 94 98 99 100 "
    "103 104 106 107 109 113"
)
_HALF_123 = "2 5 7 10 12 17 31 32 38 39 41 42 45 46 51 55 56 58 59 60 68 70 83 84 86 95 96 102 111 112 114"
_OTHERS_123 = {
    47: (105, 75),
    48: (210, 150),
    49: (140, 95),
    64: (75, 35),
    65: (140, 100),
    66: (75, 35),
    76: (245, 180),
}
_CAPACITORS_123 = {83: 600, 88: 50, 90: 50, 92: 50}  # kvar


def _lines(text: str) -> list[tuple[int, int, float]]:
    parts = (each.split() for each in text.split(", "))
    return [(int(a), int(b), float(feet)) for a, b, feet in parts]


_LINES_123: list[tuple[int, int, float, tuple[float, float]]] = [
    (a, b, feet, kind)
    for text, kind in ((_THREE_123, _OVERHEAD), (_CABLES_123, _CABLE), (_ONE_123, _ONE), (_TWO_123, _TWO))
    for a, b, feet in _lines(text)
]
NODES_123 = tuple(sorted({n for a, b, *_ in _LINES_123 for n in (a, b)} | {n for pair in SWITCHES_123 for n in pair}))


def loads_123() -> dict[int, tuple[float, float]]:
    """kW and kvar of each node with a load; capacitors apart."""
    loads: dict[int, tuple[float, float]] = {int(node): (40, 20) for node in _FULL_123.split()}
    return loads | {int(node): (20, 10) for node in _HALF_123.split()} | _OTHERS_123


def ieee13(*, loads: Sequence[float] = ()) -> Feeder:
    """loads: a factor for the load of each of NODES_13; none: 1."""
    lines = [
        (a, b, *(_TRANSFORMER_13 if not code else (z * feet / MILE * OHM for z in _CODES_13[code])))
        for a, b, feet, code in _LINES_13
    ]
    return _feeder(NODES_13, lines, _LOADS_13, loads, {650: (0.18, 0.12), 680: (0.12, 0.08)}, fixed=set())


def ieee123(*, loads: Sequence[float] = ()) -> Feeder:
    """loads: a factor for the load of each of NODES_123; none: 1."""
    lines: list[tuple[int, int, float, float]] = [
        (a, b, r * feet / 1000 * OHM, x * feet / 1000 * OHM) for a, b, feet, (r, x) in _LINES_123
    ]
    fixed = {n for n, (a, b, *_) in enumerate(lines) if (a, b) not in ADDED_123}
    lines += [(a, b, *(_TRANSFORMER_123 if b == 610 else (0.0, 0.0))) for a, b in SWITCHES_123]
    needed = loads_123()
    net = {n: (needed.get(n, (0, 0))[0], needed.get(n, (0, 0))[1] - _CAPACITORS_123.get(n, 0)) for n in NODES_123}
    sources = {149: (0.13, 0.09), 83: (0.07, 0.06), 300: (0.05, 0.04)}
    return _feeder(NODES_123, lines, net, loads, sources, fixed=fixed)


def _feeder(
    nodes: Sequence[int],
    lines: Sequence[tuple[int, int, float, float]],
    needed: Mapping[int, tuple[float, float]],
    factors: Sequence[float],
    sources: Mapping[int, tuple[float, float]],
    *,
    fixed: set[int],
) -> Feeder:
    if len(factors) not in (0, len(nodes)):
        raise TersorError(f"there are {len(factors)} factors for the loads of {len(nodes)} nodes")
    place, factors = {node: n for n, node in enumerate(nodes)}, factors or [1.0] * len(nodes)
    P, Q = (
        [needed.get(node, (0, 0))[part] * factors[n] / 1000 / BASE_MVA for n, node in enumerate(nodes)]
        for part in (0, 1)
    )
    return Feeder(
        load_p=tuple(P),
        load_q=tuple(Q),
        switches=tuple((place[a], place[b]) for a, b, *_ in lines),
        r=tuple(r for _, _, r, _ in lines),
        x=tuple(x for _, _, _, x in lines),
        sources=tuple((place[node], p, q) for node, (p, q) in sources.items()),
        fixed=tuple(sorted(fixed)),
        losses=True,
    )
