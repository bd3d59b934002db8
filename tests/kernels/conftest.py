"""The fixtures of `compilers`, for every test here."""

from compilers import h100s, tpus

__all__ = ["h100s", "tpus"]
