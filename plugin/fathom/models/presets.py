"""Sharding presets that follow from a model's default one."""

from __future__ import annotations

from fathom.mesh import Rules


def spread_preset(default: Rules) -> Rules:
    """Weights that are no expert's lie over `fsdp` and `expert`: held once, not once for each group of experts."""
    weights = {axis for axis, mesh in default.items() if mesh == "fsdp"} - {"expert_embed"}
    return {**default, **dict.fromkeys(weights, ("fsdp", "expert"))}


def long_preset(default: Rules) -> Rules:
    """For few rows of many tokens: weights as in `spread_preset`, and what shards them cuts the sequence too."""
    return {**spread_preset(default), "act_batch": "data", "act_sequence": ("fsdp", "expert", "context")}


def presets(default: Rules) -> dict[str, Rules]:
    """The presets of a model, by the names that recipes give them."""
    return {"default": default, "spread": spread_preset(default), "long": long_preset(default)}
