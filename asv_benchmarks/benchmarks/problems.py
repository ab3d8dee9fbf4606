"""Inputs of the benchmarks: NumPy arrays, the same on every library and in every run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

import natgrad_array as ng

Shape = tuple[int, ...]


class Task(NamedTuple):
    """The four moments of a regression task, one for all members."""

    moment: np.ndarray
    noise: np.ndarray
    cross: np.ndarray
    output: np.ndarray


def moments(rng: np.random.Generator, batch: Shape, n: int, samples: int) -> np.ndarray:
    """Second moments of `samples` Gaussian samples: of condition 34 with 2n of them, of rank `samples` below n."""
    x = rng.standard_normal((*batch, n, samples))
    product = x @ x.mT / samples
    return (product + product.mT) / 2


@functools.cache
def definite(batch: int, n: int, dtype: str) -> np.ndarray:
    """A stack of well-conditioned positive-definite matrices."""
    return moments(np.random.default_rng(n), (batch,), n, 2 * n).astype(dtype)


@functools.cache
def half_rank(batch: int, n: int, dtype: str) -> np.ndarray:
    """A stack of matrices of rank n/2."""
    return moments(np.random.default_rng(n), (batch,), n, n // 2).astype(dtype)


@functools.cache
def one_deficient(batch: int, n: int, dtype: str) -> np.ndarray:
    """The stack of `definite` with one member, in the middle, of rank n/2."""
    stack = definite(batch, n, dtype).copy()
    stack[batch // 2] = half_rank(1, n, dtype)[0]
    return stack


@functools.cache
def samples(batch: int, n: int, features: int, dtype: str) -> np.ndarray:
    """Correlated samples with a mean of the size of their spread."""
    rng = np.random.default_rng(features)
    mixing = rng.standard_normal((features, features)) / features**0.5
    x = rng.standard_normal((batch, n, features)).astype(dtype) @ mixing.astype(dtype)
    x += rng.standard_normal(features).astype(dtype)
    return x


@functools.cache
def task(n_in: int, n_out: int, noise: str, dtype: str) -> Task:
    """A task whose Σ has condition 9, with noise of covariance "identity" or "general" (condition 9 too)."""
    rng = np.random.default_rng(n_in + n_out)
    moment = moments(rng, (), n_in, 4 * n_in)
    covariance = np.eye(n_out) if noise == "identity" else moments(rng, (), n_out, 4 * n_out)
    teacher = rng.standard_normal((n_out, n_in)) / n_in**0.5
    cross = teacher @ moment
    output = cross @ teacher.T
    output = (output + output.T) / 2 + covariance
    return Task(*(array.astype(dtype) for array in (moment, covariance, cross, output)))


@functools.cache
def weights(sizes: Shape, batch: int, kind: str, dtype: str) -> tuple[np.ndarray, ...]:
    """Networks of plain Gaussian weights, N(0, 1/fan_in), or of nearly orthogonal ones."""
    rng = np.random.default_rng(sum(sizes))
    like = np.empty(0)
    layers = ng.deep_linear.gaussian(rng, sizes, (batch,), like=like)
    if kind == "orthogonal":
        # A tenth of noise, so that nothing gains from exact orthogonality.
        exact = ng.deep_linear.orthogonal(rng, sizes, (batch,), like=like)
        layers = tuple(q + 0.1 * w for q, w in zip(exact, layers, strict=True))
    return tuple(layer.astype(dtype) for layer in layers)


def on_the_way(sizes: Shape, batch: int, optimum: np.ndarray) -> tuple[np.ndarray, ...]:
    """Balanced networks that reach an optimum W* along a straight line without a singular matrix on it.

    They start from W* S with S symmetric and its eigenvalues between 0.3 and 1. From anywhere half
    of all square networks would meet a singular one.
    """
    n = sizes[0]
    rng = np.random.default_rng(sum(sizes))
    basis = np.linalg.qr(rng.standard_normal((batch, n, n)))[0]
    start = optimum.astype(np.float64) @ (basis * rng.uniform(0.3, 1.0, (batch, 1, n))) @ basis.mT
    layers = ng.deep_linear.balanced(rng, sizes, (batch,), like=start, end_to_end=start)
    return tuple(layer.astype(optimum.dtype) for layer in layers)
