"""Schedulers without PyTorch: golden drawings, and properties that hold of any solver."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_schedulers as cases
import pytest
from parity_schedulers import Case

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.sampling.schedulers.level import Denoise, Latents, Level
from sdxl_eqx.sampling.schedulers.plan import Plan, Table, plan
from sdxl_eqx.sampling.schedulers.run import run
from sdxl_eqx.sampling.schedulers.scheduler import NAMES, Scheduler

STOCHASTIC = (cases.ANCESTRAL, cases.DDPM, cases.LCM)
TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize("case", cases.GOLDEN_CASES, ids=str)
def test_a_drawing_is_diffusers(case: Case):
    wanted = tiny.read_golden("schedulers")[str(case)]
    np.testing.assert_allclose(cases.our_drawing(case), wanted, rtol=0, atol=1e-4 * max(1.0, float(np.std(wanted))))


def no_noise(index: jax.Array) -> jax.Array:
    """Noise where none is asked for."""
    raise AssertionError("a plan without noise asks for some")


def known(x0: jax.Array) -> Denoise:
    """A model that knows the picture."""

    def denoise(x: Latents, level: Level) -> Latents:
        return x0

    return denoise


@pytest.mark.parametrize("name", [name for name in NAMES if name != cases.LCM])
def test_a_model_that_knows_the_picture_gives_it(name: str):
    p = Case(name, TRAILING, steps=6).plan()
    x0 = jnp.asarray(cases.picture())
    noises = jnp.asarray(cases.step_noises(len(p.timesteps)))
    x, finite = run(known(x0), p.first.noised(x0, noises[0]), p.table, lambda index: noises[index])
    assert bool(finite.all())
    # PNDM, and DDIM where T / steps is no whole number, end at timestep 0, with a little noise.
    np.testing.assert_allclose(x, x0, rtol=0, atol=0.1 if name in (cases.PNDM, cases.DDIM) else 1e-5)


def exact_flow(p: Plan, spread: float) -> float:
    """By what the probability-flow ODE scales latents of N(0, spread^2) pictures from the plan's start to its end."""
    alpha, sigma = p.table.level.alpha[0], p.table.level.sigma[0]
    alpha_to, sigma_to = p.table.following.alpha[-1], p.table.following.sigma[-1]
    return float(np.sqrt((alpha_to**2 * spread**2 + sigma_to**2) / (alpha**2 * spread**2 + sigma**2)))


def gaussian(spread: float) -> Denoise:
    """The exact denoiser of pictures drawn from N(0, spread^2)."""

    def denoise(x: Latents, level: Level) -> Latents:
        return x * (level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.sigma**2))

    return denoise


def flow_error(name: str, changes: dict[str, Any], steps: int) -> float:
    """How far the solver ends from the exact flow of Gaussian pictures, between two levels that steps do not move."""
    scheduler = Scheduler.from_json({**cases.SDXL, "_class_name": name, "timestep_spacing": "trailing", **changes})
    whole = plan(scheduler, steps)
    part = whole.part(0, int(np.sum(whole.timesteps > 199)))  # to timestep 199, which is on every grid
    if name == cases.HEUN:
        part = whole.part(0, int(np.sum(whole.timesteps > 199)) + 1)
    x, _ = jax.jit(run, static_argnums=(0, 3))(_GAUSSIAN, jnp.ones((1, 1, 1, 1)), part.table, no_noise)
    return abs(float(x[0, 0, 0, 0]) / exact_flow(part, 0.5) - 1)


_GAUSSIAN = gaussian(0.5)


@pytest.mark.parametrize(
    "name, changes, order",
    [
        (cases.EULER, {}, 1),
        (cases.DDIM, {}, 1),
        (cases.DPM, {"solver_order": 1}, 1),
        (cases.DPM, {"solver_order": 2}, 2),
        (cases.UNIPC, {"solver_order": 1}, 2),
    ],
)
def test_the_error_falls_as_fast_as_the_solvers_order(name: str, changes: dict[str, Any], order: int):
    coarse, fine = (flow_error(name, changes, steps) for steps in (25, 50))
    assert 2 ** (order - 0.35) < coarse / fine < 2 ** (order + 0.9)


@pytest.mark.parametrize(
    "name, changes",
    [
        (cases.HEUN, {}),
        (cases.LMS, {}),
        (cases.DPM, {"solver_order": 3}),
        (cases.UNIPC, {"solver_order": 2}),
        (cases.UNIPC, {"solver_order": 3}),
    ],
)
def test_a_solver_of_higher_order_is_nearer_the_exact_flow_than_euler(name: str, changes: dict[str, Any]):
    assert flow_error(name, changes, 25) < flow_error(cases.EULER, {}, 25) / 5


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_asked_for_by_the_samplers_that_add_some_and_by_no_other(name: str):
    case = Case(name, steps=6)
    assert case.plan().table.stochastic == (name in STOCHASTIC)


@pytest.mark.parametrize("name", [cases.ANCESTRAL, cases.LCM])
def test_a_picture_is_the_same_in_whatever_batch_its_noise_stands(name: str):
    p = Case(name, steps=6).plan()
    two = (2, *cases.SHAPE[1:])
    noises = jnp.asarray(cases.step_noises(6, two))
    x = cases.begin(p, two)
    both, _ = cases.draw(p.table, x, noises, "epsilon")
    alone, _ = cases.draw(p.table, x[1:], noises[:, 1:], "epsilon")
    again, _ = cases.draw(p.table, x[1:], noises[:, 1:], "epsilon")
    np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(alone, again)
    assert not np.allclose(both[0], both[1])


