"""Four virtual CPU devices for every test, set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax  # noqa: E402  (after the variables above)

# Tests compile much and run little.
jax.config.update("jax_disable_most_optimizations", True)
