"""The architecture of DeepSeek-V4: plain numbers, one named constructor per released model.

The Hub's spellings of the same numbers live in `hf_config.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.models.config_parts import (
    MAX_LAYERS,
    MAX_LAYERS_TIMES_EXPERTS,
    LayerPlan,
    YarnScaling,
    check_at_most,
    check_divides,
    check_int,
    check_tokens,
    check_yarn_length,
    plan_layers,
    set_part,
    set_reals,
    set_tuples,
)

ATTENTION_KINDS = ("sliding", "csa", "hca")
ROUTER_KINDS = ("hash", "learned")
MTP_KINDS = ("mtp", "dspark")
EXPERT_DTYPES = ("fp4", "fp8", None)


@dataclasses.dataclass(frozen=True)
class DsparkConfig:
    """Numbers of the DSpark re-releases' speculative heads, as their config names them."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layer_ids", tuple(self.target_layer_ids))
        check_int("dspark.block_size", self.block_size, 1)
        check_int("dspark.noise_token_id", self.noise_token_id, 0)
        check_int("dspark.markov_rank", self.markov_rank, 1)
        for layer in self.target_layer_ids:
            check_int("dspark.target_layer_ids", layer, 0)


_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "head_dim",
    "rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_num_heads",
    "index_head_dim",
    "index_top_k",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
