"""One evaluation of the model and the step after it, as the coefficients of a linear update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times

Vector = np.ndarray
"""Weights of the kept outputs, the newest first."""


@dataclass(frozen=True)
class Row:
    """What is done at one evaluation; every solver here is of this form.

    ```
    x0     = denoise(x, level)
    m      = output_x x + output_x0 clip(x0)          the output that is kept
    base   = base_x x + base_saved saved + base_m·m   (saved is the last base)
    x      = next_base base + next_x0 x0 + next_m·m + next_noise noise
    ```
    """

    alpha: float
    sigma: float
    t: float
    output: tuple[float, float] = (0.0, 1.0)
    """(output_x, output_x0): x0 itself, unless it says otherwise."""
    base: tuple[float, float] = (1.0, 0.0)
    """(base_x, base_saved)"""
    base_m: Vector = field(default_factory=lambda: np.zeros(0))
    next_base: float = 0.0
    next_x0: float = 0.0
    next_m: Vector = field(default_factory=lambda: np.zeros(0))
    next_noise: float = 0.0


@dataclass(frozen=True)
class Part:
    """Which evaluations of a schedule are made, and what the caller adds to the scheduler's options."""

    start: int
    stop: int
    eta: float = 0.0


Rows = Callable[[Scheduler, Times, Part], list[Row]]
"""A solver: the rows of a part of a schedule."""


def unit(age: int, count: int) -> Vector:
    """The output that was made `age` evaluations ago, among `count` kept ones."""
    return np.eye(count)[age]


def eps_of(alpha: float, sigma: float) -> tuple[float, float]:
    """(weight of x, weight of x0) in `eps = (x - alpha x0) / sigma`; with alpha 1 it is the slope dx/dsigma."""
    return 1 / sigma, -alpha / sigma


def dot(weights: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    """The weighted sum of vectors."""
    return np.sum([w * v for w, v in zip(weights, vectors, strict=True)], axis=0)
