"""The two compressors of V4: softmax-pooled windows of tokens (README.md "Compressors").

HCA pools the `ratio` tokens of each window. CSA's windows overlap: an entry pools the first half of the channels of
the previous window's tokens and the second half of the current window's. Windows are anchored at each document's
start; an incomplete last window gives no entry. Letters: E entries, m tokens per window, c pooled channels,
P projected channels (c, or 2c with overlap).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.documents import Windows
from fathom.layers.linear import Linear
from fathom.layers.norms import RMSNorm
from fathom.layers.param import constant, param


def gather_windows(x_BSP: jax.Array, windows: Windows, *, back: int = 0) -> jax.Array:
    """The tokens of each closing window: [B, E, m, P].

    Args:
      x_BSP: per-token values.
      windows: where the windows close.
      back: 0 for the window that closes, 1 for the one before it in the same document. Windows that do not
        exist hold arbitrary tokens; the caller masks them.
    """
    m = windows.ratio
    if windows.aligned:
        entries = windows.num_entries
        x = x_BSP[:, : entries * m].reshape(x_BSP.shape[0], entries, m, -1)
        return jnp.roll(x, back, axis=1)
    offsets = jnp.arange(m) - (m - 1) - back * m
    index = windows.closing_BE[..., None] + offsets
    # Row by row: XLA partitions a gather over its batch dimensions, and gathers the whole batch on every device
    # where the row is just another index.
    return jax.vmap(lambda row, places: row.at[places].get(mode="clip"))(x_BSP, index)


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
        self.wkv = Linear(rngs, (hidden_size, size), axes, stddev=stddev, dtype=dtype)
        self.wgate = Linear(rngs, (hidden_size, size), axes, stddev=stddev, dtype=dtype)
        self.ape = param(
            rngs.params(), (ratio, size), constant(0.0), axes=(None, None), dtype="float32"
        )
        self.norm = RMSNorm(rngs, width, eps=eps, dtype=dtype)

    def __call__(self, x_BSD: jax.Array, windows: Windows) -> jax.Array:
        """Entries [B, E, c] in x's dtype; projections are accumulated and pooled in float32."""
        values = self.wkv.contract("bsd,dp->bsp", x_BSD, jnp.float32)
        logits = self.wgate.contract("bsd,dp->bsp", x_BSD, jnp.float32)
        ape = self.ape[...]
        if not self.overlap:
            slots_v = gather_windows(values, windows)
            slots_g = gather_windows(logits, windows) + ape
        else:
            c = self.width
            before = windows.start_BE >= windows.ratio  # there is a previous window
            before = before[..., None, None]
            old_g = gather_windows(logits[..., :c], windows, back=1) + ape[:, :c]
            old_v = gather_windows(values[..., :c], windows, back=1)
            slots_g = jnp.concatenate(
                [
                    jnp.where(before, old_g, -jnp.inf),
                    gather_windows(logits[..., c:], windows) + ape[:, c:],
                ],
                axis=2,
            )
            slots_v = jnp.concatenate(
                [jnp.where(before, old_v, 0.0), gather_windows(values[..., c:], windows)], axis=2
            )
        pooled = jnp.sum(jax.nn.softmax(slots_g, axis=2) * slots_v, axis=2)
        return self.norm(pooled).astype(x_BSD.dtype)
