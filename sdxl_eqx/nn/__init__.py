"""Layers: small Equinox modules named and shaped as in diffusers, on NHWC arrays. No mesh, no file."""
