"""A direction and the loss beside it from one pass: what a simulation asks for at every step."""

from __future__ import annotations

from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear.fisher import INVERSES, DeepLinearFisher
from natgrad_array.deep_linear.layerwise import layerwise
from natgrad_array.deep_linear.products import gradients, half_square, products
from natgrad_array.deep_linear.task import GaussianTask

RULES = (*INVERSES, "gradient")


def slope(
    xp: Namespace, layers: tuple[Array, ...], task: GaussianTask, rule: str, *, with_excess: bool
) -> tuple[Array, ...]:
    """The descent direction of a rule, one array a layer, on arguments that have been checked.

    With `with_excess` the excess loss, (*batch, 1, 1), comes after them.
    """
    if rule in ("layerwise", "block_diagonal"):
        scale = 1.0 / len(layers) if rule == "layerwise" else 1.0
        return layerwise(xp, layers, task.factors, scale, with_excess=with_excess)
    if rule == "gradient":
        found = products(layers, task.factors)
        directions, error = gradients(found), found.error
    else:
        fisher = DeepLinearFisher._of_checked(xp, layers, task)
        directions, error = fisher._natural_gradient(rule, None, "auto"), fisher._products.error
    return (*directions, half_square(xp, error)) if with_excess else directions
