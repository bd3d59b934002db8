"""The cases that our schedulers are compared with diffusers' in, and a cheap model that both sides can run.

Nothing here needs PyTorch: `parity_torch.their_drawing` is the other side, and writes the golden file.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_models import generator

from sdxl_eqx.sampling.schedulers.level import Denoise, Latents, Level
from sdxl_eqx.sampling.schedulers.plan import Plan, Table, plan
from sdxl_eqx.sampling.schedulers.run import run
from sdxl_eqx.sampling.schedulers.scheduler import NAMES, Scheduler

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction")

SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""What SDXL's own file says, beside what a case changes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A drawing by one of diffusers' classes."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 20
    timesteps: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    eta: float = 0.0

    def __str__(self) -> str:
        said = [f"{key}={value}" for key, value in self.changes.items()]
        fields = {"steps": 20, "timesteps": (), "start": 0, "stop": None, "eta": 0.0}
        said += [f"{key}={getattr(self, key)}" for key, usual in fields.items() if getattr(self, key) != usual]
        return "-".join([self.name.removesuffix("Scheduler"), *said]).replace(" ", "")

    @property
    def config(self) -> dict[str, Any]:
        """The `scheduler_config.json` of both sides."""
        return {"_class_name": self.name, **SDXL, **self.changes}

    @property
    def prediction_type(self) -> str:
        """What the model says."""
        return self.config.get("prediction_type", "epsilon")

    def plan(self) -> Plan:
        """Our plan of it."""
        scheduler = Scheduler.from_json(self.config)
        whole = plan(scheduler, self.steps, timesteps=self.timesteps, eta=self.eta)
        return whole if (self.start, self.stop) == (0, None) else whole.part(self.start, self.stop)


EULER, ANCESTRAL, HEUN, DDIM, DDPM, DPM, LMS, PNDM, UNIPC, LCM = NAMES
KARRAS: dict[str, Any] = {"use_karras_sigmas": True}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
PRK: dict[str, Any] = {"skip_prk_steps": False}

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    EULER: (
        KARRAS,
        {**KARRAS, "sigma_min": 0.1, "sigma_max": 9.0},
        {"final_sigmas_type": "sigma_min"},
        ZERO_SNR,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
        {"beta_schedule": "linear"},
    ),
    ANCESTRAL: ({**ZERO_SNR, "timestep_spacing": "trailing"},),
    HEUN: (KARRAS, {"clip_sample": True, "clip_sample_range": 0.7}, {"prediction_type": "sample"}),
    DDIM: (
        {"set_alpha_to_one": False},
        {"clip_sample": True},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
        {"prediction_type": "sample", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ),
    DDPM: (
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"clip_sample": True, "clip_sample_range": 2.0},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
    ),
    DPM: (
        *({"solver_order": order, **kind} for order in (1, 2, 3) for kind in ({}, SDE, KARRAS)),
        *({"solver_order": order, "solver_type": "heun", **kind} for order in (2, 3) for kind in ({}, SDE)),
        {**SDE, **KARRAS},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "solver_order": 3},
        {"final_sigmas_type": "sigma_min", "solver_order": 3},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
    ),
    LMS: (KARRAS, {"prediction_type": "sample"}),
    PNDM: (
        *({**PRK, "timestep_spacing": spacing} for spacing in SPACINGS),
        {**PRK, "prediction_type": "v_prediction"},
        {"set_alpha_to_one": True},
    ),
    UNIPC: (
        *({"solver_order": order} for order in (1, 3)),
        *({"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": order} for order in (1, 2, 3)),
        *(
            {"predict_x0": False, "final_sigmas_type": "sigma_min", "prediction_type": prediction, "solver_order": 3}
            for prediction in (*PREDICTIONS, "sample")
        ),
        KARRAS,
        {"disable_corrector": [0, 1, 5]},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
    ),
    LCM: (
        {"original_inference_steps": 100},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"timestep_scaling": 1.0},
        ZERO_SNR,
        {"prediction_type": "sample"},
    ),
}
"""The options of each class that matter to its steps."""


def spread_cases() -> Iterator[Case]:
    """Every class by every prediction and every spacing that it has."""
    for name in NAMES:
        for prediction in PREDICTIONS:
            for spacing in ("leading",) if name == LCM else SPACINGS:
                yield Case(name, {"prediction_type": prediction, "timestep_spacing": spacing})


def option_cases() -> Iterator[Case]:
    """Every class with each of its options."""
    for name in NAMES:
        yield from (Case(name, changes) for changes in VARIANTS[name])
    yield from (
        Case(DDIM, {"prediction_type": prediction}, eta=eta) for prediction in PREDICTIONS for eta in (0.4, 1.0)
    )
    yield Case(DDIM, {**ZERO_SNR, "timestep_spacing": "trailing"}, eta=1.0)


def few_step_cases() -> Iterator[Case]:
    """Every class in one to four steps, where multistep solvers have cases of their own."""
    for steps in (1, 2, 3, 4):
        for name in NAMES:
            yield Case(name, {"timestep_spacing": "trailing"}, steps)
        yield from (Case(DPM, {"solver_order": 3, **kind}, steps) for kind in ({}, SDE))
        yield from (Case(UNIPC, {"solver_order": 3, "solver_type": kind}, steps) for kind in ("bh2",))
        yield Case(PNDM, {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}, steps)
    yield Case(PNDM, PRK, 4)


def part_cases() -> Iterator[Case]:
    """Every class from the middle, to the middle, and between: image-to-image, and the hand-over to a refiner."""
    for name in NAMES:
        for start, stop in ((8, None), (0, 13), (6, 12)):
            yield Case(name, {"timestep_spacing": "trailing"}, start=start, stop=stop)
    for start in (1, 18):
        yield Case(DPM, {"solver_order": 3}, start=start)
        yield Case(UNIPC, {"solver_order": 3}, start=start)
        yield Case(LMS, KARRAS, start=start)
    yield Case(DPM, {**SDE, **KARRAS}, start=7, stop=15)
    yield Case(DPM, {"solver_order": 3}, 10, start=4)
    yield Case(HEUN, {}, start=7)
    yield Case(PNDM, PRK, start=3, stop=20)
    yield Case(PNDM, {"prediction_type": "v_prediction"}, start=5)


def custom_cases() -> Iterator[Case]:
    """Timesteps that a user gives."""
    for name in (EULER, HEUN, DDPM, DPM, LCM):
        yield Case(name, timesteps=(800,))
        yield Case(name, timesteps=(999, 749, 499, 249))


V_TRAILING: dict[str, Any] = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}

GOLDEN_CASES = (
    *(Case(name, steps=6) for name in NAMES),
    *(Case(name, V_TRAILING, 6) for name in NAMES),
    *(Case(name, {"timestep_spacing": "linspace"}, 8, start=2) for name in NAMES if name != HEUN),
    *(Case(name, KARRAS, 6) for name in (EULER, HEUN, DPM, LMS, UNIPC)),
    *(Case(name, {**V_TRAILING, "rescale_betas_zero_snr": True}, 6) for name in (EULER, DDIM, DDPM, DPM)),
    Case(DPM, {**SDE, "solver_order": 3}, 6),
    Case(UNIPC, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}, 6),
    Case(PNDM, PRK, 6),
    Case(LCM, timesteps=(800,)),
    Case(DDIM, {"clip_sample": True}, eta=1.0, steps=6),
)
"""What the golden file holds, so that a run without PyTorch checks each class."""

SHAPE = (1, 4, 4, 4)


def unit_noise(words: Any, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Unit noise that follows from those words; NHWC."""
    return generator("schedulers", words).standard_normal(shape).astype(np.float32)


