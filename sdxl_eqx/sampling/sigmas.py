"""The timesteps and noise levels that a sampler visits."""

import numpy as np

from sdxl_eqx.diffusion.schedule import ScheduleConfig, alphas_cumprod


def timesteps(config: ScheduleConfig, steps: int) -> np.ndarray:
    """Timesteps from noisy to clean, `[steps]` (diffusers `EulerDiscreteScheduler.set_timesteps`)."""
    total = config.num_train_timesteps
    if config.timestep_spacing == "leading":
        t = np.arange(steps)[::-1] * (total // steps) + config.steps_offset
    else:
        t = np.round(np.arange(total, 0, -total / steps)) - 1
    return t.astype(np.float32)


def sigmas(config: ScheduleConfig, t: np.ndarray) -> np.ndarray:
    """Noise levels `sqrt((1 - ᾱ) / ᾱ)` at timesteps, and a final 0: `[steps + 1]` (Karras et al. 2022's sigma)."""
    alpha_bar = alphas_cumprod(config)
    levels = np.interp(t, np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
    return np.append(levels, 0).astype(np.float32)


def initial_scale(config: ScheduleConfig, levels: np.ndarray) -> float:
    """What unit noise is multiplied by to start: the highest level, or with `leading` that of picture and noise."""
    top = float(levels.max())
    return (top**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else top
