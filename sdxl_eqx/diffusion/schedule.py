"""The noise schedule of training, and the scheduler's JSON config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_LDM = {"beta_start": 0.00085, "beta_end": 0.012}
_DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0}
_LEADING = {**_DDPM, "timestep_spacing": "leading"}
_LINSPACE = {**_DDPM, "timestep_spacing": "linspace"}

CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "EulerDiscreteScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "HeunDiscreteScheduler": {**_LINSPACE, **_LDM},
    "LMSDiscreteScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "UniPCMultistepScheduler": _LINSPACE,
    "DDIMScheduler": _LEADING,
    "DDPMScheduler": _LEADING,
    "PNDMScheduler": _LEADING,
    "LCMScheduler": {**_LEADING, **_LDM, "beta_schedule": "scaled_linear"},
}
"""What each of diffusers' classes takes where its `scheduler_config.json` lacks a key."""

CHOICES = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}


def bare_name(class_name: str) -> str:
    """A scheduler's class without the `Flax` that Flax checkpoints write before it."""
    return class_name.removeprefix("Flax")


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's config says itself, without the defaults that diffusers marks as such when it saves."""
    defaults = config.get("_use_default_values") or ()
    return {key: value for key, value in config.items() if key not in defaults}


@dataclass(frozen=True)
class ScheduleConfig:
    """What of diffusers' `scheduler_config.json` a model depends on; the defaults are SDXL base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """`sample` is x0 itself: for sampling alone."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 1
    rescale_betas_zero_snr: bool = False
    """The last timestep is pure noise (Lin et al. 2023, algorithm 1)."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ScheduleConfig":
        """Read `scheduler_config.json`; what only a sampler heeds is left to `Scheduler.from_json`.

        A key that is missing is that of diffusers' class, and SDXL base's where the class is not known here.

        Raises:
            ValueError: for a schedule that is not supported, with its key and value.
        """
        config = stated(config)
        for key, allowed in CHOICES.items():
            if config.get(key, allowed[0]) not in allowed:
                raise ValueError(f"scheduler config: {key}={config[key]!r} is not supported; choose of {allowed}.")
        if config.get("trained_betas") is not None:
            raise ValueError(
                f"scheduler config: trained_betas={config['trained_betas']!r} is not supported; state beta_start, "
                "beta_end and beta_schedule."
            )
        defaults = {**vars(cls()), **CLASS_DEFAULTS.get(bare_name(config.get("_class_name") or ""), {})}
        return cls(**{key: config.get(key, default) for key, default in defaults.items()})

    def to_json(self) -> dict[str, Any]:
        """diffusers' `scheduler_config.json` for its Euler sampler; `from_json` reads it back."""
        return {
            "_class_name": "EulerDiscreteScheduler",
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "interpolation_type": "linear",
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
            "steps_offset": self.steps_offset,
            "timestep_spacing": self.timestep_spacing,
            "use_karras_sigmas": False,
        }


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """ᾱ_t of DDPM (Ho et al. 2020) in float64; `scaled_linear` betas are linear in their square roots.

    With `rescale_betas_zero_snr`, sqrt(ᾱ) is shifted so that the last is exactly 0 and scaled so that the first stays.
    """
    if config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    else:
        betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    alpha_bar = np.cumprod(1 - betas)
    if not config.rescale_betas_zero_snr:
        return alpha_bar
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class Schedule(eqx.Module):
    """The schedule that training draws from, as arrays: `x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε`.

    Raises:
        ValueError: for a model that predicts x0, which is sampled from but not trained.
    """

    alpha: Float[Array, " t"]
    """sqrt(ᾱ_t), the share of the picture."""
    sigma: Float[Array, " t"]
    """sqrt(1 - ᾱ_t), the share of the noise."""
    config: ScheduleConfig = eqx.field(static=True)

    def __init__(self, config: ScheduleConfig):
        if config.prediction_type == "sample":
            raise ValueError(
                "prediction_type='sample' is for sampling alone; training predicts 'epsilon' or 'v_prediction': set "
                "--diffusion-scheduler-config.prediction-type."
            )
        alpha_bar = alphas_cumprod(config)
        self.alpha = jnp.asarray(np.sqrt(alpha_bar), jnp.float32)
        self.sigma = jnp.asarray(np.sqrt(1 - alpha_bar), jnp.float32)
        self.config = config

    def at(self, t: Int[Array, " b"]) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """(alpha, sigma) of timesteps, ready to multiply latents."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]

    def add_noise(
        self, x0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """The noised latents x_t."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * eps
