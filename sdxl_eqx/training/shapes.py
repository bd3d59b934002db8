"""The step for batches of several shapes: each is compiled once, most of them while training goes on."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from sdxl_eqx.data.pictures import Size

log = logging.getLogger("sdxl_eqx")


class StepsByShape:
    """A jitted step that is compiled for several shapes of batches, the most frequent first, in a thread.

    A batch whose shape the thread has not come to yet is compiled at once, by whoever needs it. As a context it gives
    up at its end what has not been begun.
    """

    def __init__(self, jitted: Any, arguments: Callable[[Size], tuple[Any, ...]], shapes: Sequence[Size], mesh: Mesh):
        """`arguments(shape)` are the shapes of all that the step takes; `shapes` come in the order of compilation."""
        self._jitted, self._arguments, self._mesh = jitted, arguments, mesh
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._compiled: dict[Size, Any] = {}
        self._futures: dict[Size, Future[Any]] = {shape: self._pool.submit(self._compile, shape) for shape in shapes}

    def __call__(self, shape: Size, *args: Any) -> Any:
        """One step on a batch of pictures of a (height, width)."""
        if shape not in self._compiled:
            future = self._futures[shape]
            self._compiled[shape] = self._compile(shape) if future.cancel() else future.result()
        return self._compiled[shape](*args)

    def _compile(self, shape: Size) -> Any:
        began = time.perf_counter()
        with jax.sharding.set_mesh(self._mesh):
            compiled = self._jitted.lower(*self._arguments(shape)).compile()
        log.info("compiled the step for %d x %d pixels in %.0f s", *shape, time.perf_counter() - began)
        return compiled

    def __enter__(self) -> "StepsByShape":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
