"""Sharding presets of V4: logical axis -> mesh axes, as data.

Every preset knows every logical axis that the model's weights and activations name.
"""

from __future__ import annotations

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

LONG = DEFAULT | {
    # Few rows of many tokens: what shards weights and experts cuts the sequence too.
    "act_batch": "data",
    "act_sequence": ("fsdp", "expert", "context"),
    # What is not an expert's is held once, not once for each group of experts.
    "embed": ("fsdp", "expert"),
    "q_lora_in": ("fsdp", "expert"),
    "o_group_in": ("fsdp", "expert"),
}

PRESETS = {"default": DEFAULT, "long": LONG}
