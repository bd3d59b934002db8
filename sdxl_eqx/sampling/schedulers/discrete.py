"""The samplers over the timesteps of training, `x = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) eps`: DDIM, DDPM and LCM."""

import numpy as np

from sdxl_eqx.sampling.schedulers.row import Part, Row, unit
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times


def ddim(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """DDIM (Song et al. 2021, equations 12 and 16); eps is that of x0 before it is clipped, as in diffusers.

    The timestep before t is T / steps less, whatever the spacing.
    """
    rows = []
    stride = scheduler.schedule.num_train_timesteps // times.steps
    for t in times.t[part.start : part.stop]:
        a, a_to = np.float64(times.at(t)), np.float64(times.at(t - stride))
        alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
        noise = part.eta * np.sqrt((1 - a_to) / (1 - a) * (1 - a / a_to))
        direction = np.sqrt(1 - a_to - noise**2)
        rows.append(
            Row(
                alpha, sigma, t,
                next_m=np.sqrt(a_to) * unit(0, 1),
                next_base=direction / sigma, next_x0=-direction * alpha / sigma,  # direction * eps
                next_noise=noise,
            )
        )  # fmt: skip
    return rows


def ddpm(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Ancestral sampling of DDPM (Ho et al. 2020, equation 7), from each timestep of the schedule to the next."""
    rows = []
    for i in range(part.start, part.stop):
        t, t_to = times.t[i], times.t[i + 1] if i + 1 < len(times.t) else -1.0
        a, a_to = np.float64(times.at(t)), np.float64(times.at(t_to))
        beta = 1 - a / a_to
        small = np.sqrt(max((1 - a_to) / (1 - a) * beta, 1e-20))
        noise = np.sqrt(beta) if scheduler.variance_type == "fixed_large" else small
        rows.append(
            Row(
                np.sqrt(a), np.sqrt(1 - a), t,
                next_m=np.sqrt(a_to) * beta / (1 - a) * unit(0, 1),
                next_base=np.sqrt(a / a_to) * (1 - a_to) / (1 - a),
                next_noise=noise if t > 0 else 0.0,
            )
        )  # fmt: skip
    return rows


def lcm(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): to x0, and noised again for the next step."""
    rows, sigma_data = [], 0.5
    for i in range(part.start, part.stop):
        a, last = np.float64(times.at(times.t[i])), i + 1 == len(times.t)
        a_to = np.float64(1.0 if last else times.at(times.t[i + 1]))
        s = times.t[i] * scheduler.timestep_scaling
        c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s / np.sqrt(s**2 + sigma_data**2)
        rows.append(
            Row(
                np.sqrt(a), np.sqrt(1 - a), times.t[i],
                next_m=np.sqrt(a_to) * c_out * unit(0, 1), next_base=np.sqrt(a_to) * c_skip,
                next_noise=np.sqrt(1 - a_to),
            )
        )  # fmt: skip
    return rows
