"""Hypothesis strategies for symmetric matrices whose pseudo-inverse is known in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from cases import Symmetric, from_spectrum, orthogonal
from hypothesis import strategies as st

SCALES = {"float64": 20.0, "float32": 12.0}  # powers of ten either side of one


class Drawn(NamedTuple):
    """A drawn matrix with a cut-off in a gap of its spectrum.

    Attributes
    ----------
    matrix : ndarray
        The matrix, in the dtype asked for.
    pinv : ndarray
        Its exact pseudo-inverse at the cut-off, in float64.
    rtol : float
        The relative cut-off. Kept eigenvalues lie above it by a factor, dropped ones below.
    rank : int
        How many eigenvalues are kept.
    definite : bool
        Whether all are kept and positive.
    condition : float
        Largest over smallest kept eigenvalue.
    tolerance : float
        What rounding the matrix can do to the pseudo-inverse, relative to its norm.
    """

    matrix: np.ndarray
    pinv: np.ndarray
    rtol: float
    rank: int
    definite: bool
    condition: float
    tolerance: float


def _cut(spectrum: np.ndarray, eps: float) -> tuple[int, float]:
    """How many eigenvalues to keep, and a cut-off in the middle of the gap below them."""
    n = spectrum.size
    magnitude = np.abs(spectrum)
    top = float(np.max(magnitude, initial=0.0))
    if top == 0.0:
        return 0, 1e3 * n * eps
    relative = np.append(magnitude / top, 0.0)
    noise = 16 * n * eps  # what rounding makes of an eigenvalue that is zero
    kept, rtol, best = 0, 2.0, 0.0
    for position in range(1, n + 1):
        above, below = float(relative[position - 1]), max(float(relative[position]), noise)
        if above / below > best:
            kept, rtol, best = position, math.sqrt(above * below), above / below
    return kept, rtol


@st.composite
def spectra(draw: st.DrawFn, dtype: str = "float64", *, indefinite: bool = False, max_size: int = 12) -> np.ndarray:
    """Eigenvalues by falling magnitude, of drawn number, rank, scale and condition number."""
    n = draw(st.integers(0, max_size), label="n")
    rank = draw(st.integers(0, n), label="rank")
    limit = SCALES[dtype]
    scale = 10.0 ** draw(st.floats(-limit, limit), label="log10 of the scale")
    decades = draw(st.floats(0.0, 12.0), label="log10 of the condition number")
    shape = draw(st.sampled_from(["even", "steps", "free"]), label="how the eigenvalues fall")
    if shape == "even":
        exponents = np.linspace(0.0, decades, rank)
    elif shape == "steps":
        exponents = np.where(np.arange(rank) < draw(st.integers(0, rank)), 0.0, decades)
    else:
        exponents = np.sort(
            np.asarray(draw(st.lists(st.floats(0.0, decades), min_size=rank, max_size=rank)), dtype=float)
        )
    values = np.zeros(n)
    values[:rank] = scale * 10.0**-exponents
    if indefinite:
        values *= np.asarray(draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=n, max_size=n)), dtype=float)
    return values


@st.composite
def symmetric(draw: st.DrawFn, dtype: str = "float64", *, indefinite: bool = False, max_size: int = 12) -> Drawn:
    """Positive-semidefinite (or indefinite) matrices in a random or in the standard basis."""
    spectrum = draw(spectra(dtype, indefinite=indefinite, max_size=max_size))
    n = spectrum.size
    seed = draw(st.integers(0, 2**16), label="seed of the basis")
    if draw(st.booleans(), label="diagonal"):
        basis = np.eye(n)[np.random.default_rng(seed).permutation(n)]
        made = Symmetric((basis * spectrum) @ basis.T, spectrum, basis)
    else:
        made = from_spectrum(spectrum, seed)
    eps = float(np.finfo(dtype).eps)
    kept, rtol = _cut(spectrum, eps)
    magnitude = np.abs(spectrum)
    condition = float(magnitude[0] / magnitude[kept - 1]) if kept else 1.0
    gap = float(magnitude[kept - 1] - magnitude[kept]) / float(magnitude[kept - 1]) if 0 < kept < n else 1.0
    return Drawn(
        matrix=made.matrix.astype(dtype),
        pinv=made.pinv(rtol),
        rtol=rtol,
        rank=kept,
        definite=kept == n and bool(np.all(spectrum > 0)),
        condition=condition,
        tolerance=64 * max(n, 1) * eps * condition / gap,
    )


def positive_semidefinite(dtype: str = "float64", max_size: int = 12) -> st.SearchStrategy[Drawn]:
    """Positive-semidefinite matrices."""
    return symmetric(dtype, max_size=max_size)


def indefinite(dtype: str = "float64", max_size: int = 12) -> st.SearchStrategy[Drawn]:
    """Symmetric matrices with eigenvalues of either sign."""
    return symmetric(dtype, indefinite=True, max_size=max_size)


def rotations(n: int) -> st.SearchStrategy[np.ndarray]:
    """Orthogonal matrices."""
    return st.integers(0, 2**16).map(lambda seed: orthogonal(np.random.default_rng(seed), n))
