"""Weights that a checkpoint keeps as FP8 or FP4 codes with block scales, decoded on the devices that hold them.

Formats: `fathom.hub`; codes and scales lie in the Hub's layout, stacked as the parameter is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fathom.hub import FP4_BLOCK, FP8_BLOCK, HubTensor


def storage_of(codes: tuple[int, ...], tensor: HubTensor) -> str:
    """"fp8" or "fp4", told by the codes' last dimension: FP4 has two columns in a byte."""
    return "fp8" if codes[-1] == tensor.shape[-1] else "fp4"


def code_sharding(
    sharding: Any, tensor: HubTensor, shape: tuple[int, ...], granules: tuple[int, ...]
) -> Any:
    """A layout of codes or scales in which each device holds about what its part of the parameter is made of.

    Args:
      sharding: the parameter's. tensor: one of its Hub tensors. shape: of the codes or scales, stacked.
      granules: Hub rows and columns that one element stands for.

    Returns:
      A NamedSharding; a dimension that does not divide stays whole. Other shardings come back as they are.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    lead = len(tensor.index)
    ours = tuple(sharding.spec) + (None,) * (lead + len(tensor.our_shape) - len(sharding.spec))
    sizes = dict(sharding.mesh.shape)
    entries = list(ours[:lead])
    axis = 0
    for number, size in enumerate(tensor.shape):
        entry = ours[lead + tensor.layout.order.index(axis)]  # of the slowest dimension of the group
        product = 1
        while axis < len(tensor.layout.view) and product < size:
            product *= tensor.layout.view[axis]
            axis += 1
        pieces = math.prod(sizes[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))
        stored = shape[lead + number]
        fits = stored % pieces == 0 and (stored // pieces) * granules[number] * pieces == size
        entries.append(entry if fits else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def decode(
    codes: jax.Array, scales: jax.Array, tensor: HubTensor, dtype: np.dtype, sharding: Any
) -> jax.Array:
    """Codes and scales -> the parameter.

    Args:
      codes: uint8 [*stack, rows, columns] (FP8) or [*stack, rows, columns / 2] (FP4).
      scales: uint8 (E8M0) or float32, [*stack, row blocks, column blocks].
      tensor: one of the parameter's Hub tensors. dtype, sharding: of the result.

    Returns:
      [*stack, *tensor.our_shape].
    """
    kind = storage_of(codes.shape, tensor)
    return _decoder(kind, tensor.layout, np.dtype(dtype).name, sharding)(codes, scales)


@functools.lru_cache(maxsize=256)
def _decoder(kind: str, layout: Any, dtype: str, sharding: Any) -> Any:
    def run(codes: jax.Array, scales: jax.Array) -> jax.Array:
        lead = codes.ndim - 2
        values = (_fp8_values if kind == "fp8" else _fp4_values)(codes)
        block = (FP8_BLOCK, FP8_BLOCK) if kind == "fp8" else (1, FP4_BLOCK)
        values = values * _spread(_scale_values(scales), values.shape, block)
        stack = codes.shape[:lead]
        values = values.astype(dtype).reshape(*stack, *layout.view)
        return values.transpose(*range(lead), *(lead + axis for axis in layout.order))

    return jax.jit(run, out_shardings=sharding)


def _fp8_values(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _fp4_values(packed: jax.Array) -> jax.Array:
    codes = jnp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    magnitude = (codes & 7).astype(jnp.int32)
    # 0, 0.5, then (1 or 1.5) * 2^e: the mantissa bit under an exponent that starts at one.
    normal = (2 + (magnitude & 1)) << jnp.maximum(magnitude >> 1, 1)
    doubled = jnp.where(magnitude < 2, magnitude, normal >> 1)
    return jnp.where(codes >= 8, -0.5, 0.5) * doubled.astype(jnp.float32)


def _scale_values(scales: jax.Array) -> jax.Array:
    if scales.dtype != jnp.uint8:
        return scales.astype(jnp.float32)
    # The byte is float32's exponent; its zero is 2^-127, the one value whose bits are in the mantissa.
    bits = jnp.where(scales == 0, jnp.int32(1 << 22), scales.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _spread(scales: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """Block scales at every element."""
    rows, columns = shape[-2:]
    if block[0] > 1:
        scales = jnp.repeat(scales, block[0], axis=-2)[..., :rows, :]
    return jnp.repeat(scales, block[1], axis=-1)[..., :columns]
