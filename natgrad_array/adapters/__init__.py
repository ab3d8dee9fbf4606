"""Natural gradient for networks that live elsewhere.

>>> import natgrad_array as ng
>>> factors = ng.adapters.kronecker_factors

What is here works on arrays of any library. `natgrad_array.adapters.optax` and
`natgrad_array.adapters.torch` are for users of those libraries, and are imported by name.
"""

from natgrad_array.adapters.layers import kronecker_factors, precondition

__all__ = ["kronecker_factors", "precondition"]
