"""Sharding presets of V4: logical axis -> mesh axes, as data.

Every preset knows every logical axis that the model's weights and activations name.
"""

from __future__ import annotations

from fathom.models.presets import presets

DEFAULT: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "vocab": "tensor",
    "embed": "fsdp",
    "expert": "expert",
    "expert_embed": "fsdp",  # of the experts alone
    "expert_mlp": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    "q_lora": None,
    "q_lora_in": "fsdp",
    "o_groups": "tensor",
    "o_group_in": "fsdp",
    "compressed": None,
    "index_heads": None,  # scores sum over index heads; splitting them would all-reduce every score
    "router_experts": None,
    "hash_vocab": None,
    "norm": None,
    "projection": None,
    "layers": None,
    # activations
    "act_batch": ("data", "fsdp", "expert"),
    "act_sequence": "context",
    "act_embed": None,
    "act_heads": "tensor",
    "act_groups": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}

PRESETS = presets(DEFAULT)
