"""DeepSeek-V3.2's weights on the Hub and in Fathom: one table, and the other spellings of its names.

Released files and those of `transformers` use the same names (`model.layers.0.self_attn.q_a_proj.weight`). Hub matrices
are [out, in], ours [in, out...]. Letters as in `config.py`'s attributes: E experts, F expert width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from fathom.hub import HubTensor, Layout, StoredTensor
from fathom.models.deepseek_v32.config import DeepseekV32Config

Path = tuple[str | int, ...]
# Rows of a table: (Hub name, path, Hub shape, storage, layout), names and paths relative to a
# block.
Row = tuple[str, Path, tuple[int, ...], str, Layout]


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


def _same(name: str, path: Path, storage: str, *shape: int) -> Row:
    """Stored as it is used."""
    return name, path, shape, storage, Layout(shape, tuple(range(len(shape))))


def _matrix(name: str, path: Path, storage: str, out: int, inner: int) -> Row:
    """Hub [out, in] -> [in, out]."""
    return name, path, (out, inner), storage, Layout((out, inner), (1, 0))


def _heads(name: str, path: Path, heads: int, width: int, inner: int) -> Row:
    """Hub [N*H, R] -> [R, N, H]."""
    return name, path, (heads * width, inner), "fp8", Layout((heads, width, inner), (2, 0, 1))


def _attention(c: DeepseekV32Config) -> list[Row]:
    dim, hub, ours = c.hidden_size, "self_attn", ("attn",)
    key, value = c.nope_head_dim, c.value_head_dim
    kv_width = c.kv_lora_rank + c.rope_head_dim
    wo = Layout((dim, c.num_heads, value), (1, 2, 0))
    index, index_ours = f"{hub}.indexer", (*ours, "indexer")
    heads, width = c.index_num_heads, c.index_head_dim
    return [
        _matrix(f"{hub}.q_a_proj.weight", (*ours, "wq_a", "weight"), "fp8", c.q_lora_rank, dim),
        _same(f"{hub}.q_a_layernorm.weight", (*ours, "q_norm", "weight"), "bf16", c.q_lora_rank),
        _heads(
            f"{hub}.q_b_proj.weight", (*ours, "wq_b", "weight"), c.num_heads, key + c.rope_head_dim, c.q_lora_rank
        ),
        _matrix(f"{hub}.kv_a_proj_with_mqa.weight", (*ours, "wkv_a", "weight"), "fp8", kv_width, dim),
        _same(f"{hub}.kv_a_layernorm.weight", (*ours, "kv_norm", "weight"), "bf16", c.kv_lora_rank),
        _heads(f"{hub}.kv_b_proj.weight", (*ours, "wkv_b", "weight"), c.num_heads, key + value, c.kv_lora_rank),
        (f"{hub}.o_proj.weight", (*ours, "wo", "weight"), (dim, c.num_heads * value), "fp8", wo),
        _heads(f"{index}.wq_b.weight", (*index_ours, "wq_b", "weight"), heads, width, c.q_lora_rank),
        _matrix(f"{index}.wk.weight", (*index_ours, "wk", "weight"), "fp8", width, dim),
        _same(f"{index}.k_norm.weight", (*index_ours, "k_norm", "weight"), "f32", width),
        _same(f"{index}.k_norm.bias", (*index_ours, "k_norm", "bias"), "f32", width),
        _matrix(f"{index}.weights_proj.weight", (*index_ours, "weights_proj", "weight"), "f32", heads, dim),
    ]


def _swiglu(hub: str, ours: Path, dim: int, width: int) -> list[Row]:
    """gate, down, up as w1, w2, w3."""
    return [
        _matrix(f"{hub}.gate_proj.weight", (*ours, "w1", "weight"), "fp8", width, dim),
        _matrix(f"{hub}.down_proj.weight", (*ours, "w2", "weight"), "fp8", dim, width),
        _matrix(f"{hub}.up_proj.weight", (*ours, "w3", "weight"), "fp8", width, dim),
    ]


def _block(c: DeepseekV32Config, kind: str) -> list[Row]:
    """Everything of a layer but its routed experts."""
    dim = c.hidden_size
    rows = [
        _same("input_layernorm.weight", ("attn_norm", "weight"), "bf16", dim),
        _same("post_attention_layernorm.weight", ("ffn_norm", "weight"), "bf16", dim),
        *_attention(c),
    ]
    if kind == "dense":
        return rows + _swiglu("mlp", ("ffn",), dim, c.intermediate_size)
    return [
        *rows,
        _matrix("mlp.gate.weight", ("ffn", "router", "weight"), "bf16", c.num_experts, dim),
        _same("mlp.gate.e_score_correction_bias", ("ffn", "router", "bias"), "f32", c.num_experts),
        *_swiglu("mlp.shared_experts", ("ffn", "shared"), dim, c.moe_intermediate_size * c.num_shared_experts),
    ]


def _experts(c: DeepseekV32Config, hub: str, ours: Path, index: tuple[int, ...]) -> list[HubTensor]:
    """One Hub tensor per expert and matrix, all experts in one array on our side."""
    dim, width = c.hidden_size, c.moe_intermediate_size
    shapes = (("gate_proj", "w1", width, dim), ("down_proj", "w2", dim, width), ("up_proj", "w3", width, dim))
    tensors = []
    for expert in range(c.num_experts):
        for theirs, name, out, inner in shapes:
            _, _, shape, storage, layout = _matrix("", (), "fp8", out, inner)
            full = f"{hub}mlp.experts.{expert}.{theirs}.weight"
            path = (*ours, "ffn", "experts", name)
            tensors.append(V32Tensor(full, shape, storage, path, (*index, expert), layout))
    return tensors


def _place(rows: list[Row], hub: str, ours: Path, index: tuple[int, ...] = ()) -> list[HubTensor]:
    return [
        V32Tensor(hub + name, shape, storage, (*ours, *path), index, layout)
        for name, path, shape, storage, layout in rows
    ]


def layer_place(config: DeepseekV32Config, layer: int) -> tuple[Path, tuple[int, ...]]:
    """Where a layer lives: its path and its index in the stack (empty for an unrolled layer)."""
    plan = config.plan
    if layer in plan.prefix:
        return ("prefix", layer - plan.prefix.start), ()
    if layer in plan.suffix:
        return ("suffix", layer - plan.suffix.start), ()
    repeat, unit_index = divmod(layer - len(plan.prefix), plan.unit)
    return ("repeated", unit_index), (repeat,)


def hub_tensors(config: DeepseekV32Config) -> list[HubTensor]:
    """Every weight of the model, once, in the Hub's order; scales of quantised storage are companions.

    Multi-token prediction is layer `num_layers` and following, as released. The copies of the embedding and of the
    head that the released files hold there are no weights of their own (`COPIES`).
    """
    c, dim = config, config.hidden_size
    tensors = _place([_same("model.embed_tokens.weight", ("embed", "weight"), "bf16", c.vocab_size, dim)], "", ())
    for layer, kind in enumerate(c.ffn_kinds):
        path, index = layer_place(c, layer)
        hub = f"model.layers.{layer}."
        tensors += _place(_block(c, kind), hub, path, index)
        tensors += _experts(c, hub, path, index) if kind == "moe" else []
    for number, hub in enumerate(c.mtp_prefixes):
        path: Path = ("mtp", number)
        outer = [
            _same("enorm.weight", ("enorm", "weight"), "bf16", dim),
            _same("hnorm.weight", ("hnorm", "weight"), "bf16", dim),
            _matrix("eh_proj.weight", ("eh_proj", "weight"), "bf16", dim, 2 * dim),
            _same("shared_head.norm.weight", ("norm", "weight"), "bf16", dim),
        ]
        block = (*path, "block")
        tensors += _place(outer, hub, path) + _place(_block(c, "moe"), hub, block)
        tensors += _experts(c, hub, block, ())
    tensors += _place(
        [
            _same("model.norm.weight", ("norm", "weight"), "bf16", dim),
            _matrix("lm_head.weight", ("head", "weight"), "bf16", c.vocab_size, dim),
        ],
        "",
        (),
    )
    return tensors


COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""What a released multi-token-prediction layer repeats of the model: its embedding and its head."""

