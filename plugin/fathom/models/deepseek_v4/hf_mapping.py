"""DeepSeek-V4's weights on the Hub and in Fathom: one table, and the other spellings of its names.

Native Hub names are DeepSeek's own (`layers.0.attn.wq_a.weight`). Hub matrices are [out, in], ours
[in, out...]. Letters as in `config.py`'s attributes: n streams, E experts, F expert width, m ratio.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import numpy as np

from fathom.hub import HubTensor, Layout
from fathom.models.deepseek_v4.config import DeepseekV4Config

Path = tuple[str | int, ...]
# Rows of a table: (Hub name, path, Hub shape, storage, layout), names and paths relative to a
# block.
Row = tuple[str, Path, tuple[int, ...], str, Layout]


def _same(name: str, path: Path, storage: str, *shape: int) -> Row:
    """Stored as it is used."""
    return name, path, shape, storage, Layout(shape, tuple(range(len(shape))))


def _matrix(name: str, path: Path, storage: str, out: int, inner: int) -> Row:
    """Hub [out, in] -> [in, out]."""
    return name, path, (out, inner), storage, Layout((out, inner), (1, 0))


def _heads(name: str, path: Path, heads: int, width: int, inner: int) -> Row:
    """Hub [N*H, R] -> [R, N, H]."""
    return name, path, (heads * width, inner), "fp8", Layout((heads, width, inner), (2, 0, 1))


def _hyper_connection(hub: str, ours: str, rows: int, scales: int, n: int, dim: int) -> list[Row]:
    """fn Hub [rows, n*D] -> [rows, n, D], base [rows], scale [scales]; `hub` is the names'
    prefix."""
    fn = Layout((rows, n, dim), (0, 1, 2))
    return [
        (f"{hub}_fn", (ours, "fn"), (rows, n * dim), "f32", fn),
        _same(f"{hub}_base", (ours, "base"), "f32", rows),
        _same(f"{hub}_scale", (ours, "scale"), "f32", scales),
    ]


def _compressor(hub: str, ours: Path, dim: int, width: int, ratio: int, overlap: bool) -> list[Row]:
    wide = 2 * width if overlap else width
    return [
        _same(f"{hub}.ape", (*ours, "ape"), "f32", ratio, wide),
        _same(f"{hub}.norm.weight", (*ours, "norm", "weight"), "bf16", width),
        _matrix(f"{hub}.wkv.weight", (*ours, "wkv", "weight"), "bf16", wide, dim),
        _matrix(f"{hub}.wgate.weight", (*ours, "wgate", "weight"), "bf16", wide, dim),
    ]


def _attention(c: DeepseekV4Config, kind: str, ratio: int) -> list[Row]:
    dim, rank, groups, low = c.hidden_size, c.q_lora_rank, c.o_groups, c.o_lora_rank
    per_group = c.num_heads * c.head_dim // groups
    wo_a = Layout((groups, low, per_group), (0, 2, 1))
    wo_b = Layout((dim, groups, low), (1, 2, 0))
    rows = [
        _matrix("attn.wq_a.weight", ("attn", "wq_a", "weight"), "fp8", rank, dim),
        _same("attn.q_norm.weight", ("attn", "q_norm", "weight"), "bf16", rank),
        _heads("attn.wq_b.weight", ("attn", "wq_b", "weight"), c.num_heads, c.head_dim, rank),
        _matrix("attn.wkv.weight", ("attn", "wkv", "weight"), "fp8", c.head_dim, dim),
        _same("attn.kv_norm.weight", ("attn", "kv_norm", "weight"), "bf16", c.head_dim),
        _same("attn.attn_sink", ("attn", "sink"), "f32", c.num_heads),
        ("attn.wo_a.weight", ("attn", "wo_a", "weight"), (groups * low, per_group), "fp8", wo_a),
        ("attn.wo_b.weight", ("attn", "wo_b", "weight"), (dim, groups * low), "fp8", wo_b),
    ]
    if kind == "sliding":
        return rows
    overlap = kind == "csa"
    rows += _compressor("attn.compressor", ("attn", "compressor"), dim, c.head_dim, ratio, overlap)
    if kind == "csa":
        hub, ours = "attn.indexer", ("attn", "indexer")
        heads, width = c.index_num_heads, c.index_head_dim
        rows += [
            _heads(f"{hub}.wq_b.weight", (*ours, "wq_b", "weight"), heads, width, rank),
            _matrix(
                f"{hub}.weights_proj.weight", (*ours, "weights_proj", "weight"), "bf16", heads, dim
            ),
        ]
        rows += _compressor(f"{hub}.compressor", (*ours, "compressor"), dim, width, ratio, True)
    return rows


def _block(c: DeepseekV4Config, kind: str, ratio: int, router: str) -> list[Row]:
    """Everything of a layer but its routed experts."""
    dim, n = c.hidden_size, c.hc_mult
    mixes = (2 + n) * n
    shared = c.moe_intermediate_size * c.num_shared_experts
    rows = [
        _same("attn_norm.weight", ("attn_norm", "weight"), "bf16", dim),
        _same("ffn_norm.weight", ("ffn_norm", "weight"), "bf16", dim),
        *_hyper_connection("hc_attn", "attn_hc", mixes, 3, n, dim),
        *_hyper_connection("hc_ffn", "ffn_hc", mixes, 3, n, dim),
        *_attention(c, kind, ratio),
        _matrix("ffn.gate.weight", ("ffn", "router", "weight"), "bf16", c.num_experts, dim),
    ]
    if router == "hash":
        table = (c.vocab_size, c.num_experts_per_tok)
        rows.append(_same("ffn.gate.tid2eid", ("ffn", "router", "tid2eid"), "i64", *table))
    else:
        rows.append(_same("ffn.gate.bias", ("ffn", "router", "bias"), "f32", c.num_experts))
    for name, out, inner in (("w1", shared, dim), ("w2", dim, shared), ("w3", shared, dim)):
        path = ("ffn", "shared", name, "weight")
        rows.append(_matrix(f"ffn.shared_experts.{name}.weight", path, "fp8", out, inner))
    return rows


def _experts(c: DeepseekV4Config, hub: str, ours: Path, index: tuple[int, ...]) -> list[HubTensor]:
    """One Hub tensor per expert and matrix, all experts in one array on our side."""
    dim, width = c.hidden_size, c.moe_intermediate_size
    storage = c.expert_dtype or "fp4"
    tensors = []
    for expert in range(c.num_experts):
        for name, out, inner in (("w1", width, dim), ("w2", dim, width), ("w3", width, dim)):
            _, _, shape, _, layout = _matrix(name, (), storage, out, inner)
            full = f"{hub}ffn.experts.{expert}.{name}.weight"
            path = (*ours, "ffn", "experts", name)
            tensors.append(HubTensor(full, shape, storage, path, (*index, expert), layout))
    return tensors


def _place(
    c: DeepseekV4Config, rows: list[Row], hub: str, ours: Path, index: tuple[int, ...] = ()
) -> list[HubTensor]:
    tensors = []
    for name, path, shape, storage, layout in rows:
        limit = c.num_experts if storage == "i64" else None
        tensors.append(HubTensor(hub + name, shape, storage, (*ours, *path), index, layout, limit))
    return tensors


def layer_place(config: DeepseekV4Config, layer: int) -> tuple[Path, tuple[int, ...]]:
    """Where a layer lives: its path and its index in the stack (empty for an unrolled layer)."""
    plan = config.plan
    if layer in plan.prefix:
        return ("prefix", layer - plan.prefix.start), ()
    if layer in plan.suffix:
        return ("suffix", layer - plan.suffix.start), ()
    repeat, unit_index = divmod(layer - len(plan.prefix), plan.unit)
    return ("repeated", unit_index), (repeat,)


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
    tensors = _place(
        c,
        [
            _same("embed.weight", ("embed", "weight"), "bf16", c.vocab_size, dim),
            _matrix("head.weight", ("head", "weight"), "bf16", c.vocab_size, dim),
            _same("norm.weight", ("norm", "weight"), "bf16", dim),
            *_hyper_connection("hc_head", "hc_head", n, 1, n, dim),
        ],
        "",
        (),
    )
    for layer, kinds in enumerate(c.layer_kinds):
        path, index = layer_place(c, layer)
        hub = f"layers.{layer}."
        tensors += _place(c, _block(c, *kinds), hub, path, index) + _experts(c, hub, path, index)
    for number in range(c.num_mtp_layers):
        hub, path = f"mtp.{number}.", ("mtp", number)
        outer = [
            _matrix("e_proj.weight", ("e_proj", "weight"), "fp8", dim, dim),
            _matrix("h_proj.weight", ("h_proj", "weight"), "fp8", dim, dim),
            *(
                _same(f"{name}.weight", (name, "weight"), "bf16", dim)
                for name in ("enorm", "hnorm", "norm")
            ),
            *_hyper_connection("hc_head", "hc_head", n, 1, n, dim),
        ]
        block = (*path, "block")
        tensors += _place(c, outer, hub, path)
        tensors += _place(c, _block(c, "sliding", 0, "learned"), hub, block)
        tensors += _experts(c, hub, block, ())
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


def native_pieces(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int | slice, ...]]]:
    """(native name, index into the array) of each weight that a tensor of any spelling holds.

    One piece, indexed by (), for everything but the fused experts of `transformers`' modules:
    `mlp.experts.gate_up_proj` [E, 2F, D] (gate first) and `mlp.experts.down_proj` [E, D, F].

    Raises:
      ValueError: for fused experts of another rank, or an odd number of gate and up rows.
    """
    native = normalise_name(name)
    fused = _FUSED.match(native)
    if fused is None:
        return [(native, ())]
    if len(shape) != 3 or (fused[2] == "gate_up_proj" and shape[1] % 2):
        raise ValueError(f"{name}: found shape {shape}, expected [experts, rows, columns]")
    pieces: list[tuple[str, tuple[int | slice, ...]]] = []
    for expert in range(shape[0]):
        prefix = f"{fused[1]}.{expert}"
        if fused[2] == "down_proj":
            pieces.append((f"{prefix}.w2.weight", (expert,)))
            continue
        half = shape[1] // 2
        pieces.append((f"{prefix}.w1.weight", (expert, slice(0, half))))
        pieces.append((f"{prefix}.w3.weight", (expert, slice(half, None))))
    return pieces


def native_arrays(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(native name, array) of each weight in one tensor of any spelling, fused experts taken
    apart."""
    for native, index in native_pieces(name, array.shape):
        yield native, array[index]
