"""Exact natural gradient for ensembles of networks, on any array library."""

from natgrad_array import deep_linear
from natgrad_array.deep_linear.task import GaussianTask
from natgrad_array.linalg import pinvh, precondition
from natgrad_array.moments import Moments, covariance, second_moment

__all__ = [
    "GaussianTask",
    "Moments",
    "covariance",
    "deep_linear",
    "pinvh",
    "precondition",
    "second_moment",
]
