"""The fixtures of `compilers`, for every test here."""

from compilers import tpus

__all__ = ["tpus"]
