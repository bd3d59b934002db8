"""The fixtures of `tiny_step`, for every test here."""

from tiny_step import batch, encoders, latents, schedule, step, unet

__all__ = ["batch", "encoders", "latents", "schedule", "step", "unet"]
