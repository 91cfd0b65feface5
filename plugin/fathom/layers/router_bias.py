"""Auxiliary-loss-free balancing of the experts (README.md of models/deepseek_v4, "Routers")."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

ROUTER_BIAS_SUFFIX = ("ffn", "router", "bias")


def update_router_bias(state: nnx.State, aux: dict[str, Any], speed: float) -> nnx.State:
    """Auxiliary-loss-free balancing: each expert's bias moves by `speed` towards the mean load.

    Args:
      state: the model's non-Param variables; only router biases change.
      aux: the loss's aux; "expert_load" maps block path -> token counts [..., E] of the whole batch.
      speed: step of the bias (V4: 0.001).
    """
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if path[-len(ROUTER_BIAS_SUFFIX) :] != ROUTER_BIAS_SUFFIX:
            continue
        load = aux["expert_load"]["/".join(map(str, path[: -len(ROUTER_BIAS_SUFFIX)]))]
        error = jnp.mean(load, axis=-1, keepdims=True) - load
        flat[path] = variable.replace(variable.get_value() + speed * jnp.sign(error))
    return nnx.from_flat_state(flat)
