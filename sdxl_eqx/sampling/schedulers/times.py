"""The timesteps that each sampler visits, and their noise levels: diffusers' `set_timesteps`, in float64."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_eqx.diffusion.schedule import ScheduleConfig, alphas_cumprod
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler

SIGMA_SPACE = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"
)  # fmt: skip
"""The classes in the coordinates of Karras et al. 2022."""

SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""The classes that spread one step more, and leave the last timestep out."""

CUSTOM = (
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"
)  # fmt: skip
"""The classes that diffusers lets a user give timesteps to."""


@dataclass(frozen=True)
class Times:
    """A whole schedule of evaluations, from noisy to clean."""

    t: np.ndarray
    """The timestep that the UNet is told in each evaluation; Heun and PNDM tell some twice."""
    alpha_bar: np.ndarray
    """ᾱ of every timestep of training."""
    sigma: np.ndarray
    """sqrt((1 - ᾱ) / ᾱ) of each evaluation, and of the end: for the classes that step from sigma to sigma."""
    final_alpha_bar: float
    """ᾱ before timestep 0: 1, or with set_alpha_to_one=False that of timestep 0."""
    steps: int
    """The number of steps that was asked for."""
    warmup: int = 0
    """How many of PNDM's evaluations are Runge-Kutta ones."""

    def at(self, t: float) -> float:
        """ᾱ of a timestep, and before the first of them that of the end.

        Raises:
            ValueError: for a timestep past those of training.
        """
        if t >= len(self.alpha_bar):
            raise ValueError(
                f"timestep {int(t)} is outside 0 to {len(self.alpha_bar) - 1}; draw with fewer --num-inference-steps, "
                "or with a smaller steps_offset."
            )
        return float(self.alpha_bar[int(t)]) if t >= 0 else self.final_alpha_bar


