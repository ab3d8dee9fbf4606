"""Exact natural gradient for ensembles of networks, on any array library."""

from natgrad_array import adapters, deep_linear, networks, optimizers, simulation
from natgrad_array.deep_linear import GaussianTask
from natgrad_array.fisher import FisherComparison, FisherEstimate, NetworkFisher, empirical_fisher, sampled_fisher
from natgrad_array.linalg import pinvh, precondition
from natgrad_array.moments import Moments, covariance, second_moment
from natgrad_array.simulation import simulate
from natgrad_array.verification import check_preconditioner, verify

__all__ = [
    "FisherComparison",
    "FisherEstimate",
    "GaussianTask",
    "Moments",
    "NetworkFisher",
    "adapters",
    "check_preconditioner",
    "covariance",
    "deep_linear",
    "empirical_fisher",
    "networks",
    "optimizers",
    "pinvh",
    "precondition",
    "sampled_fisher",
    "second_moment",
    "simulate",
    "simulation",
    "verify",
]
