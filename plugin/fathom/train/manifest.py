"""What a checkpoint says of its run: recipe, model, versions, and a checksum of every array.

Checksums do not depend on how the arrays are laid out over devices.
Each element's bits, as uint32, are multiplied by an odd weight made from its linear index, and all
products are added modulo 2^32. Addition is associative there, so any mesh gives the same sum. A
change of one element always changes the sum (its difference times an odd number is not 0); any
other damage escapes with probability about 2^-32 per leaf.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fathom.train.state import named_leaves
from fathom.zoo import ModelSpec

VERSIONED = ("fathom-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_leaves(tree: Any) -> dict[str, dict[str, Any]]:
    """Leaf name -> {"shape": [...], "dtype": name}; works on abstract trees."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for name, leaf in named_leaves(tree).items()
    }


def checksums(tree: Any) -> dict[str, int]:
    """Leaf name -> checksum, computed where the arrays are; all processes take part and agree."""
    leaves = named_leaves(tree)
    if not leaves:
        return {}
    sums = np.asarray(_sums(list(leaves.values())))
    return {name: int(value) for name, value in zip(leaves, sums, strict=True)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(x: jax.Array) -> jax.Array:
    bits = _as_uint32(x)
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(bits.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    return jnp.sum(bits * (_mix(index) | jnp.uint32(1)), dtype=jnp.uint32)


def _as_uint32(x: jax.Array) -> jax.Array:
    """The bits of each element; 8-byte elements become two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads neighbouring indices (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers of a run."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_run(recipe: Mapping[str, Any], spec: ModelSpec, mesh: Mesh, data: Any) -> dict[str, Any]:
    """What a checkpoint says of its run: resolved recipe, model, mesh, versions, data fingerprint."""
    description = {
        "recipe": dict(recipe),
        "model": {
            "name": spec.name,
            "config": dataclasses.asdict(spec.config),
            "num_params": spec.num_params(spec.config)._asdict(),
        },
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "processes": jax.process_count(),
        "versions": versions(),
        "data_fingerprint": data,
    }
    return json.loads(json.dumps(description, allow_nan=False))


def config_differences(payload: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Architecture fields in which the checkpoint's model and `spec` differ, one text each."""
    if payload["model"]["name"] != spec.name:
        name = payload["model"]["name"]
        return [f"model.name: {name!r} in the checkpoint, {spec.name!r} in the recipe"]
    return architecture_differences(payload, spec)


STORAGE_FIELDS = ("expert_dtype",)
"""Config fields that say how the Hub stores a model, not what it is."""


def architecture_differences(payload: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """As `config_differences`, whatever the models are called and however they are stored on the Hub."""
    old, new = payload["model"], json.loads(json.dumps(dataclasses.asdict(spec.config)))
    return [
        f"model.config.{key}: {old['config'].get(key)!r} in the checkpoint, {new.get(key)!r} in the recipe"
        for key in sorted(old["config"].keys() | new.keys())
        if key not in STORAGE_FIELDS and old["config"].get(key) != new.get(key)
    ]
