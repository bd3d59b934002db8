"""Every test runs on 8 CPU devices, with shapes checked by beartype and rank promotion an error."""

import os

DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

# Only now may anything import JAX, and only with the hook in place may anything import the package.
from jaxtyping import install_import_hook

install_import_hook("sdxl_eqx", "beartype.beartype")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")
