"""The fixtures of `tiny_run`, for every test here."""

from tiny_run import model, pictures, small, train

__all__ = ["model", "pictures", "small", "train"]
