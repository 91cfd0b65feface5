"""The whole model on meshes: the same seed gives the same weights, loss and gradients on every one of them."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.mesh import (
    abstract_mesh,
    make_mesh,
    partition_spec,
    sharding_scope,
    state_shardings,
    variable_axes,
)
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.train.state import init_variables, named_leaves, seed_to_rng
from tests.models.small import (
    FAST_COMPILE,
    FP32,
    packed_rows,
    random_model,
    small_config,
    small_spec,
    value_and_grads,
)
from tests.sharding.meshes import compiled_on, part, too_far

# Compiled functions are shared, so all of it runs in one worker.
pytestmark = pytest.mark.xdist_group("model meshes")

MESHES = {
    "data 2 fsdp 4": {"data": 2, "fsdp": 4},
    "fsdp 2 expert 4": {"fsdp": 2, "expert": 4},
    "spread over fsdp 4 expert 2": {"fsdp": 4, "expert": 2},
    "fsdp 4 tensor 2": {"fsdp": 4, "tensor": 2},
    # 11 tokens on each device: fewer than a window, or than HCA's 16 to an entry, so that neighbours do not suffice.
    "context 8": {"context": 8},
    "data 2 context 4": {"data": 2, "context": 4},
    "fsdp 2 expert 2 context 2": {"fsdp": 2, "expert": 2, "context": 2},
}
ROUTERS = ("hash", "learned") * 2
CONFIG = small_config(("csa", "hca") * 2, router_kinds=ROUTERS)
"""Two scanned blocks and the MTP block: all three attention kinds, both routers, stacked weights of each kind."""

RULES = small_spec().preset("default")
BATCH, LENGTH = 8, 88
# Documents shorter and longer than a compression window and than the sliding one, cut differently in each row.
DOCUMENTS = [(40, 25, 13), (88,), (3, 33, 1, 50), (20,), (60, 28), (5, 5, 70), (17, 17, 17, 17), (31, 1)]


def batch() -> dict[str, np.ndarray]:
    return packed_rows(DOCUMENTS, LENGTH, CONFIG.vocab_size)


@functools.cache
def on_mesh(name: str | None) -> tuple[dict[str, np.ndarray], str]:
    """(every number of loss, aux and gradients by name, the compiled program) on a mesh; without one for None."""
    _, params, rest = random_model(CONFIG)
    shape = None if name is None else MESHES[name]
    rules = small_spec().preset("spread") if name and name.startswith("spread") else RULES
    call, program = compiled_on(shape, rules, value_and_grads(CONFIG), params, rest, batch())
    return call(batch()), program


def test_every_part_takes_part_in_the_comparison():
    want, _ = on_mesh(None)
    aux, grads = part(want, "0/"), part(want, "1/")
    assert {f"1/loss/{name}" for name in ("main", "mtp", "balance")} < set(aux)
    unused = {name for name, grad in grads.items() if not np.any(grad)}
    assert unused == {name for name in grads if "indexer" in name}


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_are_those_of_one_device(name):
    want, _ = on_mesh(None)
    got, _ = on_mesh(name)
    assert too_far(got, want) == {}


def test_only_weights_move_where_only_weights_are_split():
    """No device holds another one's activations: what XLA cannot partition it would gather from all of them."""
    _, program = on_mesh("data 2 fsdp 4")
    moved = re.findall(r"= (.+?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    assert len(moved) > 20, "the weights are gathered"
    rows = [shape for shape in moved if re.search(rf"\[{BATCH},(?:{LENGTH}|{FP32.query_chunk})\b", shape)]
    assert rows == []


def initial(shape: dict[str, int] | None) -> dict[str, np.ndarray]:
    """Every weight of a fresh model, born sharded over a mesh of that shape."""
    spec = small_spec(CONFIG)

    def init(rng):
        return init_variables(spec, FP32, rng)

    rng = seed_to_rng(7)
    if shape is None:
        state = jax.jit(init, compiler_options=FAST_COMPILE)(rng)
        return named_leaves(jax.device_get(state))
    mesh = make_mesh(shape)
    with sharding_scope(mesh, RULES):
        shardings = state_shardings(jax.eval_shape(init, rng), mesh, RULES)
        state = jax.jit(init, out_shardings=shardings, compiler_options=FAST_COMPILE)(rng)
    layout = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings)
    assert all(jax.tree.leaves(layout))
    return named_leaves(jax.device_get(state))


def test_weights_born_sharded_are_those_of_one_device():
    want, got = initial(None), initial({"fsdp": 2, "expert": 2, "tensor": 2})
    assert list(got) == list(want)
    different = [leaf for leaf in want if not np.array_equal(got[leaf], want[leaf])]
    assert different == []


def abstract_weights(config: DeepseekV4Config) -> nnx.State:
    spec = small_spec(config)
    return nnx.state(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), FP32)))


@pytest.mark.parametrize("size", ["flash", "pro", "tiny"])
def test_every_weight_declares_axes_that_every_preset_knows(size):
    spec = zoo.get(f"deepseek-v4-{size}")
    for path, variable in nnx.to_flat_state(abstract_weights(spec.config)):
        axes, shape = variable_axes(variable), variable.get_value().shape
        assert axes is not None and len(axes) == len(shape), path
        for preset in spec.sharding_presets:
            partition_spec(axes, spec.preset(preset), str(path))
        # What is big in one layer must not lie whole on every device.
        split = partition_spec(axes, spec.preset("default"), str(path))
        layer = [dim for dim, axis in zip(shape, axes, strict=True) if axis != "layers"]
        if np.prod(layer) >= 2**20:
            assert any(split), f"{path} {shape} is replicated"


@pytest.mark.parametrize("preset", sorted(small_spec().sharding_presets))
def test_every_preset_knows_every_activation(preset):
    spec = small_spec(CONFIG)
    _, params, rest = random_model(CONFIG)
    compute = value_and_grads(CONFIG)
    mesh = abstract_mesh({"data": 2, "fsdp": 2, "expert": 2, "tensor": 2})
    with sharding_scope(mesh, spec.preset(preset)):
        jax.eval_shape(lambda *args: compute(*args), params, rest, batch())


def test_wrong_presets_are_refused_naming_the_weight():
    weights = abstract_weights(CONFIG)
    mesh = abstract_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match=r"embed/weight.*split twice over mesh axes \['fsdp'\].*map one of"):
        state_shardings(weights, mesh, {**RULES, "vocab": "fsdp"})
    missing = {axis: axes for axis, axes in RULES.items() if axis != "q_lora"}
    with pytest.raises(ValueError, match="wq_a/weight: logical axis 'q_lora' is not in the sharding"):
        state_shardings(weights, mesh, missing)
    with pytest.raises(ValueError, match=r"sharding rule 'embed' -> 'fdsp' names mesh axes \['fdsp'\]"):
        with sharding_scope(mesh, {**RULES, "embed": "fdsp"}):
            pass
    with pytest.raises(ValueError, match=r"weight embed/weight of shape \(264, 64\): dimension 64.*by 7 .*fsdp"):
        state_shardings(weights, abstract_mesh({"fsdp": 7}), RULES)
    heads = dataclasses.replace(CONFIG, num_heads=2)
    with pytest.raises(ValueError, match=r"weight .*sink.*not divisible by 4 .*tensor.*choose mesh sizes"):
        state_shardings(abstract_weights(heads)["repeated"], abstract_mesh({"tensor": 4}), RULES)
