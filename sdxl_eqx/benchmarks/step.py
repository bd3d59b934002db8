"""How fast the training step is: this project beside diffusers' UNet in PyTorch, each in processes of its own."""

import logging
from typing import Any

from sdxl_eqx.benchmarks.config import StepBenchmark
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.sides import in_turn

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("jax", "jaxlib", "equinox", "optax", "torch", "diffusers")
"""Whose versions the figures depend on."""

BASELINE = ("torch", "diffusers")
"""What the other side is made of."""


def measure(config: StepBenchmark) -> list[Figure]:
    """Measure both sides, say it, and write it. Without PyTorch, or on a TPU, there is no other side.

    Raises:
        ValueError: a flag is wrong.
        OSError: a side failed.
    """
    check_counts(batch=config.batch, steps=config.steps, rounds=config.rounds)
    if config.their_batch < 0 or config.side < 0:
        raise ValueError(f"--their-batch {config.their_batch}, --side {config.side}: must not be negative.")
    file, load = results_file(config.json), load_average()
    asked: dict[str, Any] = {
        name: getattr(config, name) for name in ("model", "batch", "side", "dtype", "remat_policy", "steps")
    }

    def beside(said: dict[str, Any]) -> dict[str, Any]:
        log.info(
            "%s: %.3f s a step, %.0f s until the first was done; remat %s",
            said["device"], said["seconds"], said["first"], said["remat_policy"],
        )  # fmt: skip
        return {name: said[name] for name in ("platform", "dtype", "unet", "downscale", "side")} | {
            "batch": config.their_batch or config.batch,
            "steps": config.steps,
            "checkpointing": config.their_checkpointing,
            "compile": config.their_compile,
        }

    ours, theirs = in_turn("step_side", asked, beside, rounds=config.rounds, libraries=BASELINE)
    figures = of_now(_figures(config, ours, theirs), load)
    return publish(figures, file, libraries=LIBRARIES, load=load, sides={"ours": ours, "theirs": theirs})


def _figures(config: StepBenchmark, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Figure]:
    """Of what both sides said."""
    said, batch = ours[0], config.batch
    their_batch = config.their_batch or batch
    images = f"{batch}" if their_batch == batch else f"{batch} (PyTorch {their_batch})"
    what = f"{said['model']}, {said['side']}x{said['side']}, {images} images a step, {said['dtype']}, {said['device']}"

    def of(found: list[dict[str, Any]], name: str, by: float = 1.0) -> tuple[float, ...]:
        return tuple(one[name] * by for one in found)

    each = of(ours, "seconds", 1 / batch)
    figures = [
        Figure(f"{what}: each image", "s", each, of(theirs, "seconds", 1 / their_batch)),
        Figure("images a second", "", tuple(1 / one for one in each)),
        Figure("memory at most", "GB", of(ours, "memory", 1e-9), of(theirs, "memory", 1e-9)),
        Figure("until the first step is done, loading left out", "s", of(ours, "first"), of(theirs, "first")),
    ]
    if said["peak_tflops"]:
        rate = 100 * said["tflop"] / said["peak_tflops"]
        figures.insert(2, Figure("of the published peak (MFU)", "%", tuple(rate / one["seconds"] for one in ours)))
    return figures
