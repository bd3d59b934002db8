"""The solvers in the coordinates `x = x0 + sigma eps`: Euler, Euler ancestral, Heun and linear multistep.

All follow the slope `d = dx/dsigma = (x - x0) / sigma` of the probability-flow ODE (Karras et al. 2022, equation 1).
"""

from typing import Any

import numpy as np

from sdxl_eqx.sampling.schedulers.row import Part, Row, eps_of, unit
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times


def _at(times: Times, i: int) -> dict[str, Any]:
    """The level of an evaluation, and the slope as the output that is kept."""
    return {"alpha": 1.0, "sigma": times.sigma[i], "t": times.t[i], "output": eps_of(1.0, times.sigma[i])}


def euler(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Euler's method (Karras et al. 2022, algorithm 1 without churn)."""
    sigma = times.sigma
    return [
        Row(**_at(times, i), next_base=1.0, next_m=(sigma[i + 1] - sigma[i]) * unit(0, 1))
        for i in range(part.start, part.stop)
    ]


def euler_ancestral(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Euler's method to a lower level, and noise up again (k-diffusion `sample_euler_ancestral`)."""
    rows = []
    for i in range(part.start, part.stop):
        s, s_to = times.sigma[i], times.sigma[i + 1]
        up = np.sqrt(s_to**2 * (s**2 - s_to**2) / s**2)
        down = np.sqrt(s_to**2 - up**2)
        rows.append(Row(**_at(times, i), next_base=1.0, next_m=(down - s) * unit(0, 1), next_noise=up))
    return rows


def heun(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1 without churn); its last step is Euler's.

    Every second evaluation starts over from the sample before, with the mean of both slopes.
    """
    sigma, rows = times.sigma, []
    for i in range(part.start, part.stop):
        if (i - part.start) % 2 == 0:
            rows.append(Row(**_at(times, i), next_base=1.0, next_m=(sigma[i + 1] - sigma[i]) * unit(0, 2)))
        else:
            mean = (unit(0, 2) + unit(1, 2)) / 2
            rows.append(Row(**_at(times, i), base=(0.0, 1.0), next_base=1.0, next_m=(sigma[i] - sigma[i - 1]) * mean))
    return rows


def lms(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Adams-Bashforth over uneven steps in sigma, of order 4 at most (k-diffusion `sample_lms`).

    The weight of each slope is the integral of its Lagrange polynomial over the step. In a part that begins late, the
    order is that of the whole schedule, and the slopes that are missing are left out: diffusers does so.
    """
    nodes, weights = np.polynomial.legendre.leggauss(3)
    sigma, rows = times.sigma, []
    for i in range(part.start, part.stop):
        order = min(i + 1, 4)
        tau = (sigma[i] + sigma[i + 1]) / 2 + nodes * (sigma[i + 1] - sigma[i]) / 2
        coefficients = np.zeros(4)
        for j in range(min(order, i - part.start + 1)):
            others = [sigma[i - k] for k in range(order) if k != j]
            lagrange = np.prod([(tau - s) / (sigma[i - j] - s) for s in others], axis=0)
            coefficients[j] = np.sum(weights * lagrange) * (sigma[i + 1] - sigma[i]) / 2
        rows.append(Row(**_at(times, i), next_base=1.0, next_m=coefficients))
    return rows
