"""The four parts of Stable Diffusion XL as Equinox modules whose attribute names are diffusers' keys."""