def step_noises(count: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """The noise of every step."""
    return np.stack([unit_noise(("step", i), shape) for i in range(count)])


def begin(p: Plan, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    """Latents to begin with: noise, or a picture noised where the plan begins late."""
    eps = jnp.asarray(unit_noise("x", shape))
    return eps * jnp.float32(p.initial_scale) if p.start == 0 else p.first.noised(jnp.asarray(picture(shape)), eps)


def picture(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Latents of a picture, for image-to-image."""
    return 0.8 * unit_noise("picture", shape)


def cheap(xp: Any, x: Any, t: Any) -> Any:
    """A model that costs nothing, bends, and tells timesteps apart; `xp` is NumPy, PyTorch or JAX."""
    return 0.8 * xp.tanh(1.2 * x) + 0.15 * xp.cos(2.0 * x + t / 160.0)


def cheap_denoise(prediction_type: str) -> Denoise:
    """The cheap model as a denoiser."""

    def denoise(x: Latents, level: Level) -> Latents:
        return level.to_x0(x, cheap(jnp, level.model_input(x), level.t), prediction_type)

    return denoise


@partial(jax.jit, static_argnames="prediction_type")
def draw(table: Table, x: jax.Array, noises: jax.Array, prediction_type: str) -> tuple[jax.Array, jax.Array]:
    """(latents, whether they were finite after each step) over the cheap model."""
    return run(cheap_denoise(prediction_type), x, table, lambda index: noises[index])


def our_drawing(case: Case) -> np.ndarray:
    """The last latents of a case over the cheap model."""
    p = case.plan()
    noises = jnp.asarray(step_noises(len(p.timesteps)))
    x, finite = draw(p.table, begin(p), noises, prediction_type=case.prediction_type)
    assert finite.shape == (len(p.timesteps),)
    assert bool(finite.all())
    return np.asarray(x)
