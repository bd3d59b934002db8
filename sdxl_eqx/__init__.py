"""Train Stable Diffusion XL in JAX: Equinox models, a pure sharded step, weights that come from and go to diffusers."""

__version__ = "0.1.0"
