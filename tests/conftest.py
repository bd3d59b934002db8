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
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

LONG = (
    "scripts/test_two_processes.py", "scripts/test_train.py", "training/test_sharded.py",
    "training/test_sharded_more.py", "training/test_ahead.py", "scripts/test_wrong_input.py",
    "models/test_controlnet.py", "training/test_checkpoint.py", "training/test_step.py",
)  # fmt: skip
"""Files whose tests take minutes together. They come first: at the end, one process would wait for the other's."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the long files first."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
