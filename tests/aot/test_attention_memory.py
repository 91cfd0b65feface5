"""What one V4-Flash attention sublayer holds and multiplies, forward and backward, read off the compiled program."""

from __future__ import annotations

import pytest

from fathom.layers.options import ComputeOptions
from tests.aot.bench import load_bench

bench = load_bench("attention_memory")
GIB = 2**30


def compiled(kind: str, length: int, topology: str, **options):
    """(larger of peak and temporaries in GiB, temporaries in bytes, operations per token)."""
    options = ComputeOptions(param_dtype="bfloat16", **options)
    program, flops, _ = bench.compile_layer(kind, length, topology=topology, options=options)
    memory = program.memory_analysis()
    larger = max(memory.temp_size_in_bytes, memory.peak_memory_in_bytes) / GIB
    return larger, memory.temp_size_in_bytes, flops


@pytest.mark.parametrize("kind", ["csa", "hca", "sliding"])
def test_temporaries_grow_with_the_sequence_and_no_faster(kind):
    """On a CPU, which the suite can afford, at the released widths; nothing of S x 32,768 is held."""
    (_, small, _), (_, large, _) = (compiled(kind, length, "cpu", stretch=512) for length in (2048, 4096))
    assert large < 2.2 * small
    assert large < 2 * GIB


@pytest.mark.parametrize(("length", "stated"), [(4096, 998.8e6), (32768, 1110.0e6), (131072, 1316.9e6)])
def test_products_are_few_more_than_the_formula(length, stated):
    """The stated forward (projections, compressors, indexer, attention) + twice the projections + 2.5 the attention."""
    step, state = bench.make_step("csa", ComputeOptions(param_dtype="bfloat16"))
    x = bench.jax.ShapeDtypeStruct((1, length, bench.CONFIG.hidden_size), bench.jnp.bfloat16)
    with bench.jax.sharding.use_abstract_mesh(bench.tpu_mesh()):
        flops = bench.count_flops(step, state, x, x, platform="tpu") / length
    assert stated < flops < 1.3 * stated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "length", "loss", "limit"),
    [
        ("csa", 32768, False, 2.5),
        ("csa", 131072, False, 8.0),
        ("csa", 32768, True, 1.3 * 2.5),
        ("csa", 131072, True, 1.3 * 8.0),
        ("hca", 32768, False, 2.5),
        ("hca", 131072, False, 8.0),
        ("sliding", 131072, False, 8.0),
    ],
)
def test_a_whole_sequence_on_one_v5p_chip(kind, length, loss, limit):
    larger, _, _ = compiled(kind, length, "v5p:2x2x1", indexer_loss=loss)
    assert larger < limit


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("version", ["reference", "masked", "gathered"])
def test_every_version_compiles_for_every_generation(version, topology):
    """Forward and backward; scores of 16,384 tokens are made in pieces, of which libtpu for tpu7x knew too few."""
    length = 4096 if version == "reference" else 16384
    larger, _, flops = compiled("csa", length, topology, attention=version)
    assert 0.5 < larger < 95 and flops > 900e6
