"""Dual factors (x⁺)ᵀ of the products ahead of and behind each layer, by the cheapest exact way.

The layerwise rule (Eq 42) preconditions a layer by the duals of its two factors. A network
has two chains of factors, each a product that grows by one matrix a layer: Z_0 is a root
of a covariance with a known inverse, Z_k = step_k Z_{k-1}. The widths alone say how the
dual of Z_k is had at the least cost when all matrices have the full rank of their shapes,
and condition numbers say afterwards, member by member, whether they had.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.products import Products
from natgrad_array.deep_linear.task import TaskFactors

Pair = tuple[Array, Array]


# --------------------------------------------------------------------------------- routes


class Route(NamedTuple):
    """How the dual of Z_k follows from earlier ones, with Z_k of the full rank of its shape.

    From (AB)⁺ = B⁺A⁺ for A of full column and B of full row rank.
    """

    kind: str
    """"root": known. "layer": the last step is square and Z_{k-1} has full row rank, so only
    the step is inverted. "whole": Z_k itself has full row or column rank. "split": the chain
    was narrowest at `start` < k, and what came after is tall."""
    start: int


def routes(widths: Shape, *, root_is_square: bool = True) -> tuple[Route, ...]:
    """The route to every dual of a chain; `widths` are the rank of Z_0 and the rows of Z_1, ....

    Where a square root is the narrowest, the chain is split at it: (A Z_0)⁺ = Z_0⁻¹ A⁺.

    Examples
    --------
    >>> [route.kind for route in routes((8, 8, 6, 7, 9))]
    ['root', 'layer', 'whole', 'split', 'split']
    """
    found = [Route("root", 0)]
    for k in range(1, len(widths)):
        narrowest = min(widths[: k + 1])
        if widths[k - 1] == widths[k] == narrowest and (k > 1 or root_is_square):
            found.append(Route("layer", k - 1))
        elif narrowest == widths[0]:
            start = max(i for i in range(k) if widths[i] == narrowest)
            found.append(Route("split", start) if root_is_square or start else Route("whole", k))
        elif narrowest == widths[k]:
            found.append(Route("whole", k))
        else:
            found.append(Route("split", max(i for i in range(k) if widths[i] == narrowest)))
    return tuple(found)


# ----------------------------------------------------------------- factors of full rank


class Thin(NamedTuple):
    """The dual of a factor of full rank in two pieces: core·x if x is wide, x·core if it is tall.

    The core is the inverse of the smaller Gram matrix; for a square x it is the dual itself.
    """

    x: Array
    core: Array
    condition: Array
    """A bound on the condition number of what was inverted."""

    def times(self, y: Array) -> Array:
        """(x⁺)ᵀ y."""
        first, last = self.times_as_product(y)
        return linalg.matmul(first, last)

    def times_as_product(self, y: Array) -> Pair:
        """The two matrices whose product is (x⁺)ᵀ y."""
        m, n = self.x.shape[-2:]
        if m == n:
            return self.core, y
        return (self.core, linalg.matmul(self.x, y)) if m < n else (self.x, linalg.matmul(self.core, y))

    def times_from_right(self, y: Array) -> Array:
        """Y x⁺."""
        m, n = self.x.shape[-2:]
        if m == n:
            return y @ self.core.mT
        return (y @ self.x.mT) @ self.core if m < n else (y @ self.core) @ self.x.mT

    def refined(self, xp: Namespace) -> tuple[Array, Array]:
        """The dual after one Newton step, which undoes the squaring of the condition number, and a bound.

        The residual r = ‖1 − x⁺x‖ of the dual before the step is squared by it, and r < 1
        proves that x has full rank. The bound is on the condition number κ of x; Inf where the
        step leaves more than κ times the rounding of x.
        """
        m, n = self.x.shape[-2:]
        if m == n:
            return self.core, self.condition
        if m < n:
            dual = self.core @ self.x
            residual = _residual(xp, dual @ self.x.mT)
            step = residual @ dual
        else:
            dual = self.x @ self.core
            residual = _residual(xp, self.x.mT @ dual)
            step = dual @ residual
        r = _arrays.norms(xp, residual)
        # ‖x⁺‖ is at most ‖dual‖ / (1 − r).
        condition = 2.0 * _arrays.norms(xp, self.x) * _arrays.norms(xp, dual)
        dual += step
        return dual, xp.where((r < 0.5) & (r**2 < _arrays.eps(xp, dual) * condition), condition, xp.inf)


def thin(xp: Namespace, x: Array) -> Thin:
    """Invert a factor of full rank by its smaller side."""
    m, n = x.shape[-2:]
    if m == n:
        core, condition = linalg.inverse(xp, x)
        return Thin(x, core.mT, condition)
    return Thin(x, *linalg.positive_inverse(xp, _smaller_gram(x)))


def thin_pair(xp: Namespace, x: Array, y: Array) -> tuple[Thin, Thin]:
    """`thin` of both."""
    if any(z.shape[-2] == z.shape[-1] for z in (x, y)):
        return thin(xp, x), thin(xp, y)
    first, last = linalg.positive_inverses(xp, _smaller_gram(x), _smaller_gram(y))
    return Thin(x, *first), Thin(y, *last)


def _smaller_gram(x: Array) -> Array:
    m, n = x.shape[-2:]
    return x @ x.mT if m < n else x.mT @ x


def _residual(xp: Namespace, product: Array) -> Array:
    return _arrays.eye(xp, product.shape[-1], product) - product


# ---------------------------------------------------------------------------------- chains


class Chain:
    """The factors of one side of a network, Z_0 to Z_{L-1}, and their duals.

    Parameters
    ----------
    factors : list of arrays, shapes (*batch, m_k, r)
        Z_0, and those of Z_1, ... that are known.
    root_dual : array, shape (*batch, m_0, r)
        (Z_0⁺)ᵀ.
    steps : list of arrays, shapes (*batch, m_k, m_{k-1})
        step_1, ....
    square : list of callables
        For each step, a function of no arguments that gives its `Thin` form; it is called
        for square steps, which the other side of the network may invert too.
    root_is_identity : bool
        Whether Z_0 is the identity.
    """

    def __init__(
        self,
        xp: Namespace,
        factors: list[Array],
        root_dual: Array,
        steps: list[Array],
        square: list[Callable[[], Thin]],
        *,
        root_is_identity: bool = False,
    ) -> None:
        self.xp, self.steps, self.square = xp, steps, square
        self.factors = factors
        self.root_dual, self.root_is_identity = root_dual, root_is_identity
        rows, rank = (int(size) for size in root_dual.shape[-2:])
        self.widths = (rank, *(int(step.shape[-2]) for step in steps))
        self.routes = routes(self.widths, root_is_square=rows == rank)
        self.needs_root = not root_is_identity and any(route.kind == "whole" for route in self.routes)
        """Whether an inverse takes the root in."""
        self._pieces: dict[int, Thin] = {}

    def rank(self, k: int) -> int:
        """The largest rank that the shapes behind Z_k allow."""
        return min(self.widths[: k + 1])

    def is_tall(self, k: int) -> bool:
        """Whether the dual of Z_k ends on a product that makes a matrix larger."""
        return k > 0 and self.piece(k).x.shape[-2] > self.piece(k).x.shape[-1]

    def start(self, k: int) -> int | None:
        """The factor whose dual that of Z_k starts from; None if it starts from nothing."""
        kind, start = self.routes[k]
        return (0 if self.root_is_identity else None) if kind == "whole" else start

    def rounding(self, k: int) -> float:
        """Relative rounding of Z_k, which grows with the lengths of all sums behind it."""
        return sum(self.widths[: k + 1]) * _arrays.eps(self.xp, self.root_dual)

    def factor(self, k: int) -> Array:
        """Z_k."""
        while len(self.factors) <= k:
            step = self.steps[len(self.factors) - 1]
            first = self.root_is_identity and len(self.factors) == 1
            self.factors.append(step if first else linalg.matmul(step, self.factors[-1]))
        return self.factors[k]

    def product(self, k: int) -> Array:
        """Z_k if an inverse takes the root in, else step_k ⋯ step_1."""
        kind, start = self.routes[k]
        if self.needs_root or kind == "whole":
            return self.factor(k)
        if kind == "split" and start == 0:
            return self.piece(k).x
        return self.steps[0] if k == 1 else self.steps[k - 1] @ self.product(k - 1)

    def piece(self, k: int) -> Thin:
        """What is inverted for Z_k beyond what its route starts from."""
        if k not in self._pieces:
            kind, start = self.routes[k]
            if kind == "layer":
                self._pieces[k] = self.square[k - 1]()
            elif kind == "whole":
                self._pieces[k] = thin(self.xp, self.factor(k))
            else:
                step = self.steps[k - 1]
                self._pieces[k] = thin(self.xp, step if start == k - 1 else step @ self.piece(k - 1).x)
        return self._pieces[k]

    def duals(self) -> tuple[list[Array], Array | bool]:
        """The duals of Z_1, Z_2, ..., and which members have them to the rounding of Z_k itself."""
        xp, found = self.xp, [self.root_dual]
        certified: Array | bool = True
        for k in range(1, len(self.widths)):
            piece, (kind, start) = self.piece(k), self.routes[k]
            matrix, condition = piece.refined(xp)
            found.append(matrix if kind == "whole" else linalg.matmul(matrix, found[start]))
            product_rounding = self.rounding(k) + 4 * self.widths[k] * _arrays.eps(xp, matrix)
            uncertain = layer_rounding(xp, matrix) if kind == "layer" else product_rounding
            certified = certified & (condition * uncertain < 1.0)
        return found[1:], certified


def chains(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, products: Products | None = None
) -> tuple[Chain, Chain]:
    """The chains of the factors ahead, E_L to E_1, and behind, X_1 to X_L, which `products` may know already."""
    inverses: dict[int, Pair] = {}

    def inverse(i: int) -> Pair:
        if i not in inverses:
            inverses[i] = linalg.inverse(xp, layers[i])
        return inverses[i]

    def ahead(i: int) -> Thin:
        core, condition = inverse(i)
        return Thin(layers[i].mT, core, condition)

    def behind(i: int) -> Thin:
        core, condition = inverse(i)
        return Thin(layers[i], core.mT, condition)

    depth = len(layers)
    root, unroot = factors.noise_roots(xp)
    left = Chain(
        xp,
        [unroot.mT] if products is None else list(products.ahead[::-1]),
        root,
        [layer.mT for layer in layers[:0:-1]],
        [partial(ahead, i) for i in range(depth - 1, 0, -1)],
        root_is_identity=factors.noise_root is None,
    )
    right = Chain(
        xp,
        [factors.input_root] if products is None else list(products.behind),
        factors.input_root_pinv.mT,
        list(layers[:-1]),
        [partial(behind, i) for i in range(depth - 1)],
    )
    return left, right


def layer_rounding(xp: Namespace, layer: Array) -> float:
    """The relative rounding below which a layer's singular values count as zero.

    A layer is known exactly, so it is of full rank unless rounding alone could have made
    it so: a singular matrix, rounded, has a condition of some √n / eps.
    """
    return 4 * _arrays.eps(xp, layer)


def trusted(xp: Namespace, condition: Array, power: int = 1) -> Array:
    """Which members a rung may keep whose relative error is at most about eps times a power of `condition`.

    It grows with a squared condition number, where the next rung's grows with the number
    itself. The limit is 6e-10 in float64 and 4e-4 in float32; most errors are far below.
    """
    return condition < (16 * _arrays.eps(xp, condition) ** (-1 / 3)) ** (1 / power)


def full_roots(xp: Namespace, factors: TaskFactors) -> Array | bool:
    """Which members of a task have the full rank that the columns of S stand for."""
    basis = factors.input_basis
    if basis.ndim == 2 and not _arrays.is_lazy(basis):
        return True  # the columns of a single task were counted when it was made
    return xp.all(xp.any(basis != 0.0, axis=-2), axis=-1)


# ------------------------------------------------------------------------- explicit duals


def duals(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, products: Products
) -> tuple[list[Pair], Array | bool]:
    """(E_i⁺)ᵀ and (X_i⁺)ᵀ of every layer, at any rank, and for which members all have full rank.

    Ranks are decided on singular values at the rounding of the products, below the rank
    that the shapes allow; only members without a certificate of full rank take them.
    """
    depth = len(layers)
    left, right = chains(xp, layers, factors, products)
    full = full_roots(xp, factors)
    if depth == 1:
        return [(left.root_dual, right.root_dual)], full
    ahead, left_full = left.duals()
    behind, right_full = right.duals()
    certified = left_full & right_full & full
    cuts = [(chain.rank(k), chain.rounding(k)) for chain in (left, right) for k in range(1, depth)]
    wholes = tuple(chain.factor(k) for chain in (left, right) for k in range(1, depth))

    def decompose(*arrays: Array) -> tuple[Array, ...]:
        return tuple(linalg.dual(xp, x, *cut) for x, cut in zip(arrays, cuts, strict=True))

    found = _arrays.repair(xp, ~certified, (*ahead, *behind), wholes, decompose)
    ahead, behind = [left.root_dual, *found[: depth - 1]], [right.root_dual, *found[depth - 1 :]]
    return list(zip(reversed(ahead), behind, strict=True)), certified
