"""The exact theory of deep linear networks with Gaussian noise.

A network is a sequence of weights (W_1, ..., W_L), first layer first, each of shape
(*batch, n_i, n_{i-1}). Functions broadcast over the batch axes of weights and task.
"""

from natgrad_array.deep_linear.dynamics import (
    euler_decay_rate,
    gradient_flow_modes,
    natural_gradient_flow,
    natural_gradient_flow_modes,
)
from natgrad_array.deep_linear.fisher import DeepLinearFisher, fisher
from natgrad_array.deep_linear.initializers import balanced, gaussian, orthogonal, small
from natgrad_array.deep_linear.natural import exact_velocity, natural_gradient, projections
from natgrad_array.deep_linear.products import (
    balancedness,
    end_to_end,
    end_to_end_kernel,
    end_to_end_velocity,
    excess_loss,
    gradient,
    loss,
    regime,
)
from natgrad_array.deep_linear.task import GaussianTask

__all__ = [
    "DeepLinearFisher",
    "GaussianTask",
    "balanced",
    "balancedness",
    "end_to_end",
    "end_to_end_kernel",
    "end_to_end_velocity",
    "euler_decay_rate",
    "exact_velocity",
    "excess_loss",
    "fisher",
    "gaussian",
    "gradient",
    "gradient_flow_modes",
    "loss",
    "natural_gradient",
    "natural_gradient_flow",
    "natural_gradient_flow_modes",
    "orthogonal",
    "projections",
    "regime",
    "small",
]
