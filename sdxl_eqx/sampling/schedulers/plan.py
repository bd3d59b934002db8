"""A plan: every evaluation of a drawing, worked out before it begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdxl_eqx.sampling.schedulers.discrete import ddim, ddpm, lcm
from sdxl_eqx.sampling.schedulers.dpm_solver import dpm_solver
from sdxl_eqx.sampling.schedulers.level import Level
from sdxl_eqx.sampling.schedulers.pndm import pndm
from sdxl_eqx.sampling.schedulers.row import Part, Row, Rows
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler, SchedulerName
from sdxl_eqx.sampling.schedulers.sigma_space import euler, euler_ancestral, heun, lms
from sdxl_eqx.sampling.schedulers.times import SIGMA_SPACE, Times, times
from sdxl_eqx.sampling.schedulers.unipc import unipc

SOLVERS: dict[SchedulerName, Rows] = {
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "HeunDiscreteScheduler": heun,
    "LMSDiscreteScheduler": lms,
    "DDIMScheduler": ddim,
    "DDPMScheduler": ddpm,
    "DPMSolverMultistepScheduler": dpm_solver,
    "PNDMScheduler": pndm,
    "UniPCMultistepScheduler": unipc,
    "LCMScheduler": lcm,
}

Column = Float[np.ndarray | Array, " n"]
Weights = Float[np.ndarray | Array, "n _"]


class Point(NamedTuple):
    """Where on the schedule: (alpha, sigma, timestep) of each evaluation, or of one."""

    alpha: Column
    sigma: Column
    t: Column


class Table(eqx.Module):
    """The rows of a plan as arrays, an evaluation along the first axis (`Row` says what each does).

    It holds numbers alone, so that plans of as many evaluations and outputs share one compiled loop.
    """

    level: Point
    following: Point
    """The level of the next evaluation."""
    output: Weights
    base: Weights
    base_m: Weights
    next_base: Column
    next_x0: Column
    next_m: Weights
    next_noise: Column
    clip: Column
    """x0 is clipped to this size on either side; infinity leaves it."""
    stochastic: bool = eqx.field(static=True)
    """Whether steps add noise."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A drawing's evaluations: their levels, and what the solver does between them."""

    table: Table
    """What the loop runs on."""
    initial_scale: float
    """What unit noise is multiplied by where the whole schedule begins (diffusers' `init_noise_sigma`)."""
    timesteps: np.ndarray
    """What the UNet is told in each evaluation: diffusers' `timesteps`, or the slice of them that is drawn."""
    scheduler: Scheduler
    steps: int
    custom: tuple[int, ...]
    """The timesteps that a user gave, if any."""
    start: int
    stop: int
    """Which of the whole schedule's evaluations are made."""
    eta: float

    @property
    def first(self) -> Level:
        """The level that a picture is noised to before the first evaluation (`add_noise` of image-to-image)."""
        alpha, sigma, t = (jnp.asarray(column[0], jnp.float32) for column in self.table.level)
        return Level(alpha, sigma, t, jnp.int32(0))

    def part(self, start: int, stop: int | None = None) -> "Plan":
        """The evaluations from `start` to before `stop` of this plan: diffusers' loop over `timesteps[start:stop]`.

        Multistep solvers begin anew, and the last step goes to its true next level.

        Raises:
            ValueError: where nothing is left.
        """
        stop = self.stop - self.start if stop is None else stop
        if not 0 <= start < stop <= self.stop - self.start:
            raise ValueError(
                f"evaluations {start} to {stop} of {self.stop - self.start} are none; take more --num-inference-steps, "
                "or a larger share of them."
            )
        return plan(
            self.scheduler, self.steps, timesteps=self.custom, start=self.start + start, stop=self.start + stop,
            eta=self.eta,
        )  # fmt: skip

    def for_strength(self, strength: float) -> "Plan":
        """The last `strength` of the steps, for image-to-image: 1 is all of them."""
        order = 2 if self.scheduler.name == "HeunDiscreteScheduler" else 1
        taken = min(int(self.steps * strength), self.steps)
        if taken < 1:
            raise ValueError(f"strength {strength} of {self.steps} steps is none; raise --strength.")
        return self.part((self.steps - taken) * order)

    def until(self, denoising_end: float) -> "Plan":
        """The part that a base model draws before a refiner takes over, `denoising_end` of the way from 0 to 1."""
        return self.part(0, self.count_until(denoising_end))

    def count_until(self, denoising_end: float) -> int:
        """How many evaluations that part has."""
        return int(np.sum(self.timesteps >= self._cutoff(denoising_end)))

    def since(self, denoising_start: float) -> "Plan":
        """The part that a refiner draws from where `until` left off."""
        count = int(np.sum(self.timesteps < self._cutoff(denoising_start)))
        if self.scheduler.name == "HeunDiscreteScheduler" and count % 2 == 0:
            count += 1  # so as not to begin between the two evaluations of a step
        return self.part(len(self.timesteps) - count)

    def _cutoff(self, share: float) -> int:
        total = self.scheduler.schedule.num_train_timesteps
        return round(total - share * total)


