"""The matrix product of every layer: operands in the compute dtype, sums in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from illada_jax.model.int8 import Int8


def dense(x: jax.Array, w_io: jax.Array | Int8, out_dtype: jnp.dtype) -> jax.Array:
    """Product x · w with operands in x's dtype and float32 accumulation.

    Args:
      x: [..., i], float32 or bfloat16.
      w_io: params [i, o]. Int8 values are exact in x's dtype; their scales multiply the sums. Int8 has no gradient.
      out_dtype: dtype of the result.

    Returns:
      [..., o] in out_dtype.
    """
    if isinstance(w_io, Int8):
        scale = w_io.scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (_dense(x, w_io.values, jnp.float32) * scale).astype(out_dtype)
    return _dense(x, w_io, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, w_io: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """`dense` with its own backward pass.

    Autodiff would multiply a float32 cotangent with low-precision operands, a mixed product that is slow on all
    platforms. The gradient of w stays float32 until it reaches the float32 params.
    """
    return jnp.einsum("...i,io->...o", x, w_io.astype(x.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


def _forward(x: jax.Array, w_io: jax.Array, out_dtype: jnp.dtype):
    return _dense(x, w_io, out_dtype), (x, w_io)


def _backward(out_dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    del out_dtype
    x, w_io = saved
    g = g.astype(x.dtype)
    dx = jnp.einsum("...o,io->...i", g, w_io.astype(x.dtype), preferred_element_type=jnp.float32)
    rows_ni, rows_no = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dw_io = jnp.einsum("ni,no->io", rows_ni, rows_no, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw_io.astype(w_io.dtype)


_dense.defvjp(_forward, _backward)
