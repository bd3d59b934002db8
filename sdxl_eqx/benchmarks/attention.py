"""How fast attention is at SDXL's shapes: every implementation beside PyTorch's, each side in processes of its own."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from sdxl_eqx.benchmarks.attention_side import WIDTH
from sdxl_eqx.benchmarks.config import AttentionBenchmark
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.sides import in_turn

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("jax", "jaxlib", "torch", "transformer-engine")
"""Whose versions the figures depend on."""


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
        for reason in said["refused"].values():
            log.info("left out: %s", reason)
        return {**asked, **{name: said[name] for name in ("platform", "dtype", "side")}}

    ours, theirs = in_turn("attention_side", asked, beside, rounds=config.rounds, libraries=("torch",))
    figures = of_now(list(_figures(ours, theirs)), load)
    return publish(figures, file, libraries=LIBRARIES, load=load, sides={"ours": ours, "theirs": theirs})


def _figures(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Of what both sides said, shape by shape."""
    said = ours[0]
    per_side = len(theirs[0]["found"]) if theirs else 0
    for i, one in enumerate(said["found"]):
        b, l, s, n = one["shape"]
        products = 4 * b * n * l * s * WIDTH / 1e9

        def of(found: Sequence[dict[str, Any]], which: int, passes: str) -> tuple[float, ...]:
            return tuple(each["found"][which][passes] for each in found)

        what = f"{one['name']}, {b} x {l} to {s}, {n} heads, {said['dtype']}, {said['device']}"
        for passes, title in (("forward", "forward"), ("both", "both passes")):
            mine = of(ours, i, passes)
            other = of(theirs, i % per_side, passes) if theirs else ()
            # The backward pass has twice the products, scores that it computes again left out.
            rate = products * (1 if passes == "forward" else 3) / sorted(mine)[len(mine) // 2]
            yield Figure(f"{what}: {title} ({rate:.2g} TFLOP/s)", "ms", mine, other)