def test_what_is_done_after_a_step_sees_its_index_and_the_level_that_x_is_at():
    p = Case(cases.DDIM, TRAILING, 6).plan()
    x0, eps = jnp.asarray(cases.picture()), jnp.asarray(cases.unit_noise("kept"))

    def after(x: Latents, index: jax.Array, following: Level) -> Latents:
        return jnp.where(index + 1 == following.index, following.noised(x0, eps), jnp.nan)

    def denoise(x: Latents, level: Level) -> Latents:
        told = jnp.where(level.index == 0, x0, (x - level.sigma * eps) / level.alpha)
        return jnp.where(jnp.abs(told - x0).max() < 1e-3, told, jnp.nan)

    x, finite = run(denoise, p.first.noised(x0, eps), p.table, no_noise, after)
    assert bool(finite.all())
    np.testing.assert_allclose(x, x0, rtol=0, atol=1e-6)


def test_the_step_that_leaves_the_finite_numbers_is_said():
    p = Case(cases.EULER, steps=6).plan()

    def denoise(x: Latents, level: Level) -> Latents:
        return jnp.where(level.index == 3, jnp.inf, 0.5 * x)

    _, finite = run(denoise, cases.begin(p), p.table, no_noise)
    assert finite.tolist() == [True] * 3 + [False] * 3


def test_plans_of_the_same_shape_share_a_compiled_loop():
    traced = []

    @jax.jit
    def compiled(x: jax.Array, table: Table) -> jax.Array:
        traced.append(table)
        return run(gaussian(1.0), x, table, no_noise)[0]

    for spacing in cases.SPACINGS:
        compiled(jnp.ones(cases.SHAPE), Case(cases.EULER, {"timestep_spacing": spacing}, 5).plan().table)
    assert len(traced) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_part_is_that_part_of_the_whole(name: str):
    whole = Case(name, steps=12).plan()
    once, twice = whole.part(3, 9), whole.part(1).part(2, 8)
    np.testing.assert_array_equal(once.timesteps, whole.timesteps[3:9])
    jax.tree.map(np.testing.assert_array_equal, once.table, twice.table)
    assert once.initial_scale == whole.initial_scale


@pytest.mark.parametrize("name", NAMES)
def test_base_and_refiner_together_visit_every_timestep_once(name: str):
    whole = Case(name, steps=20).plan()
    base, refiner = whole.until(0.8), whole.since(0.8)
    # diffusers' refiner does the second evaluation of Heun's step again, where the base ended with it.
    again = 1 if name == cases.HEUN else 0
    assert len(base.timesteps) + len(refiner.timesteps) - len(whole.timesteps) == again
    if name != cases.HEUN:
        np.testing.assert_allclose(base.table.following.sigma[-1], float(refiner.first.sigma), rtol=1e-6)


def test_trailing_steps_number_as_many_as_asked_for_whatever_rounding_does():
    for steps in (61, 103, 998):
        for name in (cases.EULER, cases.DDIM, cases.DPM):
            p = Case(name, TRAILING, steps).plan()
            assert len(p.timesteps) == steps
            assert p.timesteps.min() >= 0


def test_zero_terminal_snr_starts_from_noise_alone():
    p = Case(cases.DDIM, {**cases.ZERO_SNR, **TRAILING}, 6).plan()
    assert (float(p.first.alpha), float(p.first.sigma), float(p.first.t)) == (0, 1, 999)
    assert Case(cases.EULER, {**cases.ZERO_SNR, **TRAILING}, 6).plan().initial_scale == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("name", [cases.DDIM, cases.DDPM, cases.LCM])
def test_noise_alone_says_nothing_to_a_model_that_predicts_noise(name: str):
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.*epsilon.*v_prediction"):
        Case(name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 6).plan()


@pytest.mark.parametrize(
    "case, word",
    [
        (Case(cases.EULER, steps=0), "--num-inference-steps"),
        (Case(cases.DDIM, steps=1001), "1 to 1000"),
        (Case(cases.DDIM, steps=1000), "timestep 1000"),
        (Case(cases.LCM, steps=51), "original_inference_steps=50"),
        (Case(cases.PNDM, cases.PRK, 3), "skip_prk_steps"),
        (Case(cases.DDIM, timesteps=(800,)), "timesteps=.*DDIMScheduler"),
        (Case(cases.EULER, cases.KARRAS, timesteps=(800,)), "use_karras_sigmas"),
        (Case(cases.LCM, timesteps=(1000, 3)), "between 0 and 999"),
        (Case(cases.LCM, timesteps=(3, 800)), "must fall"),
        (Case(cases.DDIM, eta=1.5), "--eta"),
        (Case(cases.EULER, start=20), "evaluations 20 to 20 of 20"),
        (Case(cases.UNIPC, {"predict_x0": False}), "final_sigmas_type='zero'"),
        (Case(cases.UNIPC, {"lower_order_final": False}), "lower_order_final=False"),
    ],
    ids=str,
)
def test_a_drawing_that_cannot_be_is_refused(case: Case, word: str):
    with pytest.raises(ValueError, match=word):
        case.plan()


def test_too_little_strength_is_no_step():
    with pytest.raises(ValueError, match="--strength"):
        plan(Scheduler(), 10).for_strength(0.05)


def test_the_default_is_sdxl_bases_sampler():
    assert Scheduler().schedule == ScheduleConfig()
    np.testing.assert_array_equal(plan(Scheduler(), 4).timesteps, [751, 501, 251, 1])
