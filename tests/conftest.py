"""One conftest: eight simulated CPU devices, set before any backend is used, and one compilation cache."""

import os
import tempfile
from importlib import metadata
from pathlib import Path

# Programs that several tests, workers or child processes compile alike are compiled once per session. The first
# process of the session makes the folder and the others inherit it; nothing outlives the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="fathom-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_cache.name))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# None of LLVM's optimisation: nothing here runs for long, and compiling is most of it. Child processes inherit it.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

# One thread of numpy and PyTorch to a worker: there are as many workers as cores. Before numpy is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# The TPU's compiler, of which tests in several workers load one each, asks for no TPU and minds no other.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402 - reads the environment when it is imported
import pytest  # noqa: E402

# XLA's defaults otherwise, not `fathom.mesh.simulate_devices`: that one trades the pairwise sums of the CPU's reduction
# library for speed, and the parity tests' tolerances on sums that cancel need them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def compile_loops_quickly() -> None:
    """Of the two ways in which jaxlib 0.10 makes a CPU's loops, the one that compiles in half the time.

    The flag is there while XLA reads its flags, at the first program, and gone before libtpu reads them, which ends
    the process over a flag that it does not know; as other versions of jaxlib may.
    """
    flags = os.environ["XLA_FLAGS"]
    if metadata.version("jaxlib").startswith("0.10.") and "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    os.environ["XLA_FLAGS"] = flags


compile_loops_quickly()


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """A worker that kept every program it has compiled would need more than 6 GB in the end."""
    yield
    jax.clear_caches()
