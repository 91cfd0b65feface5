"""One conftest: eight simulated CPU devices, set before any backend is used."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
