"""DPM-Solver++ and its stochastic variant, multistep, of orders 1 to 3 (Lu et al. 2022b)."""

import numpy as np

from sdxl_eqx.sampling.schedulers.row import Part, Row, Vector, unit
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times


def to_alpha_sigma(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of variance-preserving latents whose ratio is sigma."""
    alpha = 1 / np.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def _order(scheduler: Scheduler, i: int, steps: int, known: int) -> int:
    """The order of step i, of which `known` outputs before it are at hand."""
    few = scheduler.lower_order_final and steps < 15
    if i == steps - 1 and (few or scheduler.euler_at_final or scheduler.final_sigmas_type == "zero"):
        return 1
    if i == steps - 2 and few:
        return min(scheduler.solver_order, known + 1, 2)
    return min(scheduler.solver_order, known + 1)


def _differences(lambdas: np.ndarray, order: int) -> tuple[Vector, Vector, Vector]:
    """D0, D1, D2 of the paper (section B.1), as weights of the outputs; lambdas are those of t, s0, s1, s2."""
    m0, m1, m2 = (unit(age, 3) for age in range(3))
    h = lambdas[0] - lambdas[1]
    if order == 1:
        return m0, 0 * m0, 0 * m0
    r0 = (lambdas[1] - lambdas[2]) / h
    D1_0 = (m0 - m1) / r0
    if order == 2:
        return m0, D1_0, 0 * m0
    r1 = (lambdas[2] - lambdas[3]) / h
    D1_1 = (m1 - m2) / r1
    return m0, D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1), (D1_0 - D1_1) / (r0 + r1)


def dpm_solver(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """The update from s0 to t by the outputs (x0) of s0, s1 and s2; h is the step in `lambda = log(alpha / sigma)`.

    A part begins with order 1; the lower orders at the end are those of the whole schedule's end.
    """
    rows, stochastic = [], scheduler.algorithm_type == "sde-dpmsolver++"
    midpoint = scheduler.solver_type != "heun"
    for i in range(part.start, part.stop):
        order = _order(scheduler, i, len(times.t), i - part.start)
        alpha, sigma = to_alpha_sigma(times.sigma[i])
        alpha_t, sigma_t = to_alpha_sigma(times.sigma[i + 1])
        lambdas = -np.log(times.sigma[max(i + 1 - order, 0) : i + 2][::-1])
        h = lambdas[0] - lambdas[1]
        D0, D1, D2 = _differences(lambdas, order)
        H = 2 * h if stochastic else h
        phi = -np.expm1(-H)  # 1 - e^-H
        update = alpha_t * phi * D0
        if order == 2 and midpoint:
            update += 0.5 * alpha_t * phi * D1
        elif order >= 2:
            update += alpha_t * (1 - phi / H) * D1
        if order == 3:
            half = -0.5 if stochastic else 0.5  # by the derivation +1/2 in both; diffusers subtracts in the SDE's
            update += alpha_t * ((phi - H) / H**2 + half) * D2
        rows.append(
            Row(
                alpha, sigma, times.t[i],
                next_base=sigma_t / sigma * (np.exp(-h) if stochastic else 1.0),
                next_m=update,
                next_noise=sigma_t * np.sqrt(-np.expm1(-2 * h)) if stochastic else 0.0,
            )
        )  # fmt: skip
    return rows
