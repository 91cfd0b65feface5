"""A whole train step's memory on each device, read off the compiled program: as the sequence is cut, and on a slice."""

from __future__ import annotations

import pytest

import fathom
from tests.aot.bench import load_bench

GIB = 2**30


def test_activations_of_a_device_fall_as_the_sequence_is_cut():
    """Eight pieces: below a quarter each. Nothing of the whole sequence but its entries is held."""
    bench = load_bench("context_memory")
    layers = ["attention_kinds=[csa,hca]", "compress_ratios=[4,128]", "router_kinds=[hash,learned]"]
    overrides = [f"model.config.{layer}" for layer in layers]
    recipe = fathom.load_recipe("tiny-v4-131k-cpu", [*overrides, "model.config.num_mtp_layers=0"])
    whole, cut = (bench.temporaries(recipe, n, 4096, xla_backend_optimization_level=0) for n in (1, 8))
    assert cut < 0.25 * whole


# GiB allowed of a v5p chip's 95: 80 leave room for what the program does not see.
SLICES = [
    ("deepseek-v4-flash", "v5p:4x4x8", "fsdp=8,expert=16", 1_048_576, 1, 80),
    ("deepseek-v4-flash", "v5p:4x4x4", "fsdp=4,expert=16", 131_072, 1, 80),
    ("deepseek-v4-pro", "v5p:4x8x16", "fsdp=32,expert=16", 131_072, 1, 80),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "topology", "mesh", "length", "rows", "limit"), SLICES)
def test_long_sequences_fit_a_slice(model, topology, mesh, length, rows, limit):
    """Arguments, temporaries and output together at their most, GiB of each chip; several minutes of compiling."""
    pytest.importorskip("libtpu", reason="the TPU's compiler; pip install 'jax[tpu]'")
    bench = load_bench("step_memory")
    sizes = ["--length", str(length), "--rows", str(rows)]
    _, memory, _, _ = bench.compile_step(bench.parse([model, topology, "--mesh", mesh, "--preset", "long", *sizes]))
    assert memory.peak_memory_in_bytes < limit * GIB
