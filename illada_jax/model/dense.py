"""The matrix product of every layer: operands in the compute dtype, sums in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, w_io: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """X · w with operands in x's dtype and float32 accumulation.

    Written with its own backward pass, since autodiff would multiply a float32 cotangent with low-precision operands:
    a mixed product that is slow everywhere. The gradient of w is not rounded on its way to the float32 params.

    Args:
      x: [..., i], float32 or bfloat16.
      w_io: params [i, o].
      out_dtype: dtype of the result.

    Returns:
      [..., o] in out_dtype.
    """
    return jnp.einsum("...i,io->...o", x, w_io.astype(x.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


def _forward(x: jax.Array, w_io: jax.Array, out_dtype: jnp.dtype):
    return dense(x, w_io, out_dtype), (x, w_io)


def _backward(out_dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    del out_dtype
    x, w_io = saved
    g = g.astype(x.dtype)
    dx = jnp.einsum("...o,io->...i", g, w_io.astype(x.dtype), preferred_element_type=jnp.float32)
    rows_ni, rows_no = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dw_io = jnp.einsum("ni,no->io", rows_ni, rows_no, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw_io.astype(w_io.dtype)


dense.defvjp(_forward, _backward)