_COPY = re.compile(r"^model\.layers\.\d+\.(" + "|".join(map(re.escape, COPIES)) + ")$")
_FUSED = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def hub_pieces(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int | slice, ...]]]:
    """(released name, index into the array) of each weight that a tensor of any spelling holds.

    One piece, indexed by (), for everything but two: `COPIES` hold none, and the fused experts of `transformers`'
    modules, `mlp.experts.gate_up_proj` [E, 2F, D] (gate first) and `mlp.experts.down_proj` [E, D, F], hold several.

    Raises:
      ValueError: for fused experts of another rank, or an odd number of gate and up rows.
    """
    if _COPY.match(name):
        return []
    fused = _FUSED.match(name)
    if fused is None:
        return [(name, ())]
    if len(shape) != 3 or (fused[2] == "gate_up_proj" and shape[1] % 2):
        raise ValueError(f"{name}: found shape {shape}, expected [experts, rows, columns]")
    pieces: list[tuple[str, tuple[int | slice, ...]]] = []
    for expert in range(shape[0]):
        prefix = f"{fused[1]}.{expert}"
        if fused[2] == "down_proj":
            pieces.append((f"{prefix}.down_proj.weight", (expert,)))
            continue
        half = shape[1] // 2
        pieces.append((f"{prefix}.gate_proj.weight", (expert, slice(0, half))))
        pieces.append((f"{prefix}.up_proj.weight", (expert, slice(half, None))))
    return pieces


def hub_copies(config: DeepseekV32Config) -> dict[str, str]:
    """Name of each copy in released files -> name of the weight it repeats."""
    return {prefix + copy: name for prefix in config.mtp_prefixes for copy, name in COPIES.items()}


def hub_arrays(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(released name, array) of each weight in one tensor of any spelling, fused experts taken apart."""
    for released, index in hub_pieces(name, array.shape):
        yield released, array[index]
