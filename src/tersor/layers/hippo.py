"""Initial values of state space models: HiPPO matrices, their diagonalisations, and the diagonal approximations.

x' = A x + B u with N states. HiPPO (arXiv 2008.07669) chooses A, B so that x holds the coefficients of the past input
in a basis of functions: scaled Legendre polynomials ("legs"), a sliding window of Legendre ("legt") or Fourier
("fourier") functions. A + P P^T is normal for a P of rank 1 or 2, so in its eigenbasis V

    A = diag(W) - P P^*        "diagonal plus low rank"; B <- V^* B, P <- V^* P

The eigenvalues W come in conjugate pairs: the N/2 with Im W <= 0 are kept. Eigenvectors have arbitrary phases, so B and
P are fixed only up to one phase per state; B conj(P) is fixed.

Everything here is NumPy in double precision: it runs once, on the CPU, also while a model is built on the meta device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.errors import TersorError

Real = NDArray[np.float64]
Complex = NDArray[np.complexfloating[Any, Any]]

_DIAGONAL = ("lin", "inv", "inv2", "quad", "real", "legs")
_MIXTURES = {"hippo": ("legs", "fourier"), "diag": ("diag-inv", "diag-lin")}  # equal parts of the copies


def hippo_matrices(measure: str, N: int) -> tuple[Real, Real]:
    """A [N, N] and B [N, 1] in the basis of the measure."""
    n = np.arange(N)
    if measure == "legs":
        R = np.sqrt(2 * n + 1.0)
        return -np.tril(R[:, None] * R, -1) - np.diag(n + 1.0), R[:, None]
    if measure == "legt":
        R = np.sqrt(2 * n + 1.0)
        sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        return -0.5 * R[:, None] * R * sign, 0.5 * R[:, None]
    if measure in ("fourier", "fout"):
        frequencies = np.stack([np.zeros(N // 2), np.arange(N // 2)], -1).reshape(-1)[1:]  # 0, 1, 0, 2, ..., 0
        B = np.where(n % 2 == 0, np.sqrt(2.0), 0.0)
        B[0] = 1.0
        rotation = np.pi * (np.diag(frequencies, -1) - np.diag(frequencies, 1))
        return rotation - B[:, None] * B, B[:, None]
    raise TersorError(f"no HiPPO measure is named {measure!r}; there are legs, legt, fourier and fout")


def low_rank_correction(measure: str, N: int, rank: int) -> Real:
    """P [rank, N] for which A + P^T P is normal; rows beyond the needed rank are zero."""
    n = np.arange(N)
    if measure == "legs":
        P = np.sqrt(n + 0.5)[None]
    elif measure == "legt":
        R = np.sqrt(n + 0.5)
        P = np.stack([np.where(n % 2 == odd, R, 0.0) for odd in (1, 0)])
    else:
        P = hippo_matrices(measure, N)[1].T
    if rank < len(P):
        raise TersorError(f"the measure {measure!r} needs rank {len(P)}, not {rank}")
    return np.concatenate([P, np.zeros((rank - len(P), N))])


def diagonalized_hippo(measure: str, N: int, rank: int = 1) -> tuple[Complex, Complex, Complex]:
    """W [N/2], P [rank, N/2], B [N/2]: the measure in the eigenbasis, one state of each conjugate pair."""
    A, B = hippo_matrices(measure, N)
    P = low_rank_correction(measure, N, rank)
    normal = A + P.T @ P  # a multiple of I plus a skew-symmetric matrix
    imaginary, V = np.linalg.eigh(-1j * (normal - np.diag(np.diag(normal))))  # ascending
    W, V = np.diag(normal).mean() + 1j * imaginary[: N // 2], V[:, : N // 2]
    if abs(W[-1].imag) < 1e-4:  # the pair at 0 shares an eigenspace: take the published vector
        V[:, -1] = 0.0
        V[:2, -1] = 2**-0.5, 2**-0.5 * 1j
    return W, P @ V.conj(), B[:, 0] @ V.conj()


def diagonal_spectrum(init: str, N: int) -> Complex:
    """A [N/2] of the diagonal initialisations (arXiv 2206.11893): S4D-Lin, -Inv, -Inv2, -Quad, -Real and -LegS."""
    if init not in _DIAGONAL:
        raise TersorError(f"no diagonal initialisation is named {init!r}; there are {', '.join(_DIAGONAL)}")
    n = np.arange(N // 2)
    if init == "real":
        return -(n + 1.0) + 0j
    imaginary = {
        "lin": np.pi * n,
        "inv": N / np.pi * (N / (2 * n + 1) - 1),
        "inv2": N / np.pi * (N / (n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / np.pi,
    }
    if init == "legs":
        return -0.5 + 1j * diagonalized_hippo("legs", N)[0].imag
    return -0.5 - 1j * imaginary[init]


def initial_state_space(
    init: str, N: int, *, rank: int = 1, copies: int = 1, B_init: str = "constant"
) -> tuple[Complex, Complex, Complex]:
    """A [copies, N/2], P [rank, copies, N/2], B [copies, N/2].

    init: a HiPPO measure; "diag-X" with X of lin, inv, inv2, quad, real, legs (P = 0); "dplr-X", the same with a random
    P; "hippo" or "diag": equal numbers of copies of legs and fourier, or of diag-inv and diag-lin.
    B_init is for the diagonal ones other than legs: constant (1), random, alternating (+1, -1), unit-cw or unit-ccw.
    """
    if init in _MIXTURES:
        parts = _MIXTURES[init]
        if copies % len(parts):
            raise TersorError(f"init {init!r} mixes {len(parts)} kinds, so n_ssm must divide by that; it is {copies}")
        of_each = copies // len(parts)
        made = [initial_state_space(part, N, rank=rank, copies=of_each, B_init=B_init) for part in parts]
        return (
            np.concatenate([A for A, _, _ in made]),
            np.concatenate([P for _, P, _ in made], 1),
            np.concatenate([B for _, _, B in made]),
        )
    kind, _, name = init.partition("-")
    if kind in ("diag", "dplr"):
        W = diagonal_spectrum(name, N)
        scale = 1.0 if kind == "dplr" else 0.0
        P = scale * _complex_normal(rank, N // 2)
        B = diagonalized_hippo("legs", N)[2] if name == "legs" else _input_vector(B_init, N // 2)
    else:
        W, P, B = diagonalized_hippo(init, N, rank)
    B = B.real + 1j * B.imag.clip(-2, 2)
    return np.tile(W, (copies, 1)), np.repeat(P[:, None], copies, 1), np.tile(B, (copies, 1))


def _input_vector(B_init: str, n: int) -> Complex:
    k = np.arange(n)
    if B_init == "constant":
        return np.ones(n) + 0j
    if B_init == "random":
        return _complex_normal(n)
    if B_init == "alternating":
        return (-1.0) ** k + 0j
    if B_init in ("unit-cw", "unit-ccw"):
        unit: Complex = np.exp((-2j if B_init == "unit-cw" else 2j) * np.pi * k / n)
        return unit
    known = "constant, random, alternating, unit-cw and unit-ccw"
    raise TersorError(f"no B_init is named {B_init!r}; there are {known}")


def _complex_normal(*shape: int) -> Complex:
    """Standard complex normal numbers, from torch's generator, so that torch.manual_seed decides them."""
    import torch

    return np.asarray(torch.randn(*shape, dtype=torch.complex128, device="cpu"))
