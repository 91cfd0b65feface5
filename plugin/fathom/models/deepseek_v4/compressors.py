"""The two compressors of V4: softmax-pooled windows of tokens (README.md "Compressors").

HCA pools the `ratio` tokens of each window. CSA's windows overlap: an entry pools the first half of the channels of
the previous window's tokens and the second half of the current window's. Windows are anchored at each document's
start; an incomplete last window gives no entry.

A stretch of tokens makes the entries that close in it, from its own tokens and the few before them. A device's tokens
are one stretch or several, and the entries of all of them are put together in closing order (`gather_entries`), so that
every query finds the same entries however the sequence is cut.

Letters: B batch, S tokens, T tokens with those before them, E entries, m tokens per window, c pooled channels,
P projected channels (c, or 2c with overlap), C entries that a stretch can close.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.documents import Windows
from fathom.layers.linear import Linear
from fathom.layers.norms import RMSNorm
from fathom.layers.param import Matrix, constant, param
from fathom.layers.shards import START, Place, Shard
from fathom.ops.chunks import sums_in_float32, to_chunks
from fathom.ops.permute import gather_rows
from fathom.ops.platform import program_platform


@dataclasses.dataclass(frozen=True)
class Stretches:
    """How a device's tokens are cut into stretches.

    Attributes:
      windows: of the whole row. shard: where the device stands. tokens: S. length: of a stretch.
    """

    windows: Windows
    shard: Shard
    tokens: int
    length: int

    @property
    def count(self) -> int:
        return -(-self.tokens // self.length)

    @property
    def aligned(self) -> bool:
        """True where each row is one document, and each stretch whole windows of it."""
        whole_windows = self.length % self.windows.ratio == 0 and self.tokens % self.length == 0
        return self.windows.aligned and (self.whole or whole_windows)

    @property
    def capacity(self) -> int:
        """C: a window closes at most every m tokens, and the first may close at a stretch's first token."""
        return self.windows.num_entries if self.whole else -(-self.length // self.windows.ratio)

    @property
    def whole(self) -> bool:
        """True where one stretch is all there is."""
        return self.count * self.shard.count == 1

    def reach(self, overlap: bool) -> int:
        """How many tokens before a stretch its entries pool."""
        m = self.windows.ratio
        if self.whole:
            return 0
        return (m if overlap else 0) if self.aligned else (2 * m - 1 if overlap else m - 1)

    def starts(self) -> jax.Array:
        """The row's token at which each of the device's stretches begins: [count]."""
        return self.shard.index() * self.tokens + jnp.arange(self.count) * self.length

    def entries(self) -> jax.Array:
        """Which entries each stretch of the device may close: [count, B, C], past the last where there are fewer."""
        before = self._closed_before(self.starts())
        return before[..., None] + jnp.arange(self.capacity)

    def _closed_before(self, starts: jax.Array) -> jax.Array:
        """How many entries have closed before each token: [len(starts), B]."""
        return (self.windows.closing_BE < starts[:, None, None]).sum(axis=-1, dtype=jnp.int32)

    def places(self) -> tuple[jax.Array, jax.Array]:
        """The slot of each entry among those of all stretches of all devices, [B, E], and the entry of each slot,
        [B, slots]; -1 where there is none."""
        closing, number = self.windows.closing_BE, jnp.arange(self.windows.num_entries)
        devices = jnp.arange(self.shard.count) * self.tokens
        starts = (devices[:, None] + jnp.arange(self.count) * self.length).reshape(-1)
        before = jnp.moveaxis(self._closed_before(starts), 0, 1)  # [B, stretches]
        stretch = closing // self.tokens * self.count + closing % self.tokens // self.length
        stretch = jnp.minimum(stretch, len(starts) - 1)
        slot = stretch * self.capacity + number - jnp.take_along_axis(before, stretch, axis=1)
        exists = closing < self.shard.count * self.tokens
        entry = before[..., None] + jnp.arange(self.capacity)
        following = jnp.concatenate([before[:, 1:], exists.sum(axis=1, keepdims=True, dtype=jnp.int32)], axis=1)
        entry = jnp.where(entry < following[..., None], entry, -1)
        return jnp.where(exists, slot, -1), entry.reshape(entry.shape[0], -1)


def make_stretches(tokens: int, windows: Windows, place: Place) -> Stretches:
    """The stretches of a device's tokens."""
    return Stretches(windows, place.shard, tokens, min(place.stretch or tokens, tokens))


def gather_entries(made: jax.Array, stretches: Stretches) -> jax.Array:
    """What the device's stretches closed, [count, B, C, ...], as the row's entries in closing order, [B, E, ...].

    One all-gather where the sequence is cut over devices.
    """
    if stretches.whole:
        return made[0]
    slots = jnp.moveaxis(stretches.shard.gather(made, axis=0), 0, 1)
    slots = slots.reshape(slots.shape[0], -1, *slots.shape[3:])
    if stretches.aligned:
        return slots[:, : stretches.windows.num_entries]
    return gather_rows(slots, *stretches.places())


def _gather_windows(x_BTP: jax.Array, closing_BC: jax.Array, m: int, *, aligned: bool, back: int) -> jax.Array:
    """The tokens of each window: [B, C, m, P].

    Args:
      x_BTP: the tokens of a stretch after those before it; closing_BC: where among them windows close.
      aligned: whether x is whole windows from its first token on, of which the last C close.
      back: 0 for the window that closes, 1 for the one before it. Windows that do not exist hold arbitrary tokens;
        the caller masks them.
    """
    if aligned:
        x = x_BTP[:, : x_BTP.shape[1] // m * m]
        x = x.reshape(x.shape[0], -1, m, x.shape[-1])
        return jnp.roll(x, back, axis=1)[:, x.shape[1] - closing_BC.shape[1] :]
    index = closing_BC[..., None] + jnp.arange(m) - (m - 1) - back * m
    # Row by row: XLA partitions a gather over its batch dimensions, and gathers the whole batch on every device
    # where the row is just another index.
    return jax.vmap(lambda row, places: row.at[places].get(mode="clip"))(x_BTP, index)


def _before_each(chunks: jax.Array, first_BLD: jax.Array) -> jax.Array:
    """The L tokens before each stretch [count, B, length, D], given those before the first: [count, B, L, D]."""
    reach, length = first_BLD.shape[1], chunks.shape[2]
    if length >= reach:
        return jnp.concatenate([first_BLD[None], chunks[:-1, :, length - reach :]])
    row = jnp.moveaxis(chunks, 0, 1).reshape(first_BLD.shape[0], -1, chunks.shape[-1])
    row = jnp.concatenate([first_BLD, row], axis=1)
    return jnp.stack([row[:, i * length :][:, :reach] for i in range(chunks.shape[0])])


def _pool(slots_v: jax.Array, slots_g: jax.Array) -> jax.Array:
    """Values weighed by the softmax of the logits over the slots: [B, C, slots, c] each, to [B, C, c]."""
    peak = jax.lax.stop_gradient(slots_g.max(axis=2, keepdims=True))
    weights = jnp.exp(slots_g - peak)
    # Divided before they weigh, as the reference does: FP8 simulation turns a last bit into a rounding step.
    return _sum_slots(weights / _sum_slots(weights)[:, :, None] * slots_v)


def _sum_slots(x: jax.Array) -> jax.Array:
    """The sum over the third dimension."""
    if program_platform() != "cpu":
        return x.sum(axis=2)
    # By halves: jaxlib 0.10's CPU takes several times as long over a sum along a dimension neither first nor last.
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        rest = x[:, :, 2 * half :]
        x = jnp.concatenate([x[:, :, :half] + x[:, :, half : 2 * half], rest], axis=2)
    return x[:, :, 0]


class Compressor(nnx.Module):
    """Pools each window of tokens into one normalised entry, before RoPE.

    Attributes:
      wkv, wgate: [D, P] projections to values and pooling logits; ape: float32 [m, P] bias by place in the window.
      norm: RMSNorm over the c pooled channels.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        width: int,
        ratio: int,
        overlap: bool,
        eps: float,
        stddev: float,
        dtype: str,
    ):
        self.width, self.ratio, self.overlap = width, ratio, overlap
        size = 2 * width if overlap else width
        axes = ("embed", "compressed")
        # The overlapping compressor's two sets of columns are two matrices.
        matrix = Matrix(parts=(width, width) if overlap else ())
        common = dict(stddev=stddev, dtype=dtype, matrix=matrix)
        self.wkv = Linear(rngs, (hidden_size, size), axes, **common)
        self.wgate = Linear(rngs, (hidden_size, size), axes, **common)
        self.ape = param(
            rngs.params(), (ratio, size), constant(0.0), axes=(None, None), dtype="float32"
        )
        self.norm = RMSNorm(rngs, width, eps=eps, dtype=dtype)

    def __call__(self, x_BSD: jax.Array, windows: Windows, place: Place = START) -> jax.Array:
        """Entries [B, E, c] of the whole row, in x's dtype; projections are accumulated and pooled in float32.

        Args:
          x_BSD: the device's tokens. windows: those of the row. place: where the tokens stand; `before_BLD` holds at
            least `reach` tokens.
        """
        stretches = make_stretches(x_BSD.shape[1], windows, place)
        return gather_entries(self._of_stretches(x_BSD, place.before_BLD, stretches), stretches)

    def reach(self, tokens: int, windows: Windows, place: Place = START) -> int:
        """How many tokens before the first of a device's `tokens` are pooled."""
        return make_stretches(tokens, windows, place).reach(self.overlap)

    def _of_stretches(self, x_BSD: jax.Array, before_BLD: jax.Array | None, stretches: Stretches) -> jax.Array:
        """What each stretch of the device closes: [count, B, C, c]."""
        windows, reach = stretches.windows, stretches.reach(self.overlap)
        has_before = windows.start_BE >= windows.ratio  # there is a previous window
        if stretches.whole:
            return self._close(x_BSD, windows.closing_BE, has_before, aligned=stretches.aligned)[None]
        chunks = to_chunks(x_BSD, stretches.length)
        first = jnp.zeros((x_BSD.shape[0], reach, x_BSD.shape[2]), x_BSD.dtype)
        if before_BLD is not None:
            first = before_BLD[:, before_BLD.shape[1] - reach :]
        before = _before_each(chunks, first)

        def one_stretch(parts):
            x, before, start, entries = parts
            x = jnp.concatenate([before, x], axis=1)
            closing = jnp.take_along_axis(windows.closing_BE, entries, axis=1, mode="clip") - start + reach
            overlaps = jnp.take_along_axis(has_before, entries, axis=1, mode="clip")
            return self._close(x, closing, overlaps, aligned=stretches.aligned)

        parts = chunks, before, stretches.starts(), stretches.entries()
        one_stretch = sums_in_float32(one_stretch, jax.tree.map(lambda x: x[0], parts))
        return jax.lax.map(jax.checkpoint(one_stretch), parts)

    def _close(self, x_BTD: jax.Array, closing_BC: jax.Array, has_before_BC: jax.Array, *, aligned: bool) -> jax.Array:
        """The entries whose windows close at the given tokens of x: [B, C, c]."""
        values = self.wkv.contract("bsd,dp->bsp", x_BTD, jnp.float32)
        logits = self.wgate.contract("bsd,dp->bsp", x_BTD, jnp.float32)
        ape, c = self.ape[...], self.width

        def slots(x_BTP: jax.Array, back: int = 0) -> jax.Array:
            return _gather_windows(x_BTP, closing_BC, self.ratio, aligned=aligned, back=back)

        if not self.overlap:
            slots_v, slots_g = slots(values), slots(logits) + ape
        else:
            before = has_before_BC[..., None, None]
            old_g = slots(logits[..., :c], back=1) + ape[:, :c]
            old_v = slots(values[..., :c], back=1)
            slots_g = jnp.concatenate([jnp.where(before, old_g, -jnp.inf), slots(logits[..., c:]) + ape[:, c:]], axis=2)
            slots_v = jnp.concatenate([jnp.where(before, old_v, 0.0), slots(values[..., c:])], axis=2)
        return self.norm(_pool(slots_v, slots_g)).astype(x_BTD.dtype)
