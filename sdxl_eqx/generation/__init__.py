"""Pictures from a model on disk or on the Hub: `Pipeline`, and what `scripts/generate.py` does with it."""

from sdxl_eqx.generation.pipeline import Pipeline

__all__ = ["Pipeline"]
