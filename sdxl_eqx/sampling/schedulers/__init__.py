"""Noise schedulers: what diffusers' scheduler classes do, as tables of coefficients and one compiled loop."""
