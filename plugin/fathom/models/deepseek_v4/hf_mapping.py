"""DeepSeek-V4's weights on the Hub and in Fathom: one table, and the other spellings of its names.

Native Hub names are DeepSeek's own (`layers.0.attn.wq_a.weight`). Hub matrices are [out, in], ours
[in, out...]. Letters as in `hub_rows.py`, and n streams.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import numpy as np

from fathom.hub import HubTensor, Layout
from fathom.models.deepseek_v4.config import DeepseekV4Config
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

_SWIGLU = ("w1", "w2", "w3")


def _hyper_connection(hub: str, ours: str, rows: int, scales: int, n: int, dim: int) -> list[Row]:
    """fn Hub [rows, n*D] -> [rows, n, D], base [rows], scale [scales]; `hub` is the names'
    prefix."""
    fn = Layout((rows, n, dim), (0, 1, 2))
    return [
        Row(f"{hub}_fn", (ours, "fn"), (rows, n * dim), "f32", fn),
        same(f"{hub}_base", (ours, "base"), "f32", rows),
        same(f"{hub}_scale", (ours, "scale"), "f32", scales),
    ]


def _compressor(hub: str, ours: Path, dim: int, width: int, ratio: int, overlap: bool) -> list[Row]:
    wide = 2 * width if overlap else width
    return [
        same(f"{hub}.ape", (*ours, "ape"), "f32", ratio, wide),
        norm(f"{hub}.norm", (*ours, "norm"), width),
        linear(f"{hub}.wkv", (*ours, "wkv"), "bf16", wide, dim),
        linear(f"{hub}.wgate", (*ours, "wgate"), "bf16", wide, dim),
    ]


def _attention(c: DeepseekV4Config, kind: str, ratio: int) -> list[Row]:
    dim, rank, groups, low = c.hidden_size, c.q_lora_rank, c.o_groups, c.o_lora_rank
    per_group = c.num_heads * c.head_dim // groups
    rows = [
        linear("attn.wq_a", ("attn", "wq_a"), "fp8", rank, dim),
        norm("attn.q_norm", ("attn", "q_norm"), rank),
        heads("attn.wq_b", ("attn", "wq_b"), c.num_heads, c.head_dim, rank),
        linear("attn.wkv", ("attn", "wkv"), "fp8", c.head_dim, dim),
        norm("attn.kv_norm", ("attn", "kv_norm"), c.head_dim),
        same("attn.attn_sink", ("attn", "sink"), "f32", c.num_heads),
        split("attn.wo_a", ("attn", "wo_a"), (groups * low, per_group), (groups, low, per_group), (0, 2, 1)),
        split("attn.wo_b", ("attn", "wo_b"), (dim, groups * low), (dim, groups, low), (1, 2, 0)),
    ]
    if kind == "sliding":
        return rows
    overlap = kind == "csa"
    rows += _compressor("attn.compressor", ("attn", "compressor"), dim, c.head_dim, ratio, overlap)
    if kind == "csa":
        hub, ours = "attn.indexer", ("attn", "indexer")
        rows += [
            heads(f"{hub}.wq_b", (*ours, "wq_b"), c.index_num_heads, c.index_head_dim, rank),
            linear(f"{hub}.weights_proj", (*ours, "weights_proj"), "bf16", c.index_num_heads, dim),
        ]
        rows += _compressor(f"{hub}.compressor", (*ours, "compressor"), dim, c.index_head_dim, ratio, True)
    return rows


def _block(c: DeepseekV4Config, kind: str, ratio: int, router: str) -> list[Row]:
    """Every weight of a layer."""
    dim, n, width = c.hidden_size, c.hc_mult, c.moe_intermediate_size
    mixes = (2 + n) * n
    if router == "hash":
        table = (c.vocab_size, c.num_experts_per_tok)
        choice = same("ffn.gate.tid2eid", ("ffn", "router", "tid2eid"), "i64", *table, limit=c.num_experts)
    else:
        choice = same("ffn.gate.bias", ("ffn", "router", "bias"), "f32", c.num_experts)
    return [
        norm("attn_norm", ("attn_norm",), dim),
        norm("ffn_norm", ("ffn_norm",), dim),
        *_hyper_connection("hc_attn", "attn_hc", mixes, 3, n, dim),
        *_hyper_connection("hc_ffn", "ffn_hc", mixes, 3, n, dim),
        *_attention(c, kind, ratio),
        linear("ffn.gate", ("ffn", "router"), "bf16", c.num_experts, dim),
        choice,
        *swiglu("ffn.shared_experts", ("ffn", "shared"), _SWIGLU, "fp8", dim, width * c.num_shared_experts),
        *experts("ffn.experts", ("ffn", "experts"), _SWIGLU, c.expert_dtype or "fp4", c.num_experts, dim, width),
    ]


def hub_tensors(config: DeepseekV4Config) -> list[HubTensor]:
    """Every weight of the model, once, in the Hub's order; scales of quantised storage are
    companions.

    Routed experts count as FP4 where the config does not say (the first revision of the released
    configs).

    Raises:
      ValueError: for DSpark's blocks, whose structure this model does not have.
    """
    c, dim, n = config, config.hidden_size, config.hc_mult
    c.require_plain_mtp()
    tensors = place(
        [
            same("embed.weight", ("embed", "weight"), "bf16", c.vocab_size, dim),
            linear("head", ("head",), "bf16", c.vocab_size, dim),
            norm("norm", ("norm",), dim),
            *_hyper_connection("hc_head", "hc_head", n, 1, n, dim),
        ]
    )
    for layer, kinds in enumerate(c.layer_kinds):
        tensors += place(_block(c, *kinds), f"layers.{layer}.", *layer_place(c, layer))
    for number in range(c.num_mtp_layers):
        hub, path = f"mtp.{number}.", ("mtp", number)
        outer = [
            linear("e_proj", ("e_proj",), "fp8", dim, dim),
            linear("h_proj", ("h_proj",), "fp8", dim, dim),
            *(norm(name, (name,), dim) for name in ("enorm", "hnorm", "norm")),
            *_hyper_connection("hc_head", "hc_head", n, 1, n, dim),
        ]
        tensors += place(outer, hub, path) + place(_block(c, "sliding", 0, "learned"), hub, (*path, "block"))
    return tensors


# Other spellings, applied in this order to the name without its "model." prefix.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Roots.
        (r"^embed_tokens\.weight$", "embed.weight"),
        (r"^lm_head\.weight$", "head.weight"),
        (r"(^|\.)hc_head\.hc_(fn|base|scale)$", r"\1hc_head_\2"),
        # Blocks and their modules.
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
        # The indexer sits inside the compressor there, and beside it here.
        (r"\.attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
        (r"\.attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
        (r"\.attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.compressor\.kv_proj\.", ".compressor.wkv."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.position_bias$", ".compressor.ape"),
        # Attention. `attn.norm` is what transformers' save_pretrained makes of kv_norm.
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.attn\.q_a_proj\.", ".attn.wq_a."),
        (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
        (r"\.attn\.q_b_proj\.", ".attn.wq_b."),
        (r"\.attn\.kv_proj\.", ".attn.wkv."),
        (r"\.attn\.o_([ab])_proj\.", r".attn.wo_\1."),
        # Experts and router.
        (r"\.ffn\.gate\.e_score_correction_bias$", ".ffn.gate.bias"),
        (r"\.ffn\.(shared_experts|experts\.\d+)\.gate_proj\.", r".ffn.\1.w1."),
        (r"\.ffn\.(shared_experts|experts\.\d+)\.down_proj\.", r".ffn.\1.w2."),
        (r"\.ffn\.(shared_experts|experts\.\d+)\.up_proj\.", r".ffn.\1.w3."),
        (r"\.weight_scale_inv$", ".scale"),
    )
)
_FUSED = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)$")


def normalise_name(name: str) -> str:
    """The native name of a weight spelled as `transformers` saves it or names its modules.

    Native and unknown names come back as they are, apart from a leading "model.".
    """
    # Tens of thousands of names differ in their numbers alone: the renaming is looked up without them.
    parts = name.removeprefix("model.").split(".")
    numbers = iter([part for part in parts if part.isdecimal()])
    renamed = _renamed(".".join("0" if part.isdecimal() else part for part in parts))
    return ".".join(next(numbers) if part == "0" else part for part in renamed.split("."))


@functools.lru_cache(maxsize=4096)
def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def native_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """(native name, index into the array) of each weight that a tensor of any spelling holds.

    One piece, indexed by (), for everything but the fused experts of `transformers`' modules:
    `mlp.experts.gate_up_proj` [E, 2F, D] (gate first) and `mlp.experts.down_proj` [E, D, F].

    Raises:
      ValueError: for fused experts of another rank, or an odd number of gate and up rows.
    """
    native = normalise_name(name)
    fused = _FUSED.match(native)
    return fused_pieces(name, fused, shape, _SWIGLU) if fused else [(native, ())]


def native_arrays(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(native name, array) of each weight in one tensor of any spelling, fused experts taken
    apart."""
    for native, index in native_pieces(name, array.shape):
        yield native, array[index]
