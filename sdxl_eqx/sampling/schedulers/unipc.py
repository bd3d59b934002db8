"""UniPC: a predictor and a corrector of any order that share their evaluations (Zhao et al. 2023)."""

import numpy as np

from sdxl_eqx.sampling.schedulers.dpm_solver import to_alpha_sigma
from sdxl_eqx.sampling.schedulers.row import Part, Row, Vector, dot, eps_of, unit
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.schedulers.times import Times


def _system(hh: float, rks: np.ndarray, B_h: float) -> tuple[np.ndarray, np.ndarray]:
    """(R, b) of the weights `R rho = b` (Zhao et al. 2023, equations 5 to 7)."""
    b, factorial, h_phi_k = [], 1, np.expm1(hh) / hh - 1
    for k in range(1, len(rks) + 1):
        b.append(h_phi_k * factorial / B_h)
        factorial *= k + 1
        h_phi_k = h_phi_k / hh - 1 / factorial
    return np.stack([rks**k for k in range(len(rks))]), np.asarray(b)


def _update(
    scheduler: Scheduler, times: Times, i: int, order: int, outputs: list[Vector], new: Vector | None
) -> tuple[float, Vector]:
    """(weight of x, weights of the outputs) of the step from level i to i + 1.

    `outputs` are those of levels i, i - 1 and so on. The corrector knows the output `new` of level i + 1 too.
    """
    alpha_t, sigma_t = to_alpha_sigma(times.sigma[i + 1])
    alpha_s, sigma_s = to_alpha_sigma(times.sigma[i])
    lambdas = -np.log(times.sigma[max(i + 1 - order, 0) : i + 2][::-1])
    h = lambdas[0] - lambdas[1]
    rks = np.append((lambdas[2:] - lambdas[1]) / h, 1.0)
    D1s = [(m - outputs[0]) / rk for m, rk in zip(outputs[1:order], rks, strict=False)]
    hh = -h if scheduler.predict_x0 else h
    B_h = hh if scheduler.solver_type == "bh1" else np.expm1(hh)
    scale, keep = (alpha_t, sigma_t / sigma_s) if scheduler.predict_x0 else (sigma_t, alpha_t / alpha_s)
    weights = -scale * np.expm1(hh) * outputs[0]
    if (new is None and order == 2) or (new is not None and order == 1):
        rhos = np.array([0.5])
    elif new is None and order == 1:
        return keep, weights
    else:
        R, b = _system(hh, rks, B_h)
        rhos = np.linalg.solve(R[:-1, :-1], b[:-1]) if new is None else np.linalg.solve(R, b)
    differences = D1s if new is None else [*D1s, new - outputs[0]]
    return keep, weights - scale * B_h * dot(list(rhos), differences)


def unipc(scheduler: Scheduler, times: Times, part: Part) -> list[Row]:
    """UniPC-p: each evaluation first corrects the step that led to it (UniC), then predicts the next (UniP).

    The outputs are x0, or eps with predict_x0=False. A part begins with order 1.
    """
    rows, order = [], 1
    count = scheduler.solver_order + 1
    ages = [unit(age, count) for age in range(count)]
    for i in range(part.start, part.stop):
        known = i - part.start
        base, base_m = (1.0, 0.0), np.zeros(count)
        if known > 0 and i - 1 not in scheduler.disable_corrector:
            keep, base_m = _update(scheduler, times, i - 1, order, ages[1:], ages[0])
            base = (0.0, keep)
        order = min(scheduler.solver_order, known + 1)
        if scheduler.lower_order_final:
            order = min(order, len(times.t) - i)
        alpha, sigma = to_alpha_sigma(times.sigma[i])
        next_base, next_m = _update(scheduler, times, i, order, ages, None)
        output = (0.0, 1.0) if scheduler.predict_x0 else eps_of(alpha, sigma)
        rows.append(Row(alpha, sigma, times.t[i], output, base, base_m, next_base, 0.0, next_m))
    return rows
