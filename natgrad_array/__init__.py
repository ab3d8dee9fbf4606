"""Exact natural gradient for ensembles of networks, on any array library."""

from natgrad_array import deep_linear
from natgrad_array.deep_linear import GaussianTask
from natgrad_array.linalg import pinvh, precondition
from natgrad_array.moments import Moments, covariance, second_moment
from natgrad_array.verification import check_preconditioner, verify

__all__ = [
    "GaussianTask",
    "Moments",
    "check_preconditioner",
    "covariance",
    "deep_linear",
    "pinvh",
    "precondition",
    "second_moment",
    "verify",
]
