"""Prints how far Fathom is from the references: the figures of BENCHMARKS.md, "Parity".

    python scripts/bench/parity.py            the golden case, made with the official inference code
    python scripts/bench/parity.py --models   also whole models and gradients against transformers (minutes)

Run it from the repository: golden case and reference models are those of the tests.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fathom

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "v4_tiny"


def golden() -> None:
    """Largest absolute differences from the golden case, without and with the FP8/FP4 simulation."""
    for mode in ("plain", "sim"):
        expected = np.load(GOLDEN / f"expected_{mode}.npz")
        model = fathom.load(GOLDEN, simulate_quant=mode == "sim")
        run = jax.jit(lambda ids, model=model: model(ids, return_streams=True))
        with jax.default_matmul_precision("highest"):
            out = run(jnp.asarray(expected["input_ids"]))

        def worst(ours: jax.Array, name: str, expected: np.lib.npyio.NpzFile = expected) -> float:
            return float(np.abs(np.asarray(ours) - expected[name]).max())

        streams = [worst(x, f"hidden_streams_{i}") for i, x in enumerate(out.streams)]
        print(
            f"golden case, {mode}: logits {worst(out.logits, 'logits'):.1e}, MTP logits "
            f"{worst(out.mtp_logits, 'mtp_logits_ids_rolled_left'):.1e}, worst stream {max(streams):.1e} absolute",
            flush=True,
        )


def whole_models() -> None:
    """Logits and gradients of seed 0 of each schedule against transformers in float64, and its own float32."""
    from fathom.models.deepseek_v4.hf_mapping import hub_tensors
    from tests.parity import test_model as parity
    from tests.parity.gradients import RELATIVE, terms_size

    for schedule in parity.SCHEDULES:
        config, theirs = parity.config_of(schedule), parity.reference_model(schedule, 0)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, parity.LENGTH))
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = fathom.load(folder)
        single_out, single = parity.reference_gradients(theirs, ids)
        with parity.double_precision():
            out, exact = parity.reference_gradients(theirs.double(), ids)
        exact_logits, single_logits = (x.logits.detach().numpy() for x in (out, single_out))
        _, params, rest = nnx.split(ours, nnx.Param, ...)
        logits, _, grads = parity.compiled(schedule)(params, rest, jnp.asarray(ids))
        own = np.abs(single_logits - exact_logits).max()
        print(
            f"{schedule}: logits {np.abs(logits - exact_logits).max():.1e} absolute (transformers' own float32 "
            f"{own:.1e}), logits up to {np.abs(exact_logits).max():.1f}"
        )
        flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}
        tensors = [t for t in hub_tensors(config) if t.name in exact]
        by_name = {t.name: t.to_hub(flat[t.path][t.index]) for t in tensors}
        errors = {name: parity.relative(gradient, exact[name]) for name, gradient in by_name.items()}
        print(f"{schedule}: gradients, median over {len(errors)} parameters {statistics.median(errors.values()):.1e}")
        for name, error in errors.items():
            if error > RELATIVE:
                reference = parity.relative(single[name], exact[name])
                print(f"{schedule}: gradient of {name} {error:.1e} (transformers' own float32 {reference:.1e})")
        weights = parity.native_weights(theirs)
        for name in sorted(n for n in exact if n.endswith("_scale")):
            size = terms_size(weights, exact, name)
            own, reference = (np.linalg.norm(found[name] - exact[name]) / size for found in (by_name, single))
            print(f"{schedule}: {name} in parts of its terms: {own:.1e} (transformers' own float32 {reference:.1e})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", action="store_true", help="also whole models against transformers")
    arguments = parser.parse_args()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()  # as the tests
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    golden()
    if arguments.models:
        sys.path.insert(0, str(ROOT))
        whole_models()
