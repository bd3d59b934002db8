"""What the tests of attention share: inputs, a function that is both passes, and how close is close."""

import jax
import jax.numpy as jnp
import numpy as np

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options: half the time to compile."""

SDXL = [(2, 4096, 4096, 10, 64), (2, 1024, 1024, 20, 64), (2, 4096, 77, 10, 64), (2, 1024, 77, 20, 64)]
"""b, l, s, n, d of two pictures of 1024 px: both levels of transformers, to themselves and to the text."""


def inputs(b: int, l: int, s: int, n: int, d: int, dtype=jnp.float32):
    """Queries, keys and values, and the gradient of the result."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((b, length, n, d)), dtype) for length in (l, s, s, l))


def shapes(b: int, l: int, s: int, n: int, d: int, dtype=jnp.bfloat16, **options):
    """The shapes of `inputs`."""
    return tuple(jax.ShapeDtypeStruct((b, length, n, d), dtype, **options) for length in (l, s, s, l))


def both(attend, **options):
    """A function to the result and the three gradients."""

    def run(query, key, value, gradient):
        y, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, **options), query, key, value)
        return y, *pullback(gradient)

    return run


def run(attend, arrays, **options):
    """The result and the three gradients."""
    return jax.jit(both(attend, **options), compiler_options=QUICK)(*arrays)


def assert_close(found, expected, tolerance):
    """Each array within a part of the largest number of its reference."""
    for name, x, y in zip(("result", "dq", "dk", "dv"), found, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name
