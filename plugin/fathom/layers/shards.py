"""A sublayer on one device: its rows of the batch, its stretch of the sequence, its heads.

`per_device` runs a module's function once per device, on the device's own queries and heads, with the weights whole in
every other dimension. What crosses between devices is written out: `Shard.before` fetches the tokens that precede a
device's own, `Shard.gather` the entries of all devices, and head sums are added at the end. The gradients of weights
are summed over the devices once, after the last stretch of the backward.

Letters: B batch, S tokens of a device, L tokens before them, T tokens of the whole row, E entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from fathom.mesh import active_rules, axis_size, check_divisible, split_axes, variable_axes

QUERIES, KEYS = "per query", "per key"
"""Kinds of arrays: [B, S, ...] cut along batch and sequence, [B, anything, ...] cut along the batch alone."""
SPLIT_WEIGHTS = ("heads", "o_groups")
"""Logical axes of weights that stay split inside: each device computes its own heads."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where a device stands.

    Attributes:
      sequence: mesh axes that cut the sequence, outermost first; count: into how many contiguous pieces.
      heads: mesh axes that cut the heads. tokens: mesh axes that cut batch or sequence.
    """

    sequence: tuple[str, ...] = ()
    count: int = 1
    heads: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def index(self) -> jax.Array | int:
        """Which piece of the sequence this device holds."""
        return jax.lax.axis_index(self.sequence) if self.sequence else 0

    def before(self, tree: Any, counts: Any) -> Any:
        """For each array [B, S, ...] the `count` tokens before this device's first: [B, count, ...].

        Zeros before the row's first token. One exchange with the left neighbour for all arrays together, and one with
        each further device where a count exceeds the tokens that a device holds.
        """
        arrays, structure = jax.tree.flatten(tree)
        counts = structure.flatten_up_to(counts)
        parts: list[list[jax.Array]] = [[] for _ in arrays]
        for hop in range(1, self.count):
            wanted = [min(x.shape[1], n - (hop - 1) * x.shape[1]) for x, n in zip(arrays, counts, strict=True)]
            sent = [x[:, x.shape[1] - n :] if n > 0 else None for x, n in zip(arrays, wanted, strict=True)]
            if all(x is None for x in sent):
                break
            for part, x in zip(parts, self._shift(sent, hop), strict=True):
                if x is not None:
                    part.insert(0, x)
        filled = []
        for x, n, part in zip(arrays, counts, parts, strict=True):
            missing = n - sum(p.shape[1] for p in part)
            zeros = jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype)
            filled.append(jnp.concatenate([zeros, *part], axis=1))
        return structure.unflatten(filled)

    def _shift(self, arrays: list[jax.Array | None], hop: int) -> list[jax.Array | None]:
        """Each array from the device `hop` pieces to the left, all in one exchange; zeros where there is none."""
        some = [x for x in arrays if x is not None]
        flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in some], axis=1)
        pairs = [(i, i + hop) for i in range(self.count - hop)]
        flat, start, shifted = jax.lax.ppermute(flat, self.sequence, pairs), 0, []
        for x in arrays:
            if x is None:
                shifted.append(None)
                continue
            size = x.size // x.shape[0]
            shifted.append(flat[:, start : start + size].reshape(x.shape))
            start += size
        return shifted

    def mirror(self, tree: Any) -> Any:
        """Each array [B, S, ...] with the second half of its tokens exchanged for those of the mirror image's, the
        device as far from the row's other end. Its own inverse."""

        def of_array(x: jax.Array) -> jax.Array:
            half = x.shape[1] // 2
            return jnp.concatenate([x[:, :half], self.from_mirror(x[:, half:])], axis=1)

        return jax.tree.map(of_array, tree) if self.count > 1 else tree

    def from_mirror(self, x: jax.Array) -> jax.Array:
        """The mirror image's."""
        return jax.lax.ppermute(x, self.sequence, [(i, self.count - 1 - i) for i in range(self.count)])

    def gather(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The pieces of all devices of a row, in the order of the sequence."""
        return jax.lax.all_gather(x, self.sequence, axis=axis, tiled=True) if self.sequence else x

    def sum_heads(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that hold a token's heads."""
        return jax.lax.psum(x, self.heads) if self.heads else x

    def sum_tokens(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that hold different tokens."""
        return jax.lax.psum(x, self.tokens) if self.tokens else x


WHOLE = Shard()


def mirror_queries(shard: Shard, inputs: Any) -> Any:
    """`inputs` with the arrays that have one value per query mirrored (see `per_device` for their kinds)."""
    return jax.tree.map(lambda x, kind: shard.mirror(x) if kind == QUERIES else x, inputs, inputs.kinds())


def some_queries(inputs: Any, tokens: slice) -> Any:
    """`inputs` for some of the queries."""
    return jax.tree.map(lambda x, kind: x[:, tokens] if kind == QUERIES else x, inputs, inputs.kinds())


class Place(NamedTuple):
    """Where a sublayer's tokens stand, and how they are worked through.

    Attributes:
      shard: the device's. before_BLD: hidden states of the tokens before the device's first, as many as are needed;
        None at the start of a row that is not cut. stretch: tokens whose wide intermediate results are held at a time;
        None is all of them.
    """

    shard: Shard = WHOLE
    before_BLD: jax.Array | None = None
    stretch: int | None = None

    def detached(self) -> Place:
        """The same without gradients."""
        return self._replace(before_BLD=jax.lax.stop_gradient(self.before_BLD))


START = Place()


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """One logical axis per dimension; a scanned block's weight declares its stack's too, which the scan has taken."""
    rank = variable.get_value().ndim
    return (variable_axes(variable) or (None,) * rank)[-rank:]


def _split_sizes(module: nnx.Module) -> set[tuple[int, str]]:
    variables = jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {
        (size, axis)
        for variable in variables
        for size, axis in zip(variable.get_value().shape, _axes(variable), strict=True)
        if axis in SPLIT_WEIGHTS
    }


def _weight_specs(state: nnx.State, heads: tuple[str, ...]) -> nnx.State:
    def spec(variable: nnx.Variable) -> nnx.Variable:
        axes = [heads if axis in SPLIT_WEIGHTS and heads else None for axis in _axes(variable)]
        return variable.replace(PartitionSpec(*axes))

    return jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def per_device(
    module: nnx.Module, function: Callable[..., tuple[jax.Array, jax.Array]], x_BTD: jax.Array, inputs: Any, kinds: Any
) -> tuple[jax.Array, jax.Array]:
    """`function(module, shard, x, inputs)` on every device's part, or at once where nothing is split.

    Args:
      module: the sublayer; inside, its weights are whole but for the dimensions in `SPLIT_WEIGHTS`.
      function: returns y [B, S, D], already summed over heads, and a scalar already summed over tokens.
      x_BTD: hidden states. inputs: a tree of arrays; kinds: the same tree with QUERIES or KEYS in their places.

    Returns:
      y [B, T, D] and the scalar.

    Raises:
      ValueError: when the mesh does not divide the batch, the sequence or the heads.
    """
    if active_rules() is None or jax.sharding.get_abstract_mesh().empty:
        return function(module, WHOLE, x_BTD, inputs)
    batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
    heads = split_axes("heads")
    if not batch + sequence + heads:
        return function(module, WHOLE, x_BTD, inputs)
    check_divisible(
        ("batch size", x_BTD.shape[0], "act_batch"),
        ("sequence length", x_BTD.shape[1], "act_sequence"),
        *(("number of heads or groups", size, axis) for size, axis in sorted(_split_sizes(module))),
    )
    shard = Shard(sequence, axis_size("act_sequence"), heads, (*batch, *sequence))
    specs = {QUERIES: PartitionSpec(batch or None, sequence or None), KEYS: PartitionSpec(batch or None)}
    graph, state = nnx.split(module)

    def run(state: nnx.State, x: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        return function(nnx.merge(graph, state), shard, x, inputs)

    # Not checked for what varies over which axis: the check would have every weight cast at its use, and its gradient
    # summed over the devices there, once per stretch. Unchecked, what enters whole is summed once, at the end.
    mapped = jax.shard_map(
        run,
        in_specs=(_weight_specs(state, heads), specs[QUERIES], jax.tree.map(specs.get, kinds)),
        out_specs=(specs[QUERIES], PartitionSpec()),
        check_vma=False,
    )
    return mapped(state, x_BTD, inputs)
