"""The fixtures of `tiny_folder`, for every test here."""

from tiny_folder import folder, pipeline

__all__ = ["folder", "pipeline"]
