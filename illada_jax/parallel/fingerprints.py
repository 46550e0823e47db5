"""Fingerprints of arrays over all of their bits; checkpoints are verified with them."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def fingerprints(tree: Any) -> dict[str, str]:
    """Fingerprints of the arrays of a pytree, by path; the same on any mesh, and computed on the arrays' devices.

    They detect corruption, not forgery: every change of a single element, and all but one in 2^64 of other changes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {jax.tree_util.keystr(path, simple=True, separator="/"):
            f"{leaf.dtype}{list(leaf.shape)}:{int(one):08x}{int(other):08x}"
            for (path, leaf), (one, other) in zip(leaves, sums, strict=True)}


def fingerprint(tree: Any) -> str:
    """A single fingerprint of all arrays of a pytree."""
    return digest("\n".join(f"{path} {value}" for path, value in fingerprints(tree).items()))


def digest(text: str) -> str:
    """The first sixteen hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_difference(found: Mapping[str, str], recorded: Mapping[str, str]) -> str | None:
    """The first path whose fingerprints differ or are missing on one side; None if all are equal."""
    return next((path for path in [*recorded, *found] if found.get(path) != recorded.get(path)), None)


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums modulo 2^32, over all elements, of hashes of (bits of the element, its position)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position = functools.reduce(
        lambda index, axis: index * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis),
        range(x.ndim), jnp.zeros(x.shape, jnp.uint32))
    # The position is hashed too: bits + position would confuse a value with its neighbour's.
    hashes = [_mix(bits + _mix(position ^ jnp.uint32(seed))) for seed in (0x9E3779B9, 0x7F4A7C15)]
    # A single reduction fuses with the hashes; two sums would store arrays of them.
    return jax.lax.reduce(hashes, [jnp.uint32(0)] * 2, lambda x, y: (x[0] + y[0], x[1] + y[1]), range(x.ndim))


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby), a bijection of uint32 in which every bit depends on every other."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)
