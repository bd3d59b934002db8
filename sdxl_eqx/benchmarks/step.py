"""How fast the training step is: this project beside diffusers' UNet in PyTorch, each in processes of its own."""

import dataclasses
import logging
from typing import Any

from sdxl_eqx.benchmarks.config import StepBenchmark
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.sides import in_turn

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("jax", "jaxlib", "jax-cuda13-plugin", "equinox", "optax", "torch", "diffusers")
"""Whose versions the figures depend on."""

BASELINE = ("torch", "diffusers")
"""What the other side is made of."""


def measure(config: StepBenchmark) -> list[Figure]:
    """Measure both sides, say it, and write it. On a TPU, or without PyTorch and diffusers, there is no other side.

    Raises:
        ValueError: a flag is wrong.
        OSError: a side failed.
    """
    check_counts(batch=config.batch, steps=config.steps, rounds=config.rounds)
    if config.their_batch < 0:
        raise ValueError(f"--their-batch {config.their_batch}: must be at least 1, or 0 for as many as --batch.")
    if config.side < 0 or config.side % 32:
        raise ValueError(f"--side {config.side}: must be a multiple of 32, or 0 for what the model is for.")
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

    ours, theirs = in_turn(
        "step_side", asked, beside, rounds=config.rounds, libraries=BASELINE,
        remedy=". If that is its memory: --their-checkpointing, or a lower --their-batch.",
    )  # fmt: skip
    figures = of_now(_figures(config, ours, theirs), load)
    facts = {"flags": dataclasses.asdict(config), "sides": {"ours": ours, "theirs": theirs}}
    return publish(figures, file, libraries=LIBRARIES, load=load, **facts)


def _figures(config: StepBenchmark, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Figure]:
    """Of what both sides said."""
    said, batch = ours[0], config.batch
    their_batch = config.their_batch or batch
    what = f"{said['model']}, {said['side']}x{said['side']}, {said['dtype']}, {said['device']}, {batch} images a step"
    what += f", remat {said['remat_policy']}"
    if theirs:
        how = [f"{their_batch} images"] if their_batch != batch else []
        how += ["compiled" if config.their_compile else "eager"]
        how += ["gradient checkpointing"] if config.their_checkpointing else []
        what += f" (PyTorch: {', '.join(how)})"

    def of(found: list[dict[str, Any]], name: str, by: float = 1.0) -> tuple[float, ...]:
        return tuple(one[name] * by for one in found)

    each = of(ours, "seconds", 1 / batch)
    figures = [
        Figure(f"{what}: each image", "s", each, of(theirs, "seconds", 1 / their_batch)),
        Figure("images a second", "", tuple(1 / one for one in each)),
    ]
    if said["peak_tflops"]:
        peak, tflop = said["peak_tflops"], said["tflop"]
        mfu = tuple(100 * tflop / peak / one["seconds"] for one in ours)
        figures.append(Figure(f"of the {peak:.0f} TFLOP/s published for bfloat16 (MFU)", "%", mfu))
    if said["memory"] is not None:
        is_same = their_batch == batch
        figures.append(
            Figure("memory at most", "GB", of(ours, "memory", 1e-9), of(theirs if is_same else [], "memory", 1e-9))
        )
    figures.append(Figure("to trace, compile and run the first step", "s", of(ours, "first"), of(theirs, "first")))
    return figures