_POSITIVE_REALS = (
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
    "initializer_range",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV4Config:
    """Every number of a DeepSeek-V4 architecture. Multi-token-prediction blocks are sliding layers
    with a learned router.

    Attributes:
      attention_kinds: per layer "sliding", "csa" (overlapping compressor, indexer, top-k) or "hca"
        (plain compressor, every visible entry).
      compress_ratios: per layer tokens per compressed entry, 0 for sliding layers.
      router_kinds: per layer "hash" (table by token id) or "learned".
      head_dim: width of a head and of the one shared key/value; its last `rope_head_dim` channels
        rotate.
      o_groups, o_lora_rank: groups of the low-rank output projection and the rank of each.
      num_shared_experts: their joint width is `moe_intermediate_size * num_shared_experts`.
      swiglu_limit: clamp of the experts' gate (above) and up projection (both sides).
      hc_mult: number of residual streams.
      rope_theta: RoPE base of sliding layers; `compress_rope_theta` that of compressed ones, which
        alone use `rope_scaling`.
      num_mtp_layers, mtp_kind: multi-token-prediction blocks; "dspark" also needs `dspark`.
      expert_dtype: how a released file stores routed experts, None when its config does not say.
      eos_token_id: one id, several, or None.

    Raises:
      ValueError: naming the field, what was found and what was expected.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    attention_kinds: tuple[str, ...]
    compress_ratios: tuple[int, ...]
    router_kinds: tuple[str, ...]
    sliding_window: int
    index_num_heads: int
    index_head_dim: int
    index_top_k: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    num_mtp_layers: int
    mtp_kind: str = "mtp"
    dspark: DsparkConfig | None = None
    initializer_range: float = 0.02
    expert_dtype: str | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        set_tuples(self, ("attention_kinds", "compress_ratios", "router_kinds", "eos_token_id"))
        set_part(self, "rope_scaling", YarnScaling)
        set_part(self, "dspark", DsparkConfig)
        for name in _POSITIVE_INTS:
            check_int(name, getattr(self, name), 1)
        set_reals(self, _POSITIVE_REALS)
        check_int("num_mtp_layers", self.num_mtp_layers, 0)
        self._check_layers()
        self._check_widths()
        check_yarn_length(self)
        self._check_rest()
        check_tokens(self)

    def _check_layers(self) -> None:
        for name in ("attention_kinds", "compress_ratios", "router_kinds"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a tuple")
        count = len(self.attention_kinds)
        if not 1 <= count <= MAX_LAYERS:
            raise ValueError(f"attention_kinds: {count} layers, expected 1 to {MAX_LAYERS}")
        blocks = count + self.num_mtp_layers
        check_at_most("num_layers + num_mtp_layers", blocks, "the limit", MAX_LAYERS)
        experts = blocks * self.num_experts
        check_at_most("(num_layers + num_mtp_layers) x num_experts", experts, "the limit", MAX_LAYERS_TIMES_EXPERTS)
        for name in ("compress_ratios", "router_kinds"):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, attention_kinds has {count}; "
                    "give one per layer"
                )
        for index, (kind, ratio, router) in enumerate(self.layer_kinds):
            if kind not in ATTENTION_KINDS:
                raise ValueError(
                    f"attention_kinds[{index}]: found {kind!r}, expected one of {ATTENTION_KINDS}"
                )
            if router not in ROUTER_KINDS:
                raise ValueError(
                    f"router_kinds[{index}]: found {router!r}, expected one of {ROUTER_KINDS}"
                )
            check_int(f"compress_ratios[{index}]", ratio, 0)
            if (kind == "sliding") != (ratio == 0):
                raise ValueError(
                    f"compress_ratios[{index}]: found {ratio} for a {kind!r} layer, expected "
                    f"{'0' if kind == 'sliding' else 'at least 1'}"
                )
            check_at_most(
                f"compress_ratios[{index}]", ratio, "max_position_embeddings",
                self.max_position_embeddings,
            )  # fmt: skip

    def _check_widths(self) -> None:
        check_divides("num_heads", self.num_heads, "o_groups", self.o_groups)
        check_divides("rope_head_dim", self.rope_head_dim, "the pair size", 2)
        check_at_most("rope_head_dim", self.rope_head_dim, "head_dim", self.head_dim)
        if "csa" in self.attention_kinds:
            check_at_most(
                "rope_head_dim", self.rope_head_dim, "index_head_dim", self.index_head_dim
            )
        check_at_most(
            "num_experts_per_tok", self.num_experts_per_tok, "num_experts", self.num_experts
        )

    def _check_rest(self) -> None:
        if self.mtp_kind not in MTP_KINDS:
            raise ValueError(f"mtp_kind: found {self.mtp_kind!r}, expected one of {MTP_KINDS}")
        if (self.mtp_kind == "dspark") != (self.dspark is not None):
            raise ValueError(
                f"mtp_kind {self.mtp_kind!r} with dspark {self.dspark!r}: the dspark numbers go "
                "with mtp_kind 'dspark' and with nothing else"
            )
        if self.dspark is not None:
            for layer in self.dspark.target_layer_ids:
                check_at_most(
                    "dspark.target_layer_ids", layer, "the last layer", self.num_layers - 1
                )
        if self.expert_dtype not in EXPERT_DTYPES:
            raise ValueError(
                f"expert_dtype: found {self.expert_dtype!r}, expected one of {EXPERT_DTYPES}"
            )

    def require_plain_mtp(self) -> None:
        """Raises ValueError for DSpark's blocks, whose structure this model does not have."""
        if self.num_mtp_layers and self.mtp_kind != "mtp":
            raise ValueError(
                f"mtp_kind {self.mtp_kind!r}: its blocks are not part of this model; leave them "
                "out with num_mtp_layers=0, mtp_kind='mtp', dspark=None"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the main model, without multi-token prediction."""
        return len(self.attention_kinds)

    @property
    def layer_kinds(self) -> tuple[tuple[str, int, str], ...]:
        """(attention kind, compress ratio, router kind) of each layer."""
        return tuple(
            zip(self.attention_kinds, self.compress_ratios, self.router_kinds, strict=True)
        )

    @property
    def plan(self) -> LayerPlan:
        """Which layers are unrolled and which are scanned, derived from the schedule."""
        return plan_layers(self.layer_kinds)

    @classmethod
    def flash(cls) -> DeepseekV4Config:
        """DeepSeek-V4-Flash, 284B parameters, 13B active."""
        return cls(
            **_RELEASED,
            hidden_size=4096,
            num_heads=64,
            q_lora_rank=1024,
            o_groups=8,
            **_schedule((0, 0) + (4, 128) * 20 + (4,), num_hash_layers=3),
            index_top_k=512,
            moe_intermediate_size=2048,
            num_experts=256,
            routed_scaling_factor=1.5,
        )

    @classmethod
    def pro(cls) -> DeepseekV4Config:
        """DeepSeek-V4-Pro, 1.6T parameters, 49B active."""
        return cls(
            **_RELEASED,
            hidden_size=7168,
            num_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            **_schedule((128, 128) + (4, 128) * 29 + (4,), num_hash_layers=3),
            index_top_k=1024,
            moe_intermediate_size=3072,
            num_experts=384,
            routed_scaling_factor=2.5,
        )

    @classmethod
    def tiny(cls) -> DeepseekV4Config:
        """A model for one CPU that uses every feature of the released ones.

        Bytes and a few special tokens as vocabulary. YaRN starts from 64 positions, so that it
        matters at the few hundred that tests and the quickstart run.
        """
        return cls(
            vocab_size=264,
            hidden_size=128,
            num_heads=4,
            head_dim=80,
            rope_head_dim=16,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=32,
            **_schedule((0, 4, 16, 4, 16, 4), num_hash_layers=2),
            sliding_window=32,
            index_num_heads=16,
            index_head_dim=32,
            index_top_k=16,
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
            hc_mult=4,
            hc_sinkhorn_iters=20,
            hc_eps=1e-6,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            compress_rope_theta=1.6e5,
            rope_scaling=YarnScaling(16.0, 64, 32.0, 1.0),
            max_position_embeddings=4096,
            num_mtp_layers=1,
            initializer_range=0.06,
        )

    @classmethod
    def from_hf_config(cls, source: Mapping[str, Any] | str | Path) -> DeepseekV4Config:
        """Reads a Hub `config.json` (a dict, the file or its folder) in any of its spellings.

        Raises:
          ValueError: listing every unknown key, missing field and contradiction at once.
        """
        from fathom.models.deepseek_v4 import hf_config

        return hf_config.read(source)

    def to_hf_config(self) -> dict[str, Any]:
        """The Hub's native spelling; `from_hf_config(config.to_hf_config()) == config`."""
        from fathom.models.deepseek_v4 import hf_config

        return hf_config.write(self)


def kinds_of_ratios(ratios: tuple[int, ...]) -> tuple[str, ...]:
    """The reference's rule: ratio 0 is sliding, 4 overlaps and has the indexer (csa), any other is
    hca."""
    return tuple({0: "sliding", 4: "csa"}.get(ratio, "hca") for ratio in ratios)


def _schedule(ratios: tuple[int, ...], num_hash_layers: int) -> dict[str, Any]:
    return {
        "attention_kinds": kinds_of_ratios(ratios),
        "compress_ratios": ratios,
        "router_kinds": ("hash",) * num_hash_layers
        + ("learned",) * (len(ratios) - num_hash_layers),
    }


# What Flash and Pro share.
_RELEASED: dict[str, Any] = {
    "vocab_size": 129280,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_num_heads": 64,
    "index_head_dim": 128,
    "num_experts_per_tok": 6,
    "num_shared_experts": 1,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "compress_rope_theta": 1.6e5,
    "rope_scaling": YarnScaling(16.0, 65536, 32.0, 1.0),
    "max_position_embeddings": 1048576,
    "num_mtp_layers": 1,
    "expert_dtype": "fp4",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
