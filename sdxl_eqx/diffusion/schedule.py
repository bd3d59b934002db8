"""The noise schedule of training, and the scheduler's JSON config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_UNSUPPORTED = (
    "rescale_betas_zero_snr", "trained_betas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"
)  # fmt: skip


@dataclass(frozen=True)
class ScheduleConfig:
    """What of diffusers' `scheduler_config.json` a model depends on; the defaults are SDXL base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    steps_offset: int = 1

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ScheduleConfig":
        """Read `scheduler_config.json`.

        Raises:
            ValueError: for a schedule that is not supported, with its key and value.
        """
        default = cls()
        if config.get("_class_name") == "EulerDiscreteScheduler":  # what diffusers takes where the key is missing
            config = {"timestep_spacing": "linspace", **config}
        choices = {
            "beta_schedule": ("scaled_linear", "linear"),
            "prediction_type": ("epsilon", "v_prediction"),
            "timestep_spacing": ("leading", "trailing"),
            "interpolation_type": ("linear",),
            "final_sigmas_type": ("zero",),
        }
        for key, allowed in choices.items():
            if config.get(key, allowed[0]) not in allowed:
                raise ValueError(f"scheduler config: {key}={config[key]!r} is not supported; choose of {allowed}.")
        for key in _UNSUPPORTED:
            if config.get(key):
                raise ValueError(f"scheduler config: {key}={config[key]!r} is not supported.")
        return cls(**{key: config.get(key, getattr(default, key)) for key in cls.__dataclass_fields__})

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
            "steps_offset": self.steps_offset,
            "timestep_spacing": self.timestep_spacing,
            "use_karras_sigmas": False,
        }


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """ᾱ_t of DDPM (Ho et al. 2020) in float64; `scaled_linear` betas are linear in their square roots."""
    if config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    else:
        betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    return np.cumprod(1 - betas)


class Schedule(eqx.Module):
    """The schedule as arrays: `x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε`."""

    alpha: Float[Array, " t"]
    """sqrt(ᾱ_t), the share of the picture."""
    sigma: Float[Array, " t"]
    """sqrt(1 - ᾱ_t), the share of the noise."""
    config: ScheduleConfig = eqx.field(static=True)

    def __init__(self, config: ScheduleConfig):
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
