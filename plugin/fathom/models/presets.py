"""Sharding presets that follow from a model's default one."""

from __future__ import annotations

from fathom.mesh import Rules


def long_preset(default: Rules) -> Rules:
    """For few rows of many tokens: what shards weights and experts cuts the sequence too.

    Weights that are no expert's lie over `fsdp` and `expert`, held once rather than once for each group of experts.
    """
    weights = {axis for axis, mesh in default.items() if mesh == "fsdp"} - {"expert_embed"}
    spread = dict.fromkeys(weights, ("fsdp", "expert"))
    return {**default, **spread, "act_batch": "data", "act_sequence": ("fsdp", "expert", "context")}