def spread(scheduler: Scheduler, steps: int) -> np.ndarray:
    """Timesteps by the config's spacing (Lin et al. 2023, table 2), from noisy to clean; LCM has its own."""
    schedule, name = scheduler.schedule, scheduler.name
    total = schedule.num_train_timesteps
    if name == "LCMScheduler":
        original = scheduler.original_inference_steps
        if steps > original:
            raise ValueError(
                f"LCMScheduler draws in at most original_inference_steps={original} steps, and {steps} were asked for; "
                "lower --num-inference-steps."
            )
        origin = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
        return origin[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].astype(np.float64)
    extra = 1 if name in SOLVERS else 0
    if schedule.timestep_spacing == "linspace":
        t = np.linspace(0, total - 1, steps + extra)
        t = t.astype(np.float32).astype(np.float64) if name in SIGMA_SPACE else t.round()
        return t[::-1][: len(t) - extra]
    if schedule.timestep_spacing == "leading":
        t = np.arange(steps + extra) * (total // (steps + extra))
        return t[::-1][: len(t) - extra].astype(np.float64) + schedule.steps_offset
    t = np.round(np.arange(total, 0, -total / steps)) - 1
    return t[:steps]  # for some steps rounding gives arange one more, timestep -1


def karras(sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """Noise levels even in sigma^(1/7) (Karras et al. 2022, equation 5)."""
    rho = 7.0
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def _ends(training: np.ndarray, t: np.ndarray, given: tuple[float | None, float | None]) -> list[float]:
    """The highest and the lowest level: as given, or those of two timesteps."""
    found = np.interp(t, np.arange(len(training)), training)
    return [float(level) if one is None else one for one, level in zip(given, found, strict=True)]


def rounded_sigmas(schedule: ScheduleConfig, alpha_bar: np.ndarray) -> np.ndarray:
    """sigma of training's timesteps with the float32 rounding of diffusers, by which Karras timesteps are rounded.

    A level may lie within 1e-4 of the middle between two timesteps, and the UNet would be told the other one: 575 for
    576 in 18 steps. PyTorch's linspace is a float32 step, counted from either end and rounded once; its product is
    float64's.
    """
    if schedule.rescale_betas_zero_snr:
        rounded = alpha_bar.astype(np.float32)
    else:
        power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
        low, high = np.float32(schedule.beta_start**power), np.float32(schedule.beta_end**power)
        n = schedule.num_train_timesteps
        i, step = np.arange(n), np.float64((high - low) / np.float32(n - 1))
        betas = np.where(i < n // 2, low + step * i, high - step * (n - 1 - i)).astype(np.float32)
        betas = betas * betas if power == 0.5 else betas
        rounded = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)
    return np.sqrt((1 - rounded) / rounded)


def sigma_to_t(sigma: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Fractional timesteps of noise levels, linear in log sigma between those of training."""
    return np.interp(np.log(sigma), np.log(training), np.arange(len(training)))


def pndm_timesteps(scheduler: Scheduler, t: np.ndarray) -> tuple[np.ndarray, int]:
    """(timesteps of every evaluation, how many are Runge-Kutta ones) of PNDM; t rises."""
    if scheduler.skip_prk_steps:
        return np.concatenate([t[:-1], t[-2:-1], t[-1:]])[::-1], 0
    if len(t) < 4:
        raise ValueError(f"PNDMScheduler with skip_prk_steps=False needs 4 steps or more, and {len(t)} were asked for.")
    half = scheduler.schedule.num_train_timesteps // len(t) // 2
    prk = (t[-4:].repeat(2) + np.tile([0, half], 4))[:-1].repeat(2)[1:-1][::-1]
    return np.concatenate([prk, t[:-3][::-1]]), len(prk)


def check(scheduler: Scheduler, steps: int, custom: Sequence[int]) -> None:
    """Refuse steps and timesteps that are none."""
    total = scheduler.schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"a picture is drawn in 1 to {total} steps, not {steps}; change --num-inference-steps.")
    if not custom:
        return
    if scheduler.name not in CUSTOM or scheduler.use_karras_sigmas:
        raise ValueError(
            f"timesteps={tuple(custom)} cannot be given to {scheduler.name}"
            f"{' with use_karras_sigmas' if scheduler.use_karras_sigmas else ''}; choose of {', '.join(CUSTOM)}."
        )
    falling = all(a > b for a, b in itertools.pairwise(custom))
    if not falling or not 0 <= custom[-1] <= custom[0] < total:
        raise ValueError(f"timesteps={tuple(custom)} must fall, and lie between 0 and {total - 1}.")


def times(scheduler: Scheduler, steps: int, custom: Sequence[int] = ()) -> Times:
    """The schedule of so many steps, or of the timesteps that a user gives.

    Raises:
        ValueError: for steps or timesteps that the class cannot do.
    """
    steps = len(custom) or steps
    check(scheduler, steps, custom)
    name, zero = scheduler.name, scheduler.schedule.rescale_betas_zero_snr
    alpha_bar = alphas_cumprod(scheduler.schedule)
    if zero and name in (*SIGMA_SPACE, *SOLVERS):
        alpha_bar[-1] = 2**-24  # so that sigma is 4096 and not infinite, as in diffusers
    t = np.asarray(custom, np.float64) if custom else spread(scheduler, steps)
    to_one = scheduler.set_alpha_to_one or name == "DDPMScheduler"
    final = 1.0 if to_one else float(alpha_bar[0])
    if name == "PNDMScheduler":
        t, warmup = pndm_timesteps(scheduler, t[::-1])
        return Times(t, alpha_bar, np.zeros(0), final, steps, warmup)
    if name not in (*SIGMA_SPACE, *SOLVERS):
        return Times(t, alpha_bar, np.zeros(0), final, steps)

    training = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigma = np.interp(t, np.arange(len(training)), training)
    sigma_min = training[0]
    if scheduler.use_karras_sigmas and name != "EulerAncestralDiscreteScheduler":
        given = scheduler.sigma_max, scheduler.sigma_min
        rounded = rounded_sigmas(scheduler.schedule, alpha_bar)
        at = np.array([len(training) - 1, 0]) if name in SOLVERS else t[[0, -1]]
        ends, close = (_ends(table, at, given) for table in (training, rounded))
        sigma = karras(ends[0], ends[1], steps)
        t = sigma_to_t(karras(close[0], close[1], steps), rounded)
        t = t.round() if name in SOLVERS else t
        sigma_min = sigma[-1] if name == "UniPCMultistepScheduler" else sigma_min
    last = sigma_min if scheduler.final_sigmas_type == "sigma_min" else 0.0
    sigma = np.append(sigma, last)
    if name == "HeunDiscreteScheduler":  # every level but the first is evaluated twice
        t, sigma = np.repeat(t, 2)[1:], np.concatenate([sigma[:1], np.repeat(sigma[1:-1], 2), sigma[-1:]])
    return Times(t, alpha_bar, sigma, final, steps)
