"""Token embedding, over devices that each hold some of its columns.

A device looks up its columns for the tokens of all the devices that hold other columns, and an all-to-all gives each
device its own tokens' rows whole: no device holds the table, nor a gradient of its size. What moves is as large as the
activations, which long sequences split over many devices make small, and not as the table.

Letters: B batch, S sequence, D hidden, V vocab, T tokens of a device, P devices among which columns are split.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from fathom.layers.param import normal, param
from fathom.mesh import active_rules, check_divisible, constrain, split_axes, vary
from fathom.ops.embedding import add_gradients, embedding_lookup, look_up

HIDDEN = ("act_batch", "act_sequence", "act_embed")


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, rngs: nnx.Rngs, vocab: int, hidden: int, *, stddev: float, dtype: str):
        self.weight = param(
            rngs.params(), (vocab, hidden), normal(stddev), axes=("vocab", "embed"), dtype=dtype
        )

    def __call__(self, tokens_BS: jax.Array, dtype: str) -> jax.Array:
        """[B, S, D] in `dtype`; an id outside of the table gives NaN (see `embedding_lookup`).

        Raises:
          ValueError: when the mesh does not divide the batch, the sequence, the vocabulary or the columns.
        """
        if active_rules() is None or jax.sharding.get_abstract_mesh().empty:
            return embedding_lookup(self.weight[...], tokens_BS, dtype)
        vocab, hidden = self.weight[...].shape
        check_divisible(
            ("batch size", tokens_BS.shape[0], "act_batch"),
            ("sequence length", tokens_BS.shape[1], "act_sequence"),
            ("vocabulary", vocab, "vocab"),
            ("hidden size", hidden, "embed"),
        )
        return constrain(_lookup(dtype, self.weight[...], tokens_BS), HIDDEN)


class _Layout:
    """Which mesh axes split what, under the active rules."""

    def __init__(self):
        self.batch, self.sequence = split_axes("act_batch"), split_axes("act_sequence")
        tokens = (*self.batch, *self.sequence)
        self.columns = tuple(axis for axis in split_axes("embed") if axis in tokens)
        self.rows = tuple(axis for axis in split_axes("vocab") if axis not in tokens)
        self.rest = tuple(axis for axis in tokens if axis not in self.columns)
        self.table = PartitionSpec(self.rows or None, self.columns or None)
        self.tokens = PartitionSpec(self.batch or None, self.sequence or None)

    def first_row(self, held: int) -> jax.Array | int:
        """The id of the first of the rows that a device holds."""
        return jax.lax.axis_index(self.rows) * held if self.rows else 0

    def all_tokens(self, tokens_BS: jax.Array) -> jax.Array:
        """[P * T]: the ids of the devices that hold other columns of the same rows."""
        tokens = tokens_BS.reshape(-1)
        return jax.lax.all_gather(tokens, self.columns, axis=0, tiled=True) if self.columns else tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: str, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    layout = _Layout()

    def of_device(table, tokens_BS):
        ids = layout.all_tokens(tokens_BS)
        rows = look_up(table.astype(dtype), ids, layout.first_row(table.shape[0]), table_VD.shape[0])
        if layout.rows:
            rows = jax.lax.psum(rows, layout.rows)
        if layout.columns:
            rows = jax.lax.all_to_all(rows, layout.columns, split_axis=0, concat_axis=1, tiled=True)
        return rows.reshape(*tokens_BS.shape, -1)

    return jax.shard_map(of_device, in_specs=(layout.table, layout.tokens), out_specs=layout.tokens)(
        table_VD, tokens_BS
    )


def _forward(dtype, table_VD, tokens_BS):
    # An empty slice carries the table's shape and dtype to the backward, and no data.
    return _lookup(dtype, table_VD, tokens_BS), (tokens_BS, table_VD[:, :0])


def _backward(dtype, saved, gradient_BSD):
    tokens_BS, like = saved
    layout = _Layout()

    def of_device(gradient_BSD, tokens_BS):
        gradient = gradient_BSD.reshape(-1, gradient_BSD.shape[-1])
        if layout.columns:
            gradient = jax.lax.all_to_all(gradient, layout.columns, split_axis=1, concat_axis=0, tiled=True)
        held = like.shape[0] // (jax.lax.axis_size(layout.rows) if layout.rows else 1)
        zeros = vary(jnp.zeros((held, gradient.shape[1]), jnp.float32), (*layout.rows, *layout.columns, *layout.rest))
        ids = layout.all_tokens(tokens_BS) - layout.first_row(held)
        total = add_gradients(zeros, ids, vary(gradient, layout.rows))
        return jax.lax.psum(total, layout.rest) if layout.rest else total

    specs = {"in_specs": (layout.tokens, layout.tokens), "out_specs": layout.table}
    total_VD = jax.shard_map(of_device, **specs)(gradient_BSD, tokens_BS)
    return total_VD.astype(like.dtype), None


_lookup.defvjp(_forward, _backward)
