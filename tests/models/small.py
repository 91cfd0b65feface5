"""A small V4 that has every feature, with weights that show every term, made without compiling anything."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom import zoo
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.zoo import ModelSpec

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""For functions that run for milliseconds: it halves the time XLA takes to compile them on the CPU."""

FP32 = ComputeOptions(dtype="float32", query_chunk=32)

RATIOS = {"sliding": 0, "csa": 4, "hca": 16}
LAYERS = ("sliding", "csa", "hca", "csa", "hca")


def small_config(kinds: tuple[str, ...] = LAYERS, num_hash: int = 1, **changes) -> DeepseekV4Config:
    """The tiny config at hidden size 64 with other layers: three blocks to compile, of which two are scanned."""
    routers = ("hash",) * num_hash + ("learned",) * (len(kinds) - num_hash)
    ratios = tuple(RATIOS[kind] for kind in kinds)
    layers = dict(attention_kinds=kinds, compress_ratios=ratios, router_kinds=routers)
    sizes = dict(hidden_size=64, q_lora_rank=32, moe_intermediate_size=48)
    return dataclasses.replace(DeepseekV4Config.tiny(), **{**layers, **sizes, **changes})


def small_spec(config: DeepseekV4Config | None = None) -> ModelSpec:
    """The V4 ModelSpec at the small size."""
    return zoo.get("deepseek-v4-tiny").with_config(config or small_config())


def fill(module_or_graph, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, params, other state) of an abstract module, each weight drawn from the hash of its path.

    Values are far from their initial ones: every mixing, gate and bias differs from every other.
    """
    graphdef, abstract = nnx.split(module_or_graph)
    flat = {}
    for path, variable in nnx.to_flat_state(abstract):
        rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        shape, dtype = variable.get_value().shape, variable.get_value().dtype
        noise = rng.standard_normal(shape)
        if path[-1] == "tid2eid":
            # Any distinct experts will do; the model's own tables are tested where it makes them.
            ranks = np.argsort(rng.random((*shape[:-1], 8)), axis=-1)
            value = ranks[..., : shape[-1]]
        elif path[-2] == "embed":
            value = noise
        elif "norm" in str(path[-2]):
            value = 1 + 0.2 * noise
        elif path[-1] in ("base", "scale", "sink", "ape"):
            value = 0.5 * noise
        else:
            value = 0.1 * noise
        flat[path] = variable.replace(jnp.asarray(value, dtype))
    state = nnx.from_flat_state(flat)
    return graphdef, *nnx.split_state(state, nnx.Param, ...)


def random_model(
    config: DeepseekV4Config, options: ComputeOptions = FP32, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`fill` of the whole model."""
    spec = small_spec(config)
    return fill(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options)), seed)


def packed_rows(
    lengths: list[tuple[int, ...]], row_length: int, vocab: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of random documents of the given lengths, the rest padding: a batch as the loss takes it."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), row_length)
    tokens = rng.integers(0, vocab, shape).astype(np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
        if start > row_length:
            raise ValueError(f"documents {documents} do not fit into {row_length} tokens")
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


def value_and_grads(config: DeepseekV4Config, options: ComputeOptions = FP32):
    """A function (params, rest, batch) -> ((loss, aux), gradients), to be jitted by the caller."""
    spec = small_spec(config)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options)))

    def loss(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        return spec.loss(model, batch, LossWeights(mtp=0.3, balance=1e-2), count_targets(batch))

    return jax.value_and_grad(loss, has_aux=True)
