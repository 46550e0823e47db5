"""Fingerprints of arrays by all of their bits, on whatever devices they lie: what a checkpoint is checked with."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def fingerprints(tree: Any) -> dict[str, str]:
    """A fingerprint of each array of a pytree, by its path; the same on any mesh. Computed where the arrays are.

    They tell damage, not forgery: a change of a single element is always seen, others but for one in 2^64.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {jax.tree_util.keystr(path, simple=True, separator="/"):
            f"{leaf.dtype}{list(leaf.shape)}:{int(one):08x}{int(other):08x}"
            for (path, leaf), (one, other) in zip(leaves, sums, strict=True)}


def fingerprint(tree: Any) -> str:
    """One fingerprint of all arrays of a pytree."""
    return digest("\n".join(f"{path} {value}" for path, value in fingerprints(tree).items()))


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_difference(found: Mapping[str, str], recorded: Mapping[str, str]) -> str | None:
    """The first path whose fingerprint is another or missing on either side; None where there is none."""
    return next((path for path in [*recorded, *found] if found.get(path) != recorded.get(path)), None)


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums modulo 2^32 of hashes of (bits of the element, its position), over all elements."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position = functools.reduce(
        lambda index, axis: index * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis),
        range(x.ndim), jnp.zeros(x.shape, jnp.uint32))
    # A hash of bits + position alone would not tell a value from its neighbour's.
    hashes = [_mix(bits + _mix(position ^ jnp.uint32(seed))) for seed in (0x9E3779B9, 0x7F4A7C15)]
    # One reduction for both: the hashes are made as they are added, where two sums would keep arrays of them.
    add = lambda one, other: (one[0] + other[0], one[1] + other[1])  # noqa: E731
    return jax.lax.reduce(hashes, [jnp.uint32(0)] * 2, add, range(x.ndim))


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on every other: the finaliser of MurmurHash3 (Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)
