"""DeepSeek-V3.2's weights on the Hub and in Fathom: one table, and the other spellings of its names.

Released files and those of `transformers` use the same names (`model.layers.0.self_attn.q_a_proj.weight`). Hub matrices
are [out, in], ours [in, out...]. Letters as in `hub_rows.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from fathom.hub import HubTensor, StoredTensor
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.hub_rows import (
    Path,
    Piece,
    Row,
    experts,
    fused_pieces,
    heads,
    layer_place,
    linear,
    norm,
    place,
    same,
    split,
    swiglu,
)

_SWIGLU = ("gate_proj", "down_proj", "up_proj")


@dataclasses.dataclass(frozen=True)
class V32Tensor(HubTensor):
    """A weight whose FP8 scales are float32 and named `<weight>_scale_inv`."""

    @property
    def scale_name(self) -> str | None:
        return f"{self.name}_scale_inv" if self.storage in ("fp8", "fp4") else None

    def stored(self) -> tuple[StoredTensor, ...]:
        weight, *scales = super().stored()
        if self.storage != "fp8":
            return (weight, *scales)
        (scale,) = scales
        return weight, dataclasses.replace(scale, dtype="F32", num_bytes=4 * math.prod(scale.shape))


_place = functools.partial(place, tensor=V32Tensor)


def _attention(c: DeepseekV32Config) -> list[Row]:
    dim, hub, ours = c.hidden_size, "self_attn", ("attn",)
    key, value = c.nope_head_dim, c.value_head_dim
    kv_width = c.kv_lora_rank + c.rope_head_dim
    index, index_ours = f"{hub}.indexer", (*ours, "indexer")
    index_heads, width = c.index_num_heads, c.index_head_dim
    return [
        linear(f"{hub}.q_a_proj", (*ours, "wq_a"), "fp8", c.q_lora_rank, dim),
        norm(f"{hub}.q_a_layernorm", (*ours, "q_norm"), c.q_lora_rank),
        heads(f"{hub}.q_b_proj", (*ours, "wq_b"), c.num_heads, key + c.rope_head_dim, c.q_lora_rank),
        linear(f"{hub}.kv_a_proj_with_mqa", (*ours, "wkv_a"), "fp8", kv_width, dim),
        norm(f"{hub}.kv_a_layernorm", (*ours, "kv_norm"), c.kv_lora_rank),
        heads(f"{hub}.kv_b_proj", (*ours, "wkv_b"), c.num_heads, key + value, c.kv_lora_rank),
        split(f"{hub}.o_proj", (*ours, "wo"), (dim, c.num_heads * value), (dim, c.num_heads, value), (1, 2, 0)),
        heads(f"{index}.wq_b", (*index_ours, "wq_b"), index_heads, width, c.q_lora_rank),
        linear(f"{index}.wk", (*index_ours, "wk"), "fp8", width, dim),
        norm(f"{index}.k_norm", (*index_ours, "k_norm"), width, "f32"),
        same(f"{index}.k_norm.bias", (*index_ours, "k_norm", "bias"), "f32", width),
        linear(f"{index}.weights_proj", (*index_ours, "weights_proj"), "f32", index_heads, dim),
    ]


def _block(c: DeepseekV32Config, kind: str) -> list[Row]:
    """Every weight of a layer."""
    dim, width = c.hidden_size, c.moe_intermediate_size
    rows = [
        norm("input_layernorm", ("attn_norm",), dim),
        norm("post_attention_layernorm", ("ffn_norm",), dim),
        *_attention(c),
    ]
    if kind == "dense":
        return rows + swiglu("mlp", ("ffn",), _SWIGLU, "fp8", dim, c.intermediate_size)
    return [
        *rows,
        linear("mlp.gate", ("ffn", "router"), "bf16", c.num_experts, dim),
        same("mlp.gate.e_score_correction_bias", ("ffn", "router", "bias"), "f32", c.num_experts),
        *swiglu("mlp.shared_experts", ("ffn", "shared"), _SWIGLU, "fp8", dim, width * c.num_shared_experts),
        *experts("mlp.experts", ("ffn", "experts"), _SWIGLU, "fp8", c.num_experts, dim, width),
    ]


def hub_tensors(config: DeepseekV32Config) -> list[HubTensor]:
    """Every weight of the model, once, in the Hub's order; scales of quantised storage are companions.

    Multi-token prediction is layer `num_layers` and following, as released. The copies of the embedding and of the
    head that the released files hold there are no weights of their own (`COPIES`).
    """
    c, dim = config, config.hidden_size
    tensors = _place([same("model.embed_tokens.weight", ("embed", "weight"), "bf16", c.vocab_size, dim)])
    for layer, kind in enumerate(c.ffn_kinds):
        tensors += _place(_block(c, kind), f"model.layers.{layer}.", *layer_place(c, layer))
    for number, hub in enumerate(c.mtp_prefixes):
        path: Path = ("mtp", number)
        outer = [
            norm("enorm", ("enorm",), dim),
            norm("hnorm", ("hnorm",), dim),
            linear("eh_proj", ("eh_proj",), "bf16", dim, 2 * dim),
            norm("shared_head.norm", ("norm",), dim),
        ]
        tensors += _place(outer, hub, path) + _place(_block(c, "moe"), hub, (*path, "block"))
    return tensors + _place(
        [norm("model.norm", ("norm",), dim), linear("lm_head", ("head",), "bf16", c.vocab_size, dim)]
    )


COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""What a released multi-token-prediction layer repeats of the model: its embedding and its head."""

_COPY = re.compile(r"^model\.layers\.\d+\.(" + "|".join(map(re.escape, COPIES)) + ")$")
_FUSED = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def hub_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """(released name, index into the array) of each weight that a tensor of any spelling holds.

    One piece, indexed by (), for everything but two: `COPIES` hold none, and the fused experts of `transformers`'
    modules, `mlp.experts.gate_up_proj` [E, 2F, D] (gate first) and `mlp.experts.down_proj` [E, D, F], hold several.

    Raises:
      ValueError: for fused experts of another rank, or an odd number of gate and up rows.
    """
    if _COPY.match(name):
        return []
    fused = _FUSED.match(name)
    return fused_pieces(name, fused, shape, _SWIGLU) if fused else [(name, ())]


def hub_copies(config: DeepseekV32Config) -> dict[str, str]:
    """Name of each copy in released files -> name of the weight it repeats."""
    return {prefix + copy: name for prefix in config.mtp_prefixes for copy, name in COPIES.items()}


def hub_arrays(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(released name, array) of each weight in one tensor of any spelling, fused experts taken apart."""
    for released, index in hub_pieces(name, array.shape):
        yield released, array[index]
