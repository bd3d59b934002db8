"""How fast attention is at SDXL's shapes: every implementation beside PyTorch's, each side in processes of its own."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from sdxl_eqx.benchmarks.attention_side import WIDTH
from sdxl_eqx.benchmarks.config import AttentionBenchmark
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.sides import in_turn

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "transformer-engine")
"""Whose versions the figures depend on."""

SHORT = 0.2
"""Milliseconds that Python and PyTorch's autograd take to begin a call are a large part of on accelerators."""


def measure(config: AttentionBenchmark) -> list[Figure]:
    """Measure both sides, say it, and write it. Without PyTorch, or on a TPU, there is no other side.

    Raises:
        ValueError: a flag is wrong.
        OSError: a side failed.
    """
    check_counts(batch=config.batch, rounds=config.rounds)
    if config.side < 0 or config.side % 32:
        raise ValueError(f"--side {config.side}: must be a multiple of 32, or 0 for what suits the device.")
    file, load = results_file(config.json), load_average()
    asked = {name: getattr(config, name) for name in ("batch", "side", "dtype")}

    def beside(said: dict[str, Any]) -> dict[str, Any]:
        for reason in said["refused"]:
            log.info("left out: %s", reason)
        return {**asked, **{name: said[name] for name in ("platform", "dtype", "side")}}

    ours, theirs = in_turn("attention_side", asked, beside, rounds=config.rounds, libraries=("torch",))
    figures = of_now(list(_figures(ours, theirs)), load)
    facts = {"flags": dataclasses.asdict(config), "sides": {"ours": ours, "theirs": theirs}}
    return publish(figures, file, libraries=LIBRARIES, load=load, **facts)


def _figures(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Of what both sides said of each implementation at each shape, as far as every round has it."""
    said = ours[0]
    for one in said["found"]:
        name, shape = one["name"], one["shape"]
        mine = [found for side in ours for found in side["found"] if (found["name"], found["shape"]) == (name, shape)]
        other = [found for side in theirs for found in side["found"] if found["shape"] == shape]
        b, l, s, n = shape
        what = f"{name}, {b} x {l} to {s}, {n} heads, {said['dtype']}, {said['device']}"
        beside = f" (PyTorch: {other[0]['kernel']})" if other else ""
        # The backward pass has twice the products, scores that it computes again left out.
        for passes, title, times in (("forward", "forward", 1), ("both", "both passes", 3)):
            rounds = tuple(found[passes] for found in mine)
            figure = Figure(f"{what}: {title}{beside}", "ms", rounds, tuple(found[passes] for found in other))
            is_short = said["platform"] != "cpu" and min(figure.ours, figure.baseline or figure.ours) < SHORT
            yield dataclasses.replace(figure, note="about what it takes to begin it" if is_short else "")
            gflop = times * 4 * b * n * l * s * WIDTH / 1e9
            yield Figure(f"{title}, without what is computed again", "TFLOP/s", tuple(gflop / ms for ms in rounds))
