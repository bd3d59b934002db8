"""What does not fit the devices, said with what would."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from sdxl_eqx.config import GenerateConfig

EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA's messages begin where memory is too small, of a program that is compiled and of one that runs."""


class OutOfMemory(RuntimeError):
    """Memory of the devices or of the host that is too small; the message says what to change."""


@contextmanager
def fitting(what: str, remedies: Sequence[str]) -> Iterator[None]:
    """Has memory that is exhausted meanwhile say what does not fit, and what to do.

    Raises:
        OutOfMemory: in place of JAX's error, or of Python's.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if EXHAUSTED not in str(error) and not isinstance(error, MemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise OutOfMemory(f"out of memory: {what} does not fit; use {', or '.join(remedies)} ({reason})") from error


def loading_remedies(config: GenerateConfig) -> list[str]:
    """What makes the weights smaller on each device."""
    is_wide = config.model.activations_dtype == "float32"
    return [*(["--activations-dtype bfloat16"] if is_wide else []), "more devices with --ici-fsdp-parallelism"]


def drawing_remedies(config: GenerateConfig, *, count: int, shares: int, tile: int) -> list[str]:
    """What makes the drawing of `count` pictures smaller, where each of `shares` devices takes its part of them."""
    return [
        *(["a smaller --batch-size"] if count > shares else []),
        "a smaller --width and --height",
        *(["a smaller --vae-tile"] if tile > 128 else ["--vae-tile 512"] if not tile else []),
        *loading_remedies(config),
    ]
