"""Every scheduler against diffusers' class: tables, whole drawings, parts of drawings, and how files are read."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_schedulers as cases
import parity_torch as theirs
import pytest
from parity_schedulers import Case

from sdxl_eqx.diffusion.schedule import CLASS_DEFAULTS, alphas_cumprod
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.sampling.schedulers.level import Latents, Level
from sdxl_eqx.sampling.schedulers.plan import Table, plan
from sdxl_eqx.sampling.schedulers.run import run
from sdxl_eqx.sampling.schedulers.scheduler import NAMES, OPTIONS, Scheduler
from sdxl_eqx.sampling.schedulers.times import SIGMA_SPACE, SOLVERS, spread, times

pytestmark = pytest.mark.parity

SCHEDULE = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr",
}  # fmt: skip
UNHEEDED = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
"""What matters only to options that are refused."""


def same_drawing(case: Case) -> None:
    """The last latents are diffusers'."""
    wanted = theirs.their_drawing(case)
    np.testing.assert_allclose(cases.our_drawing(case), wanted, rtol=0, atol=1e-4 * max(1.0, float(np.std(wanted))))


@pytest.mark.parametrize("case", list(cases.spread_cases()), ids=str)
def test_twenty_steps_are_diffusers(case: Case):
    same_drawing(case)


@pytest.mark.parametrize("case", list(cases.option_cases()), ids=str)
def test_twenty_steps_with_an_option_are_diffusers(case: Case):
    same_drawing(case)


@pytest.mark.parametrize("case", list(cases.few_step_cases()), ids=str)
def test_few_steps_are_diffusers(case: Case):
    same_drawing(case)


@pytest.mark.parametrize("case", list(cases.part_cases()), ids=str)
def test_a_part_of_the_steps_is_diffusers(case: Case):
    same_drawing(case)


@pytest.mark.parametrize("case", list(cases.custom_cases()), ids=str)
def test_timesteps_that_a_user_gives_are_diffusers(case: Case):
    same_drawing(case)


@jax.jit
def draw_unet(unet: UNet, cond: Conditioning, table: Table, x: jax.Array, noises: jax.Array) -> jax.Array:
    """The last latents over a UNet that predicts velocity."""

    def denoise(x: Latents, level: Level) -> Latents:
        time = jnp.full(x.shape[:1], level.t)
        out = unet(level.model_input(x), time, cond.context, cond.pooled, cond.time_ids)
        return level.to_x0(x, out, "v_prediction")

    return run(denoise, x, table, lambda index: noises[index])[0]


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_over_the_tiny_unet_are_diffusers(name: str):
    case = Case(name, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"})
    inputs = tiny.unet_inputs(tiny.UNET, (12, 10), seed=3)
    unet, cond, p = tiny.filled(UNet, tiny.UNET, salt=1), tiny.conditioning(inputs), case.plan()
    shape = inputs["eps"].shape
    noises = jnp.asarray(cases.step_noises(len(p.timesteps), shape))
    ours = draw_unet(unet, cond, p.table, cases.begin(p, shape), noises)
    their_unet = theirs.their_unet(tiny.UNET, salt=1)
    wanted = theirs.their_drawing(case, lambda x, t: theirs.call_unet(their_unet, x, t, inputs), shape)
    tiny.assert_close(ours, wanted, 1e-4 * max(1.0, float(np.std(wanted))))


TABLES = [
    Case(name, {"timestep_spacing": spacing, **changes})
    for name in NAMES
    for spacing in (("leading",) if name == cases.LCM else cases.SPACINGS)
    for changes in ({}, *([cases.KARRAS] if "use_karras_sigmas" in OPTIONS[name] else []))
] + [Case(name, {**cases.ZERO_SNR, "timestep_spacing": "trailing"}) for name in (cases.EULER, cases.DPM)]


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_timesteps_and_sigmas_are_diffusers_for_1_to_50_steps(case: Case):
    scheduler = Scheduler.from_json(case.config)
    betas = theirs.their_scheduler(case).betas.double().numpy()
    alpha_bar = np.cumprod(1 - betas)
    karras, zero = scheduler.use_karras_sigmas, scheduler.schedule.rescale_betas_zero_snr
    if zero:
        alpha_bar[-1] = 2**-24
    exact = np.sqrt((1 - alpha_bar) / alpha_bar)
    for steps in tiny.STEPS:
        one = theirs.their_scheduler(Case(case.name, case.changes, steps))
        ours = times(scheduler, steps)
        # Where timesteps are fractions, theirs are float32's.
        fractions = karras and scheduler.name not in SOLVERS
        np.testing.assert_allclose(ours.t, one.timesteps.numpy(), rtol=0, atol=2e-4 if fractions else 0)
        if scheduler.name not in (*SIGMA_SPACE, *SOLVERS):
            continue
        # Theirs come from a float32 product: 1.3e-5 off at timestep 0, and with zero terminal SNR more, as a float32
        # difference of near numbers.
        loose = 2e-4 if zero else 2e-5
        np.testing.assert_allclose(ours.sigma, one.sigmas.numpy(), rtol=loose)
        if not zero:
            wanted = np.interp(spread(scheduler, steps), np.arange(1000), exact)
            if karras:
                top, low = exact[[-1, 0]] if scheduler.name in SOLVERS else wanted[[0, -1]]
                wanted = (top ** (1 / 7) + np.linspace(0, 1, steps) * (low ** (1 / 7) - top ** (1 / 7))) ** 7
            np.testing.assert_allclose(np.unique(ours.sigma[:-1])[::-1], wanted, rtol=1e-6)
        scale = plan(scheduler, steps).initial_scale
        assert scale == pytest.approx(float(one.init_noise_sigma), rel=loose)


@pytest.mark.parametrize("zero", [False, True])
def test_alphas_cumprod_are_the_exact_product_of_diffusers_betas(zero: bool):
    case = Case(cases.DDIM, {"rescale_betas_zero_snr": zero})
    one = theirs.their_scheduler(case)
    ours = alphas_cumprod(Scheduler.from_json(case.config).schedule)
    np.testing.assert_allclose(ours, one.alphas_cumprod.numpy(), rtol=3e-6, atol=1e-8)
    assert (ours[-1] == 0) == zero


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 6])
def test_the_first_level_and_those_that_follow_are_those_of_add_noise(name: str, start: int):
    p = Case(name, {"timestep_spacing": "trailing"}, start=start).plan()
    x0, eps = cases.picture(), cases.unit_noise("eps")
    one = theirs.their_scheduler(Case(name, {"timestep_spacing": "trailing"}, start=start))
    timesteps = one.timesteps[start:]
    noised = [
        theirs.to_numpy(one.add_noise(theirs.to_torch(x0), theirs.to_torch(eps), timesteps[i : i + 1]))
        for i in range(len(timesteps))
        if not hasattr(one, "set_begin_index") or one.set_begin_index(start + i) is None
    ]
    np.testing.assert_allclose(p.first.noised(jnp.asarray(x0), jnp.asarray(eps)), noised[0], rtol=0, atol=2e-5)
    following = p.table.following
    for i, wanted in enumerate([*noised[1:], x0]):
        np.testing.assert_allclose(following.alpha[i] * x0 + following.sigma[i] * eps, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.8])
