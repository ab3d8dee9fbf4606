"""What works on which array library: declared here once, read by the documentation and the tests."""

from __future__ import annotations

from typing import NamedTuple

LIBRARIES = ("numpy", "cupy", "torch", "jax", "dask")
"""Array libraries, under the names they are imported by. array-api-strict stands in for any other."""


class Support(NamedTuple):
    """One public callable and where it works.

    Parameters
    ----------
    name : str
        The path from the package to the callable.
    libraries : tuple of str
        Some of `LIBRARIES`.
    jit : bool
        Whether it can be called inside `jax.jit`.
    note : str
        A condition, in words.
    """

    name: str
    libraries: tuple[str, ...]
    jit: bool
    note: str = ""


_STACKED = ("numpy", "cupy", "torch", "jax")
_DRAWS = "inside jit: a JAX key, not a seed or a NumPy generator"

_OPTIMIZERS = {
    "Optimizer": f"init; step {_DRAWS}",
    "natural_gradient": _DRAWS,
    "kfac": _DRAWS,
    "tridiagonal_kfac": _DRAWS,
    "ekfac": _DRAWS,
    "foof": "",
    "heskes": "",
    "ng_sgd": "",
    "prong": "",
    "bounded_kfac": "",
    "sgd": "",
    "adam": "",
    "prune": "",
    "saliencies": "",
}

SUPPORT = (
    Support("second_moment", LIBRARIES, True),
    Support("covariance", LIBRARIES, True),
    Support("Moments", LIBRARIES, True),
    Support("pinvh", _STACKED, True),
    Support("precondition", _STACKED, True),
    Support("GaussianTask", _STACKED, True, "values are checked when it is made, but not inside jit"),
    Support("verify", _STACKED, False, "looks at values to say which claims apply"),
    Support("check_preconditioner", _STACKED, True),
    Support("deep_linear.gaussian", _STACKED, True, _DRAWS),
    Support("deep_linear.small", _STACKED, True, _DRAWS),
    Support("deep_linear.orthogonal", _STACKED, True, _DRAWS),
    Support("deep_linear.balanced", _STACKED, True, _DRAWS),
    Support("deep_linear.regime", LIBRARIES, True, "reads shapes; inside jit the rank of Σ is not known"),
    Support("deep_linear.end_to_end", LIBRARIES, True),
    Support("deep_linear.end_to_end_velocity", LIBRARIES, True),
    Support("deep_linear.end_to_end_kernel", _STACKED, True),
    Support("deep_linear.balancedness", LIBRARIES, True),
    Support("deep_linear.loss", _STACKED, True),
    Support("deep_linear.excess_loss", _STACKED, True),
    Support("deep_linear.gradient", _STACKED, True),
    Support("deep_linear.fisher", _STACKED, True),
    Support("deep_linear.DeepLinearFisher", _STACKED, True),
    Support("deep_linear.natural_gradient", _STACKED, True),
    Support("deep_linear.exact_velocity", _STACKED, True),
    Support("deep_linear.projections", _STACKED, True),
    Support("deep_linear.natural_gradient_flow", _STACKED, True),
    Support("deep_linear.natural_gradient_flow_modes", _STACKED, True),
    Support("deep_linear.gradient_flow_modes", _STACKED, True),
    Support("deep_linear.euler_decay_rate", LIBRARIES, True),
    Support("simulate", _STACKED, False, "compiles its own loops on JAX; stores and datasets need Zarr and xarray"),
    Support("simulation.Groups", _STACKED, False),
    Support("simulation.History", _STACKED, False),
    Support("simulation.log_steps", _STACKED, False, "reads integers"),
    Support("simulation.simulate_groups", _STACKED, False, "as simulate"),
    Support("simulation.simulate_training", _STACKED, False, "compiles its own loops on JAX, as simulate does"),
    Support("networks.MLP", _STACKED, True),
    Support("networks.ConvNet", _STACKED, True),
    Support("networks.Network", _STACKED, True, f"init {_DRAWS}"),
    Support("networks.Dense", _STACKED, True),
    Support("networks.Conv2d", _STACKED, True),
    Support("networks.Layer", _STACKED, True),
    Support("networks.Likelihood", _STACKED, True),
    Support("networks.Trace", _STACKED, True),
    Support("networks.Gaussian", _STACKED, True, "the noise covariance is checked when it is made, but not inside jit"),
    Support("networks.Bernoulli", _STACKED, True, "targets are checked, but not inside jit"),
    Support("networks.Categorical", _STACKED, True, "targets are checked, but not inside jit"),
    Support("NetworkFisher", _STACKED, True),
    Support("FisherEstimate", _STACKED, True),
    Support("FisherComparison", _STACKED, True),
    Support("sampled_fisher", _STACKED, True, _DRAWS),
    Support("empirical_fisher", _STACKED, True),
    Support("adapters.kronecker_factors", _STACKED, True),
    Support("adapters.precondition", _STACKED, True),
    *(Support(f"optimizers.{name}", _STACKED, True, note) for name, note in _OPTIMIZERS.items()),
)
