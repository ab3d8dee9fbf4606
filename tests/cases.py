"""Matrices whose pseudo-inverses are known, and the shapes to try them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

BATCH_SHAPES = [(), (1,), (0,), (7,), (2, 3), (2, 1, 3)]
SIZES = [0, 1, 2, 31, 32, 33, 64, 257]
RECTANGLES = [(5, 3), (3, 5), (4, 4), (33, 2), (1, 6), (3, 0), (0, 3)]


class Symmetric(NamedTuple):
    """A symmetric matrix made from its spectrum, and what follows from that."""

    matrix: np.ndarray
    spectrum: np.ndarray
    basis: np.ndarray

    def pinv(self, rtol: float) -> np.ndarray:
        """The pseudo-inverse with a relative cut-off, in closed form."""
        magnitude = np.abs(self.spectrum)
        kept = magnitude > rtol * np.max(magnitude, initial=0.0)
        inverse = np.divide(1.0, self.spectrum, out=np.zeros_like(self.spectrum), where=kept)
        return (self.basis * inverse) @ self.basis.T


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


def from_spectrum(spectrum: Sequence[float] | np.ndarray, seed: int = 0) -> Symmetric:
    """A symmetric matrix with the given eigenvalues in a random basis."""
    values = np.asarray(spectrum, dtype=np.float64)
    basis = orthogonal(np.random.default_rng(seed), values.size)
    matrix = (basis * values) @ basis.T
    return Symmetric((matrix + matrix.T) / 2, values, basis)


def positive_definite(batch: tuple[int, ...], n: int, seed: int = 0, condition: float = 30.0) -> np.ndarray:
    """A stack of positive-definite matrices of one condition number."""
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1.0, 1.0 / condition, n)
    stack = np.empty((*batch, n, n))
    for member in np.ndindex(*batch):
        basis = orthogonal(rng, n)
        stack[member] = (basis * spectrum) @ basis.T
    return (stack + np.swapaxes(stack, -1, -2)) / 2


def factors(batch: tuple[int, ...], m: int, n: int, rank: int, seed: int = 0) -> np.ndarray:
    """A stack of m × n matrices of the given rank, with singular values between 1 and 3."""
    rng = np.random.default_rng(seed)
    stack = np.empty((*batch, m, n))
    for member in np.ndindex(*batch):
        left, right = orthogonal(rng, m)[:, :rank], orthogonal(rng, n)[:, :rank]
        stack[member] = (left * np.linspace(3.0, 1.0, rank)) @ right.T
    return stack


def members(function: Callable[..., np.ndarray], *stacks: np.ndarray) -> np.ndarray:
    """Apply a function of single matrices to every member, in a Python loop."""
    batch = stacks[0].shape[:-2]
    results = [function(*(stack[member] for stack in stacks)) for member in np.ndindex(*batch)]
    if not results:
        # Never called: an identity of the right shape tells what the core would be.
        return np.zeros((*batch, *function(*(np.eye(*stack.shape[-2:]) for stack in stacks)).shape))
    return np.asarray(results).reshape(*batch, *results[0].shape)


class Special(NamedTuple):
    """A matrix that is not the common case, its pseudo-inverse, and whether "cholesky" may give it."""

    matrix: np.ndarray
    pinv: np.ndarray
    certified: bool


_NAN = np.full((3, 3), np.nan)


def _with(value: float, *positions: tuple[int, int]) -> np.ndarray:
    matrix = np.diag([1.0, 2.0, 4.0])
    for position in positions:
        matrix[position] = value
    return matrix


_singular = from_spectrum([1.0, 0.5, 0.0], seed=1)
_indefinite = from_spectrum([2.0, -1.0, 0.5], seed=2)
_negative = from_spectrum([-2.0, -1.0, -0.5], seed=3)
_almost = from_spectrum([1.0, 0.5, -np.finfo(np.float32).eps / 8], seed=4)
_asymmetric = np.asarray([[2.0, 1.5, 0.0], [0.5, 3.0, 1.0], [0.0, -1.0, 1.0]])

#: Every one is 3 × 3, so that they make one stack.
SPECIAL: dict[str, Special] = {
    "nan": Special(_with(np.nan, (1, 1)), _NAN, False),
    "nan off the diagonal": Special(_with(np.nan, (0, 2), (2, 0)), _NAN, False),
    "nan in the upper triangle only": Special(_with(np.nan, (0, 2)), _NAN, False),
    "all nan": Special(_NAN, _NAN, False),
    "inf": Special(_with(np.inf, (0, 0)), _NAN, False),
    "minus inf": Special(_with(-np.inf, (2, 1), (1, 2)), _NAN, False),
    "opposite infs": Special(_with(np.inf, (0, 1)) + _with(-np.inf, (1, 0)), _NAN, False),
    "singular": Special(_singular.matrix, _singular.pinv(1e-6), False),
    "zero": Special(np.zeros((3, 3)), np.zeros((3, 3)), False),
    "a zero row": Special(np.diag([1.0, 0.0, 4.0]), np.diag([1.0, 0.0, 0.25]), False),
    "all ones": Special(np.ones((3, 3)), np.ones((3, 3)) / 9, False),
    "one eigenvalue of -eps": Special(_almost.matrix, _almost.pinv(1e-6), False),
    "indefinite": Special(_indefinite.matrix, _indefinite.pinv(1e-6), False),
    "negative definite": Special(_negative.matrix, _negative.pinv(1e-6), False),
    "indefinite with a zero diagonal": Special(
        np.asarray([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        np.asarray([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        False,
    ),
    "asymmetric": Special(_asymmetric, np.linalg.inv((_asymmetric + _asymmetric.T) / 2), True),
    "repeated eigenvalues": Special(3.0 * np.eye(3), np.eye(3) / 3, True),
    "two equal eigenvalues": Special(
        np.asarray([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]),
        np.asarray([[3.0, -1.0, -1.0], [-1.0, 3.0, -1.0], [-1.0, -1.0, 3.0]]) / 4,
        True,
    ),
}


def special_stack() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All special cases with a common one between each two; their inverses; the certified ones."""
    good = np.asarray([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
    inverse = np.asarray([[2.0, -1.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.75]]) / 3
    rows: list[tuple[Any, Any, bool]] = [(good, inverse, True)]
    for special in SPECIAL.values():
        rows += [tuple(special), (good, inverse, True)]
    matrices, inverses, certified = zip(*rows, strict=True)
    return np.asarray(matrices), np.asarray(inverses), np.asarray(certified)
