"""A whole train step's memory on each device, read off the compiled program: as the sequence is cut, and on a slice."""

from __future__ import annotations

import pytest

import fathom
from fathom.plan.planner import compile_report
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


# GiB allowed. Of a v5p's 95, 80 leave room for what the program does not see; of a v6e's 32 the compiler takes 31.24.
SLICES = [
    ("deepseek-v4-flash", "v5p:4x4x8", "fsdp=8,expert=16", 1_048_576, 80),
    ("deepseek-v4-flash", "v6e:16x16", "fsdp=16,expert=16", 1_048_576, 31.24),
    ("deepseek-v4-flash", "v5p:4x4x4", "fsdp=4,expert=16", 131_072, 80),
    ("deepseek-v4-pro", "v5p:4x8x16", "fsdp=32,expert=16", 131_072, 80),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "topology", "mesh", "length", "limit"), SLICES)
def test_long_sequences_fit_a_slice(model, topology, mesh, length, limit):
    """One row, AdamW in float32: arguments, temporaries and output together, GiB of each chip."""
    pytest.importorskip("libtpu", reason="the TPU's compiler; pip install 'jax[tpu]'")
    bench = load_bench("step_memory")
    sizes = ["--length", str(length), "--rows", "1"]
    recipe = bench.make_recipe(bench.parse([model, topology, "--mesh", mesh, "--preset", "long", *sizes]))
    report = compile_report(recipe, "", topology)
    print("\n" + report.to_text(parameters=False))
    assert report.fits and report.total < limit * GIB
