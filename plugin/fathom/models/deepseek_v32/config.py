"""The architecture of DeepSeek-V3.2: plain numbers, one named constructor per model.

The Hub's spellings of the same numbers live in `hf_config.py`.
"""

from __future__ import annotations

import dataclasses
import math
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

FFN_KINDS = ("dense", "moe")


def mscale_of(factor: float, mscale: float) -> float:
    """YaRN's attention scale 0.1 * mscale * ln(factor) + 1, and 1 where the context is not stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class MscaleYarn(YarnScaling):
    """YaRN with attention scales.

    Attributes:
      mscale, mscale_all_dim: cosines and sines are multiplied by the ratio of their scales (1 where they are equal),
        and the softmax scale by the square of the second one's.
    """

    mscale: float
    mscale_all_dim: float

    def __post_init__(self) -> None:
        super().__post_init__()
        set_reals(self, ("mscale", "mscale_all_dim"), "rope_scaling.")


_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "nope_head_dim",
    "rope_head_dim",
    "value_head_dim",
    "index_num_heads",
    "index_head_dim",
    "index_top_k",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "num_groups",
    "groups_per_token",
    "max_position_embeddings",
)
_POSITIVE_REALS = ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "initializer_range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV32Config:
    """Every number of a DeepSeek-V3.2 architecture. Multi-token-prediction blocks are layers with experts.

    Attributes:
      ffn_kinds: per layer "dense" (one SwiGLU of `intermediate_size`) or "moe".
      q_lora_rank, kv_lora_rank: widths of the queries' latent and of the latent that keys and values share.
      nope_head_dim, rope_head_dim, value_head_dim: channels of a head's query and key without and with RoPE, and of
        its value. The key's rotary channels are one vector for all heads.
      index_num_heads, index_head_dim, index_top_k: the lightning indexer, and the tokens it keeps for a query.
      num_shared_experts: their joint width is `moe_intermediate_size * num_shared_experts`.
      num_groups, groups_per_token: groups of experts, and how many of them a token may choose its experts from.
      rope_theta, rope_scaling: RoPE of queries, keys and indexer.
      num_mtp_layers: multi-token-prediction blocks.
      eos_token_id: one id, several, or None.

    Raises:
      ValueError: naming the field, what was found and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    ffn_kinds: tuple[str, ...]
    index_num_heads: int
    index_head_dim: int
    index_top_k: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    num_groups: int
    groups_per_token: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: MscaleYarn | None
    max_position_embeddings: int
    num_mtp_layers: int
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        set_tuples(self, ("ffn_kinds", "eos_token_id"))
        set_part(self, "rope_scaling", MscaleYarn)
        for name in _POSITIVE_INTS:
            check_int(name, getattr(self, name), 1)
        set_reals(self, _POSITIVE_REALS)
        check_int("num_mtp_layers", self.num_mtp_layers, 0)
        self._check_layers()
        self._check_widths()
        check_yarn_length(self)
        check_tokens(self)

    def _check_layers(self) -> None:
        kinds = self.ffn_kinds
        if not isinstance(kinds, tuple) or not 1 <= len(kinds) <= MAX_LAYERS:
            raise ValueError(f"ffn_kinds: found {kinds!r}, expected a tuple of 1 to {MAX_LAYERS} layers")
        for index, kind in enumerate(kinds):
            if kind not in FFN_KINDS:
                raise ValueError(f"ffn_kinds[{index}]: found {kind!r}, expected one of {FFN_KINDS}")
        experts = len(kinds) * self.num_experts
        check_at_most("num_layers x num_experts", experts, "the limit", MAX_LAYERS_TIMES_EXPERTS)

    def _check_widths(self) -> None:
        check_divides("rope_head_dim", self.rope_head_dim, "the pair size", 2)
        check_at_most("rope_head_dim", self.rope_head_dim, "index_head_dim", self.index_head_dim)
        check_divides("num_experts", self.num_experts, "num_groups", self.num_groups)
        check_at_most("groups_per_token", self.groups_per_token, "num_groups", self.num_groups)
        size = self.num_experts // self.num_groups
        if size < 2:
            raise ValueError(
                f"num_groups {self.num_groups} leaves {size} expert in a group, expected at least 2 of "
                f"num_experts {self.num_experts}"
            )
        within = size * self.groups_per_token
        chosen = f"the {within} experts of {self.groups_per_token} groups"
        check_at_most("num_experts_per_tok", self.num_experts_per_tok, chosen, within)

    @property
    def num_layers(self) -> int:
        """Layers of the main model, without multi-token prediction."""
        return len(self.ffn_kinds)

    @property
    def mtp_prefixes(self) -> tuple[str, ...]:
        """What the Hub names of the multi-token-prediction blocks begin with: they count on from the last layer."""
        return tuple(f"model.layers.{self.num_layers + number}." for number in range(self.num_mtp_layers))

    @property
    def plan(self) -> LayerPlan:
        """Which layers are unrolled and which are scanned, derived from the schedule."""
        return plan_layers(self.ffn_kinds)

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-0.5, times the square of YaRN's scale."""
        scale = (self.nope_head_dim + self.rope_head_dim) ** -0.5
        yarn = self.rope_scaling
        return scale if yarn is None else scale * mscale_of(yarn.factor, yarn.mscale_all_dim) ** 2

    @property
    def rope_amplitude(self) -> float:
        """What cosines and sines are multiplied by: 1 in every released model."""
        yarn = self.rope_scaling
        if yarn is None:
            return 1.0
        return mscale_of(yarn.factor, yarn.mscale) / mscale_of(yarn.factor, yarn.mscale_all_dim)

    @classmethod
    def v32(cls) -> DeepseekV32Config:
        """DeepSeek-V3.2, 671B parameters, 37B active (V3.2-Exp has the same numbers)."""
        return cls(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            value_head_dim=128,
            ffn_kinds=("dense",) * 3 + ("moe",) * 58,
            index_num_heads=64,
            index_head_dim=128,
            index_top_k=2048,
            moe_intermediate_size=2048,
            num_experts=256,
            num_experts_per_tok=8,
            num_shared_experts=1,
            num_groups=8,
            groups_per_token=4,
            routed_scaling_factor=2.5,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            rope_scaling=MscaleYarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0),
            max_position_embeddings=163840,
            num_mtp_layers=1,
        )

    @classmethod
    def tiny(cls) -> DeepseekV32Config:
        """A model for one CPU that uses every feature of the released one.

        Bytes and a few special tokens as vocabulary. YaRN starts from 64 positions and the indexer keeps 64 tokens,
        so that both matter at the few hundred that tests and short runs have.
        """
        return cls(
            vocab_size=264,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            q_lora_rank=64,
            kv_lora_rank=48,
            nope_head_dim=32,
            rope_head_dim=16,
            value_head_dim=40,
            ffn_kinds=("dense",) + ("moe",) * 3,
            index_num_heads=16,
            index_head_dim=32,
            index_top_k=64,
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            num_groups=4,
            groups_per_token=2,
            routed_scaling_factor=2.5,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            rope_scaling=MscaleYarn(40.0, 64, 32.0, 1.0, 1.0, 1.0),
            max_position_embeddings=2560,
            num_mtp_layers=1,
            initializer_range=0.06,
        )

    @classmethod
    def from_hf_config(cls, source: Mapping[str, Any] | str | Path) -> DeepseekV32Config:
        """Reads a Hub `config.json` (a dict, the file or its folder) in any of its spellings.

        Raises:
          ValueError: listing every unknown key, missing field and contradiction at once.
        """
        from fathom.models.deepseek_v32 import hf_config

        return hf_config.read(source)

    def to_hf_config(self) -> dict[str, Any]:
        """The Hub's spelling; `from_hf_config(config.to_hf_config()) == config`."""
        from fathom.models.deepseek_v32 import hf_config

        return hf_config.write(self)
