"""Linear maps: a weight with its logical axes; contractions are einsums at the place of use."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.param import MATRIX, Matrix, normal, param
from fathom.ops.precision import precision_of


def contract(equation: str, x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`einsum(equation, x, weight)` in x's dtype, accumulated in float32, in `out_dtype` or x's."""
    out = jnp.einsum(
        equation, x, weight.astype(x.dtype), precision=precision_of(x), preferred_element_type=jnp.float32
    )
    return out.astype(out_dtype or x.dtype)


class Linear(nnx.Module):
    """A bias-free linear map whose kernel may have more than two dimensions.

    Attributes:
      weight: kernel [in..., out...], e.g. [R, N, H] for a query up-projection into N heads; `matrix` says which
        dimensions are which.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        stddev: float,
        dtype: str = "float32",
        matrix: Matrix = MATRIX,
    ):
        self.weight = param(rngs.params(), shape, normal(stddev), axes=axes, dtype=dtype, matrix=matrix)

    def contract(
        self, equation: str, x: jax.Array, out_dtype: jnp.dtype | None = None
    ) -> jax.Array:
        """`einsum(equation, x, weight)` in x's dtype, accumulated in float32.

        Args:
          equation: einsum string whose second operand is the kernel.
          x: the input; the kernel is cast to its dtype.
          out_dtype: dtype of the result, x's unless given. float32 keeps the accumulator unrounded.
        """
        return contract(equation, x, self.weight[...], out_dtype)
