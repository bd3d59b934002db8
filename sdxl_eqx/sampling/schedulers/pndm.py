"""PNDM: pseudo Runge-Kutta steps, then pseudo linear multistep ones (Liu et al. 2022), or those alone (PLMS)."""

import numpy as np

from sdxl_eqx.sampling.schedulers.row import Part, Row, Vector, dot, eps_of, unit
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the outputs, the newest first (Liu et al. 2022, equation 12)."""

OUTPUTS = 13
"""Those of 3 Runge-Kutta steps, and of one after."""


def pndm(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """Equation 9 of the paper from level to level, with outputs (eps or v, as the model has them) combined.

    Rows are counted from where the part begins, whatever came before: diffusers counts so too, which is why a part
    that begins late has no timestep twice.
    """
    stride = scheduler.schedule.num_train_timesteps // times.steps
    rows, kept = [], []
    for count, t in enumerate(times.t[part.start : part.stop]):

        def m(evaluation: int, count: int = count) -> Vector:
            return unit(count - evaluation, OUTPUTS)

        start_over = False
        if count < times.warmup:
            stage, first = count % 4, count // 4 * 4
            t_from, t_to = times.t[first], t - (0 if count % 2 else stride // 2)
            start_over = stage > 0
            kept += [count] if stage == 0 else []
            rk4 = dot((1 / 6, 1 / 3, 1 / 3, 1 / 6), [m(first + k) for k in range(4)]) if stage == 3 else None
            combined = m(count) if rk4 is None else rk4
        elif count == 1:
            t_from, t_to = t + stride, t
            start_over = True
            combined = (m(1) + m(0)) / 2
        else:
            t_from, t_to = t, t - stride
            kept = [*kept[-3:], count]
            combined = dot(ADAMS_BASHFORTH[len(kept)], [m(one) for one in reversed(kept)])
        rows.append(_row(scheduler, times, t, (t_from, t_to), combined, start_over))
    return rows


def _row(
    scheduler: Scheduler, times: Times, t: float, step: tuple[float, float], combined: Vector, start_over: bool
) -> Row:
    """The step between two timesteps by a combination of outputs, from x or again from the sample before."""
    a, a_to, a_level = (np.float64(times.at(one)) for one in (*step, t))
    alpha, sigma = np.sqrt(a_level), np.sqrt(1 - a_level)
    A = np.sqrt(a_to / a)
    B = -(a_to - a) / (a * np.sqrt(1 - a_to) + np.sqrt(a * (1 - a) * a_to))
    output = eps_of(alpha, sigma)
    if scheduler.schedule.prediction_type == "v_prediction":  # eps = sqrt(ᾱ) v + sqrt(1 - ᾱ) x
        A, B = A + B * np.sqrt(1 - a), B * np.sqrt(a)
        output = alpha / sigma, -1 / sigma
    base = (0.0, 1.0) if start_over else (1.0, 0.0)
    return Row(alpha, sigma, t, output, base, next_base=A, next_m=B * combined)