def plan(
    scheduler: Scheduler,
    steps: int,
    *,
    timesteps: Sequence[int] = (),
    start: int = 0,
    stop: int | None = None,
    eta: float = 0.0,
) -> Plan:
    """The plan of so many steps, or of the evaluations from `start` to before `stop` of them.

    Args:
        timesteps: draws at these instead, for the classes of `times.CUSTOM`.
        eta: how much of DDPM's noise DDIM adds, from 0 to 1; the other classes have none of it.

    Raises:
        ValueError: for steps, timesteps or options that the class cannot do.
    """
    custom = tuple(timesteps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is from 0 (DDIM) to 1 (DDPM's noise), not {eta}; change --eta.")
    # A last sigma of 0 gives infinite steps in log sigma, which the formulas turn into finite weights.
    with np.errstate(divide="ignore", invalid="ignore"):
        schedule = times(scheduler, steps, custom)
        stop = len(schedule.t) if stop is None else stop
        rows = SOLVERS[scheduler.name](scheduler, schedule, Part(start, stop, float(eta)))
        ends = SOLVERS[scheduler.name](scheduler, schedule, Part(stop, min(stop + 1, len(schedule.t))))
    _check(scheduler, rows)
    after = [*rows[1:], *(ends or [Row(1.0, 0.0, 0.0)])]
    clip = scheduler.clip_sample_range if scheduler.clip_sample else np.inf
    table = Table(
        level=_points(rows),
        following=_points(after),
        output=_floats([row.output for row in rows]),
        base=_floats([row.base for row in rows]),
        base_m=_padded([row.base_m for row in rows]),
        next_base=_floats([row.next_base for row in rows]),
        next_x0=_floats([row.next_x0 for row in rows]),
        next_m=_padded([row.next_m for row in rows]),
        next_noise=_floats([row.next_noise for row in rows]),
        clip=_floats([clip for _ in rows]),
        stochastic=any(row.next_noise > 0 for row in rows),
    )
    told = schedule.t[start:stop].astype(np.float32)
    scale = _initial_scale(scheduler, schedule)
    return Plan(table, scale, told, scheduler, schedule.steps, custom, start, stop, float(eta))


def _check(scheduler: Scheduler, rows: Sequence[Row]) -> None:
    """Refuse a plan that divides by zero."""
    if scheduler.schedule.prediction_type == "epsilon" and any(row.alpha == 0 for row in rows):
        raise ValueError(
            f"{scheduler.name}: the first level of rescale_betas_zero_snr=True is pure noise, of which "
            "prediction_type='epsilon' says nothing; use a model of prediction_type='v_prediction', or "
            "EulerDiscreteScheduler."
        )
    for i, row in enumerate(rows):
        numbers = [row.alpha, row.sigma, *row.output, *row.base, *row.base_m, row.next_base, row.next_x0, *row.next_m]
        if not np.isfinite([*numbers, row.next_noise]).all():
            raise ValueError(
                f"{scheduler.name} has no finite step at evaluation {i} (timestep {row.t:g}) with these options: "
                f"final_sigmas_type={scheduler.final_sigmas_type!r}, solver_type={scheduler.solver_type!r}, "
                f"lower_order_final={scheduler.lower_order_final}, predict_x0={scheduler.predict_x0}; "
                "take the class's defaults, or another final_sigmas_type."
            )


def _initial_scale(scheduler: Scheduler, schedule: Times) -> float:
    """The highest sigma, or with `leading` that of picture and noise; 1 where latents keep their variance."""
    if scheduler.name not in SIGMA_SPACE:
        return 1.0
    top = float(schedule.sigma.max())
    return (top**2 + 1) ** 0.5 if scheduler.schedule.timestep_spacing == "leading" else top


def _floats(values: Sequence[float | Sequence[float]]) -> np.ndarray:
    return np.asarray(values, np.float32)


def _points(rows: Sequence[Row]) -> Point:
    return Point(*(_floats([getattr(row, name) for row in rows]) for name in Point._fields))


def _padded(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Weights of outputs, as many columns as the oldest that any row needs."""
    count = max([1 + int(np.flatnonzero(vector).max(initial=0)) for vector in vectors])
    return _floats([[*vector[:count], *[0.0] * (count - len(vector))] for vector in vectors])
