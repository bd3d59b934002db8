"""How fast the training step is: this project beside diffusers' UNet in PyTorch, each in processes of its own."""

import logging
from typing import Any

from sdxl_eqx.benchmarks.config import StepBenchmark
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.sides import ask, command, has_other_side

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
    ours, theirs = [ask(command("step_side", "ours", asked))], []
    said = ours[0]
    log.info(
        "%s: %.3f s a step after %.0f s until the first; remat %s",
        said["device"], said["seconds"], said["first"], said["remat_policy"],
    )  # fmt: skip
    facts = ("platform", "dtype", "unet", "downscale", "side")
    other = {name: said[name] for name in facts} | {
        "batch": config.their_batch or config.batch,
        "steps": config.steps,
        "checkpointing": config.their_checkpointing,
        "compile": config.their_compile,
    }
    compared = has_other_side(said["platform"], BASELINE)
    if compared:
        theirs.append(ask(command("step_side", "theirs", other)))
    for i in range(1, config.rounds):
        sides = [(ours, "ours", asked), (theirs, "theirs", other)][: 1 + compared]
        for found, side, words in reversed(sides) if i % 2 else sides:
            found.append(ask(command("step_side", side, words)))
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
