"""Randomness of the library, dtype and device of other arrays."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from natgrad_array._arrays.checks import check_arrays, describe, is_integer
from natgrad_array._arrays.libraries import (
    Array,
    Namespace,
    Shape,
    asarray_like,
    device,
    is_cupy,
    is_jax,
    is_lazy,
    is_torch,
)


def standard_normal(rng: Any, shape: Shape, xp: Namespace, like: Array) -> Array:
    """Draw independent N(0, 1) variables of the library, dtype and device of `like`.

    Parameters
    ----------
    rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
        Where randomness comes from. An array is noise already drawn and is returned if
        its shape fits. Draws of an integer seed and of a NumPy generator are made on the
        host and so are the same on every library.

    Raises
    ------
    TypeError
        If `rng` is none of these, or a host generator under a JAX trace, where its draw
        would freeze into a constant.
    """
    if isinstance(rng, bool) or rng is None:
        raise TypeError(f"rng must be a generator, a key, an integer seed or an array of noise, got {describe(rng)}")
    if isinstance(rng, MemberNoise):
        return rng.draw(shape, xp, like)
    rng = _from_seed(rng)
    if isinstance(rng, np.random.Generator):
        if is_lazy(like):
            raise TypeError(
                "rng is a NumPy generator or seed under a JAX trace, where its draw would be a constant; pass a JAX key"
            )
        return asarray_like(xp, rng.standard_normal(shape), like)
    module = type(rng).__module__.partition(".")[0]
    if _is_jax_key(rng):
        _check_rng_library(is_jax(like), rng, like)
        return sys.modules["jax"].random.normal(rng, shape, dtype=like.dtype)
    if compat.is_array_api_obj(rng):
        check_arrays({"rng": rng, "the other arrays": like})
        if tuple(rng.shape) != shape:
            raise ValueError(f"rng must have shape {shape} when it is noise already drawn, got {tuple(rng.shape)}")
        return rng
    if module == "torch":
        _check_rng_library(is_torch(like), rng, like)
        return sys.modules["torch"].randn(shape, generator=rng, dtype=like.dtype, device=rng.device)
    if module == "cupy":
        _check_rng_library(is_cupy(like), rng, like)
        return rng.standard_normal(size=shape, dtype=like.dtype)
    raise TypeError(f"rng must be a generator, a key, an integer seed or an array of noise, got {describe(rng)}")


def _from_seed(rng: Any) -> Any:
    """An integer seed as a NumPy generator; every other source as it is."""
    if not is_integer(rng):
        return rng
    if rng < 0:
        raise ValueError(f"rng must be at least 0 when it is a seed, got {rng}")
    return np.random.default_rng(rng)


def _check_rng_library(fits: bool, rng: Any, like: Array) -> None:
    if not fits:
        raise TypeError(f"rng must draw arrays of the library in use, got {describe(rng)} beside {describe(like)}")


def _is_jax_key(rng: Any) -> bool:
    if not is_jax(rng):
        return False
    jax = sys.modules["jax"]
    return bool(jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key) or (rng.dtype == np.uint32 and rng.shape == (2,)))


def split_rng(rng: Any, count: int) -> list[Any]:
    """`count` sources of randomness from one; generators advance, keys are split."""
    rng = _from_seed(rng)
    if _is_jax_key(rng):
        return list(sys.modules["jax"].random.split(rng, count))
    if count > 1 and compat.is_array_api_obj(rng):
        raise TypeError(f"rng must be a generator, a key or an integer seed to draw {count} times, got {describe(rng)}")
    return [rng] * count


def counted_key(rng: Any, like: Array) -> Any:
    """The key of `counted_normal` from an integer seed, or a JAX key for JAX arrays.

    Raises
    ------
    TypeError
        If `rng` is anything else: a generator has a state, which a run that stops and goes on cannot share.
    """
    if _is_jax_key(rng):
        _check_rng_library(is_jax(like), rng, like)
        return rng
    if not is_integer(rng):
        raise TypeError(f"rng must be an integer seed (or a JAX key with JAX arrays), got {describe(rng)}")
    if rng < 0:
        raise ValueError(f"rng must be at least 0, got {rng}")
    if is_jax(like):
        return sys.modules["jax"].random.key(int(rng))
    return tuple(int(word) for word in np.random.SeedSequence(int(rng)).generate_state(2, np.uint64))


def counted_normal(key: Any, stream: int, step: Any, members: Array, size: int, xp: Namespace, like: Array) -> Array:
    """N(0, 1) variables, (members, size), that depend on nothing but the key, the step and each member's number.

    Parameters
    ----------
    key : what `counted_key` returns
    stream : int
        Keeps draws for different ends apart.
    step : int
        An integer of Python, or in a JAX trace an array.
    members : array of int, shape (members,)
        Numbers of the members: consecutive ones on the host, a JAX array in a JAX trace.
    size : int
        Draws for each member.
    """
    if is_jax(like):
        random = sys.modules["jax"].random
        key = random.fold_in(random.fold_in(key, stream), step)
        draw = sys.modules["jax"].vmap(lambda m: random.normal(random.fold_in(key, m), (size,), dtype=like.dtype))
        return draw(members)
    blocks, count = -(-size // 4), len(members)
    first = int(members[0]) * blocks if count else 0
    bits = np.random.Philox(key=np.asarray(key, np.uint64), counter=np.asarray([first, 0, step, stream], np.uint64))
    words = bits.random_raw(count * blocks * 4).reshape(count, 2, blocks * 2)
    # Box and Muller, since a rejection method takes an unknown number of words for each variable.
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0])), 2.0 * math.pi * uniform[:, 1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return asarray_like(xp, normal[:, :size], like)


class MemberNoise(NamedTuple):
    """A source of randomness for `standard_normal` where members are the second axis: `counted_normal` for each.

    What a member draws does not depend on the members beside it.
    """

    key: Any
    stream: int
    step: Any
    members: Any

    def draw(self, shape: Shape, xp: Namespace, like: Array) -> Array:
        """N(0, 1) variables of a shape (draws, members, ...)."""
        draws, members, *core = shape
        size = draws * math.prod(core)
        noise = counted_normal(self.key, self.stream, self.step, self.members, size, xp, like)
        return xp.moveaxis(xp.reshape(noise, (members, draws, *core)), 0, 1)


def counted_permutation(key: Any, stream: int, round_: Any, size: int, xp: Namespace, like: Array) -> Array:
    """A random order of `size` things that depends on nothing but the key and the round."""
    if is_jax(like):
        random = sys.modules["jax"].random
        return random.permutation(random.fold_in(random.fold_in(key, stream), round_), size)
    bits = np.random.Philox(key=np.asarray(key, np.uint64), counter=np.asarray([0, 0, round_, stream], np.uint64))
    return xp.asarray(np.random.Generator(bits).permutation(size), device=device(like))


def key_data(key: Any) -> np.ndarray[Any, Any]:
    """The numbers in a key of `counted_key`."""
    if isinstance(key, tuple):
        return np.asarray(key, np.uint64)
    jax = sys.modules["jax"]
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)
