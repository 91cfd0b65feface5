"""One conftest: eight simulated CPU devices, set before any backend is used, and one compilation cache."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

# Programs that several tests, workers or child processes compile alike are compiled once per session. The first
# process of the session makes the folder and the others inherit it; nothing outlives the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="fathom-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_cache.name))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# XLA's defaults, not `fathom.mesh.simulate_devices`: that one trades the pairwise sums of the CPU's reduction library
# for speed, and the parity tests' tolerances on sums that cancel need them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """A worker that kept every program it has compiled would need more than 6 GB in the end."""
    yield
    jax.clear_caches()
