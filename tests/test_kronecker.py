"""Kronecker products of covariances, against the dense matrices they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from backends import Backend

from natgrad_array import linalg
from natgrad_array.kronecker import Kronecker, KroneckerBasis


def covariance(n: int, rank: int | None = None, batch: tuple[int, ...] = (), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((*batch, n, n if rank is None else rank))
    return root @ np.swapaxes(root, -1, -2) / root.shape[-1]


def vec(v: np.ndarray) -> np.ndarray:
    return v.T.reshape(-1)


@pytest.mark.parametrize("identity", [False, True])
def test_products_and_pseudo_inverse(identity: bool) -> None:
    a, g = covariance(4, rank=2), covariance(3, seed=1)
    v = np.random.default_rng(2).standard_normal((3, 4))
    block = Kronecker(a, None if identity else g)
    dense = np.kron(a, np.eye(3) if identity else g)
    np.testing.assert_allclose(vec(block.matvec(v)), dense @ vec(v), atol=1e-13)
    wanted = np.linalg.pinv(dense, rcond=1e-10)
    np.testing.assert_allclose(vec(block.pinv().matvec(v)), wanted @ vec(v), atol=1e-11)
    if identity:
        with pytest.raises(ValueError, match="backward must be an array"):
            block.to_dense()
    else:
        np.testing.assert_allclose(block.to_dense(), dense, atol=1e-15)


def test_factored_damping_balances_mean_eigenvalues(backend: Backend) -> None:
    """(A + πγ)⁻¹ ⊗ (G + γ/π)⁻¹ with π² = (tr A / n) / (tr G / m)."""
    if backend.lazy:
        pytest.skip("methods of an object: eager here, under jit in the tests of optimizers")
    a, g, v = covariance(4), 100 * covariance(3, seed=1), np.random.default_rng(2).standard_normal((3, 4))
    damping = 0.3
    pi = np.sqrt((np.trace(a) / 4) / (np.trace(g) / 3))
    gamma = np.sqrt(damping)
    wanted = np.linalg.inv(g + gamma / pi * np.eye(3)) @ v @ np.linalg.inv(a + gamma * pi * np.eye(4))
    found = Kronecker(*backend.asarrays(a, g)).damped_inverse(damping).matvec(backend.asarray(v))
    backend.check(found, backend.asarray(v))
    tol = 1e-12 if backend.float64 else 1e-4
    np.testing.assert_allclose(backend.to_numpy(found), wanted, atol=tol, rtol=tol)


def test_factored_damping_of_the_identity() -> None:
    a, v = covariance(4), np.random.default_rng(2).standard_normal((3, 4))
    pi, gamma = np.sqrt(np.trace(a) / 4), np.sqrt(0.3)
    wanted = v @ np.linalg.inv(a + gamma * pi * np.eye(4)) / (1 + gamma / pi)
    np.testing.assert_allclose(Kronecker(a, None).damped_inverse(0.3).matvec(v), wanted, atol=1e-13)


def test_no_damping_is_the_pseudo_inverse_in_every_member() -> None:
    """A dead layer, a rank-deficient one and a NaN beside a good one."""
    a, g = covariance(4, batch=(4,)), covariance(3, batch=(4,), seed=1)
    a[1], g[1] = 0.0, 0.0
    a[2] = covariance(4, rank=2)
    a[3, 0, 0] = np.nan
    v = np.random.default_rng(2).standard_normal((3, 4))
    found = Kronecker(a, g).damped_inverse(0.0).matvec(v)
    for b in (0, 1, 2):
        wanted = np.linalg.pinv(np.kron(a[b], g[b]), rcond=1e-10) @ vec(v)
        np.testing.assert_allclose(vec(found[b]), wanted, atol=1e-10)
    assert np.isnan(found[3]).all()


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_basis_damps_exactly(identity: bool, damping: float) -> None:
    a, g = covariance(4, rank=2, batch=(2,)), covariance(3, batch=(2,), seed=1)
    v = np.random.default_rng(2).standard_normal((2, 3, 4))
    basis = KroneckerBasis.of(Kronecker(a, None if identity else g), 3)
    found = basis.solve(v, damping)
    for b in range(2):
        dense = np.kron(a[b], np.eye(3) if identity else g[b])
        wanted = np.linalg.pinv(dense + damping * np.eye(12), rcond=1e-12) @ vec(v[b])
        np.testing.assert_allclose(vec(found[b]), wanted, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(basis.rotate_back(basis.rotate(v)), v, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_shift_is_inverted_with_its_own_condition(dtype: str) -> None:
    """Rank-deficient covariances with shifts from large to lost in rounding, where the shifted matrix is pinvh's."""
    a = covariance(40, rank=10, batch=(4,)).astype(dtype)
    eps = float(np.finfo(dtype).eps)
    shift = np.asarray([1.0, 1e3 * eps, 0.0, 1e-3 * eps], dtype=dtype)[:, None, None]
    found = linalg.shifted_inverse(np, a, shift)
    for b in range(4):
        wide = a[b].astype(np.float64)
        values, vectors = np.linalg.eigh((wide + wide.T) / 2)
        kept = values > 1e-3 if b >= 2 else values > -1
        wanted = (vectors * np.where(kept, 1.0 / (np.where(kept, values, 1.0) + shift[b, 0, 0]), 0.0)) @ vectors.T
        error = np.linalg.norm(found[b] - wanted) / np.linalg.norm(wanted)
        assert error <= (1e3 * eps if b != 1 else 0.1)


def test_what_a_shift_does_not_make_positive_has_its_inverse_all_the_same() -> None:
    """The rounding of a covariance is no larger than a shift that is to be seen; what users hand over may be."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    a = np.stack([(basis * values) @ basis.T for values in ([1.0, 2, 3, 4, 5, 6], [-1.0, 2, 3, 4, 5, 6])])
    found = linalg.shifted_inverse(np, a, np.full((2, 1, 1), 0.25))
    np.testing.assert_allclose(found, np.linalg.inv(a + 0.25 * np.eye(6)), rtol=0, atol=1e-13)