def test_shares_of_the_steps_are_cut_as_diffusers_pipelines_cut(name: str, share: float):
    case = Case(name, steps=25)
    one, p = theirs.their_scheduler(case), case.plan()
    t = one.timesteps.numpy()
    cutoff = round(1000 - share * 1000)
    np.testing.assert_array_equal(p.until(share).timesteps, t[: int((t >= cutoff).sum())])
    pipeline = theirs.lazy.StableDiffusionXLImg2ImgPipeline.__new__(theirs.lazy.StableDiffusionXLImg2ImgPipeline)
    pipeline._internal_dict = {}
    object.__setattr__(pipeline, "scheduler", one)
    wanted, _ = pipeline.get_timesteps(25, share, "cpu")
    np.testing.assert_array_equal(p.for_strength(share).timesteps, wanted.numpy())
    wanted, _ = pipeline.get_timesteps(25, None, "cpu", denoising_start=share)
    np.testing.assert_array_equal(p.since(share).timesteps, wanted.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_key_takes_the_default_of_diffusers_class(name: Any):
    parameters = inspect.signature(getattr(theirs.lazy, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert set(OPTIONS[name]) == set(defaults) - SCHEDULE - UNHEEDED
    assert all(OPTIONS[name][key] == defaults[key] for key in OPTIONS[name])
    assert all(CLASS_DEFAULTS[name][key] == defaults[key] for key in CLASS_DEFAULTS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_another_class_reads_a_file_as_diffusers_does(source: str, name: Any):
    config = {"_class_name": source, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with theirs.their_warnings_are_theirs():
        saved = dict(getattr(theirs.lazy, source).from_config(config).config)
        wanted = getattr(theirs.lazy, name).from_config(saved).config
    ours = Scheduler.from_json(saved, class_name=name)
    for key in OPTIONS[name].keys() & vars(ours).keys():
        told = list(ours.disable_corrector) if key == "disable_corrector" else getattr(ours, key)
        assert told == wanted[key] or (key, wanted[key]) == ("variance_type", None)
    for key in SCHEDULE & wanted.keys() - {"trained_betas"}:
        assert getattr(ours.schedule, key) == wanted[key]
