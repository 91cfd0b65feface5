"""How the zoo's language models train: their loss, their router biases, and what a stage leaves alone.

Nothing here imports jax before it is called: what reads only configs and tensor tables does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from flax import nnx


def loss(module: nnx.Module, batch: Any, weights: Any, counts: Any) -> tuple[jax.Array, dict[str, Any]]:
    """See `fathom.layers.losses.language_model_loss`."""
    from fathom.layers.losses import language_model_loss

    return language_model_loss(module, batch, weights, counts)


def route(module: nnx.Module, batch: Any) -> dict[str, jax.Array]:
    """The experts of every token at every learned router: block path -> int32 [B, S, K] or [B, repeats, S, K]."""
    features = module.features(
        batch["tokens"], batch.get("positions"), batch.get("segment_ids"), return_routing=True
    )
    return features.aux["routing"]


def update_state(state: nnx.State, aux: dict[str, Any], speed: float) -> nnx.State:
    """See `fathom.layers.router_bias.update_router_bias`."""
    from fathom.layers.router_bias import update_router_bias

    return update_router_bias(state, aux, speed)


def frozen(path: tuple, stage: str) -> bool:
    """The language-model loss never reaches the indexer: it trains by its own loss or not at all."""
    if stage == "indexer-warmup":
        return "indexer" not in path
    return stage == "dense" and "indexer" in path
