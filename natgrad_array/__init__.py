"""Exact natural gradient for ensembles of networks, on any array library."""

from natgrad_array.linalg import pinvh, precondition

__all__ = ["pinvh", "precondition"]
