"""A third party's model: an embedding and an MLP, with a ModelSpec of its own.

It has what the loop must cope with: dropout, state that is not trained, a parameter frozen in one
stage, stacked layers, and matrices for Muon. Tests install it as a distribution with an entry point (`install`).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.losses import target_masks
from fathom.layers.param import MATRIX, RouterBias, constant, normal, param
from fathom.mesh import constrain
from fathom.zoo import ModelSpec, ParamCount


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 264
    hidden_size: int = 16
    mlp_size: int = 32
    num_layers: int = 2
    dropout: float = 0.0
    taps: tuple[int, ...] = (1, 2)


class ToyModel(nnx.Module):
    def __init__(self, config: ToyConfig, rngs: nnx.Rngs, options):
        c, dtype = config, options.param_dtype
        self.config, self.dtype = config, jnp.dtype(options.dtype)
        key = rngs.params
        shape = (c.vocab_size, c.hidden_size)
        self.embed = param(key(), shape, normal(0.1), axes=("vocab", "embed"), dtype=dtype)
        stacked = ("layers", "embed", "mlp")
        up = (c.num_layers, c.hidden_size, c.mlp_size)
        self.up = param(key(), up, normal(0.1), axes=stacked, dtype=dtype, matrix=MATRIX)
        down = (c.num_layers, c.mlp_size, c.hidden_size)
        stacked = ("layers", "mlp", "embed")
        self.down = param(key(), down, normal(0.1), axes=stacked, dtype=dtype, matrix=MATRIX)
        gain = (c.num_layers, c.hidden_size)
        self.gain = param(key(), gain, constant(1.0), axes=("layers", "embed"), dtype=dtype)
        self.temperature = param(key(), (1,), constant(1.0), axes=(None,), dtype="float32")
        self.seen = param(
            key(), (c.vocab_size,), constant(0.0), axes=("vocab",), dtype="float32", kind=RouterBias
        )
        self.dropout = nnx.Dropout(c.dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, S] -> float32 logits [B, S, V]; token s sees itself and the taps before it."""
        x = self.embed[...][tokens].astype(self.dtype)
        mixed = x
        for tap in self.config.taps:
            mixed = mixed + jnp.pad(x, ((0, 0), (tap, 0), (0, 0)))[:, : x.shape[1]] / (tap + 1)
        x = constrain(mixed, ("act_batch", "act_sequence", None))
        for layer in range(self.config.num_layers):
            hidden = jax.nn.gelu(x @ self.up[...][layer].astype(self.dtype))
            hidden = self.dropout(hidden)
            x = x + (hidden @ self.down[...][layer].astype(self.dtype)) * self.gain[...][layer]
        logits = x.astype(jnp.float32) @ self.embed[...].astype(jnp.float32).T
        return logits * self.temperature[...]


def toy_loss(model, batch, weights, counts):
    mask, _ = target_masks(batch)
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    log_probs = jax.nn.log_softmax(model(batch["tokens"]))
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    loss = -(picked * mask).sum() / counts.tokens
    used = jnp.zeros(model.config.vocab_size).at[batch["tokens"]].add(mask)
    return loss, {"loss/main": loss, "tokens_used": used, "expert_load": {"toy": used.reshape(8, -1).sum(1)}}


def count_seen(state, aux, speed):
    return jax.tree.map(lambda seen: seen + aux["tokens_used"], state)


def count_params(config: ToyConfig) -> ParamCount:
    per_layer = config.hidden_size * (2 * config.mlp_size + 1)
    total = config.vocab_size * config.hidden_size + config.num_layers * per_layer + 1
    return ParamCount(total, total)


TOY = ModelSpec(
    name="toy-lm",
    config=ToyConfig(),
    build=ToyModel,
    loss=toy_loss,
    sharding_presets={
        "default": {
            "act_batch": ("data", "fsdp", "expert"),
            "act_sequence": "context",
            "vocab": None,
            "embed": "fsdp",
            "mlp": "tensor",
            "layers": None,
        }
    },
    num_params=count_params,
    flops_per_token=lambda config, sequence_length: 6.0 * count_params(config).total,
    update_state=count_seen,
    frozen=lambda path, stage: stage == "dense" and path[-1] == "temperature",
)


def make_spec() -> ModelSpec:
    """What the entry point names."""
    return TOY


def install(folder: Path) -> None:
    """Lays out `folder` like an installed distribution: a module and metadata with an entry point."""
    shutil.copy(__file__, folder / "toy_lm.py")
    info = folder / "toy_lm-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-lm\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[fathom.models]\ntoy-lm = toy_lm:make_spec\n")
