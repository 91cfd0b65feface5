"""The released sizes without a device: their train step lowers for 512 of them, and their weights are all there."""

from __future__ import annotations

import math
import re
import time

import pytest

from fathom import zoo
from fathom.layers.indexer import INDEX_CHUNK
from fathom.mesh import abstract_mesh
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from fathom.recipe import Recipe, load_recipe
from fathom.train.state import named_leaves
from fathom.train.step import make_program
from tests.models.small import LAYERS, small_config

NAMES = ("deepseek-v4-flash", "deepseek-v4-pro")
TENSORS = {"deepseek-v4-flash": 69_187, "deepseek-v4-pro": 145_116}
MESH = {"fsdp": 64, "expert": 8}
ROWS, LENGTH = 512, 4096


def recipe(name: str, accumulation: int = 1, stage: str = "sparse") -> Recipe:
    """AdamW, bfloat16 compute and storage, every block recomputed in the backward."""
    return Recipe.model_validate(
        {
            "name": "lowering",
            "model": {"name": name, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
            "data": {"path": ".", "sequence_length": LENGTH, "batch_size": ROWS * accumulation},
            "optimizer": {"learning_rate": 1e-4},
            "mesh": MESH,
            "train": {"steps": 100, "accumulation": accumulation, "stage": stage},
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_train_step_lowers_for_512_devices_in_seconds(name):
    start = time.perf_counter()
    program = make_program(recipe(name), abstract_mesh(MESH))
    text = program.lower(ROWS, LENGTH, platforms=("tpu",)).as_text()
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s, {len(text) / 1e6:.1f} MB of StableHLO")
    # A bound on waste, not a measurement: it takes 6 s, and unrolled layers would take minutes.
    assert seconds < 120
    assert "mhlo.num_partitions = 512" in text and '"fsdp"=64' in text and '"expert"=8' in text
    assert "ragged_dot" in text  # the TPU's grouped products, though a CPU host lowers
    config = zoo.get(name).config
    # Repeated layers are compiled once, from stacked weights.
    stacked = f"tensor<{config.plan.repeats}x{config.num_experts}x{config.hidden_size}"
    assert stacked in text
    assert f"x{LENGTH}x{config.vocab_size}x" not in text, "logits of the whole sequence"


def lowered_tiny(repeats: int, length: int) -> str:
    """The tiny model's step, (csa, hca) repeated so many times."""
    config = small_config(LAYERS[:1] + LAYERS[1:3] * repeats)
    fields = ("attention_kinds", "compress_ratios", "router_kinds")
    values = recipe("deepseek-v4-tiny").to_dict()
    values["model"]["config"] = {name: list(getattr(config, name)) for name in fields}
    values["mesh"] = {"data": 8}
    program = make_program(Recipe.model_validate(values), abstract_mesh({"data": 8}))
    return program.lower(8, length, platforms=("tpu",)).as_text()


def test_the_program_grows_neither_with_the_layers_nor_with_the_square_of_the_sequence():
    length = 1280  # no other dimension is as long
    short, long = lowered_tiny(2, length), lowered_tiny(4, length)
    assert short.count("\n") == long.count("\n")
    assert f"x{length}x" in short
    assert not re.search(rf"x{length}x(\d+x)?{length}x", short), "queries x keys of the whole sequence"
    assert f"x{length}x264x" not in short, "logits of the whole sequence"
    # jax hoists out of the scan over layers what depends on the documents alone: masks, chunk by chunk.
    chunks, chunk, entries = length // INDEX_CHUNK, INDEX_CHUNK, length // 4
    assert f"x{chunk}x" in short
    assert not re.search(rf"<{chunks}x(\d+x)*{chunk}x(\d+x)*{entries}x", short), "queries x entries, in chunks"


@pytest.mark.parametrize("name", NAMES)
def test_the_train_state_holds_the_published_weights_once(name):
    """The state that the step trains, its parameters element by element against the Hub's inventory."""
    spec = zoo.get(name)
    program = make_program(recipe(name), abstract_mesh(MESH))
    weights = named_leaves(program.state.params) | named_leaves(program.state.model_state)
    table = hub_tensors(spec.config)
    assert sum(len(tensor.stored()) for tensor in table) == TENSORS[name]
    held: dict[str, int] = {}
    for tensor in table:
        path = "/".join(map(str, tensor.path))
        held[path] = held.get(path, 0) + math.prod(tensor.shape)
    assert held == {path: math.prod(leaf.shape) for path, leaf in weights.items()}
    assert len({(tensor.path, tensor.index) for tensor in table}) == len(table)
    tables = sum(math.prod(tensor.shape) for tensor in table if tensor.storage == "i64")
    assert sum(held.values()) - tables == spec.num_params(spec.config).total


@pytest.mark.parametrize("stage", ["dense", "indexer-warmup", "sparse"])
def test_what_a_stage_trains_and_nothing_else_has_float32_moments(stage):
    program = make_program(recipe(NAMES[0], stage=stage), abstract_mesh(MESH))
    params = named_leaves(program.state.params)
    moments = {}
    for path, leaf in named_leaves(program.state.opt_state).items():
        for kind in ("/mu/", "/nu/"):
            if kind in path:
                moments.setdefault(path.split(kind)[1], []).append(leaf)
    trained = {"dense": lambda p: "indexer" not in p, "indexer-warmup": lambda p: "indexer" in p, "sparse": bool}
    assert moments and set(moments) == {path for path in params if trained[stage](path)}
    for path, leaves in moments.items():
        assert len(leaves) == 2
        for leaf in leaves:
            assert leaf.shape == params[path].shape and leaf.dtype == "float32"
            assert leaf.sharding == params[path].sharding, path


def test_a_step_for_a_gpu():
    """tiny-v4-gpu lowers for CUDA on a host without one."""
    gpu = load_recipe("tiny-v4-gpu")
    program = make_program(gpu, abstract_mesh(gpu.mesh.shape))
    text = program.lower(gpu.data.batch_size, gpu.data.sequence_length, platforms=("cuda",)).as_text()
    assert "bf16" in text and "ragged_dot" in text  # the GPU's grouped products, though a CPU host lowers
