"""When the step is compiled for which shape: a thread goes ahead, and nobody waits for a shape he does not need."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdxl_eqx.data.pictures import Size
from sdxl_eqx.training.shapes import StepsByShape

SHAPES: tuple[Size, ...] = ((2, 3), (4, 4), (3, 2))
"""The most frequent first."""

LIMIT = 30
"""Seconds after which a test that waits has failed."""


class Compiling:
    """In place of a jitted step: says what is compiled where, and waits for leave in the thread that goes ahead."""

    def __init__(self, *, fails: Size | None = None):
        self.asked: list[tuple[Size, bool]] = []
        """Shapes in the order in which compiling them began, and whether the thread did it."""
        self.done: queue.SimpleQueue[Size] = queue.SimpleQueue()
        """Shapes as they were compiled."""
        self.begun, self.leave = threading.Event(), threading.Event()
        self.fails = fails

    def lower(self, shape: Size) -> Any:
        """As of a jitted function."""
        is_ahead = threading.current_thread() is not threading.main_thread()
        self.asked.append((shape, is_ahead))
        if is_ahead:
            self.begun.set()
            assert self.leave.wait(LIMIT)
        if shape == self.fails:
            raise RuntimeError(f"no room for {shape}")
        self.done.put(shape)
        return SimpleNamespace(compile=lambda: lambda *args: (shape, args))


@contextmanager
def steps(jitted: Any) -> Iterator[StepsByShape]:
    """The steps on one device."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with StepsByShape(jitted, lambda shape: (shape,), SHAPES, mesh) as made:
        yield made


def test_shapes_are_compiled_in_their_order_by_a_thread_while_nobody_asks_and_only_once():
    jitted = Compiling()
    jitted.leave.set()
    with steps(jitted) as step:
        assert [jitted.done.get(timeout=LIMIT) for _ in SHAPES] == list(SHAPES)
        for shape in (*reversed(SHAPES), *SHAPES):
            assert step(shape, "state", shape) == (shape, ("state", shape))
    assert jitted.asked == [(shape, True) for shape in SHAPES]


def test_a_shape_that_the_thread_has_not_begun_is_compiled_at_once_and_not_again():
    jitted = Compiling()
    with steps(jitted) as step:
        assert jitted.begun.wait(LIMIT)
        assert step(SHAPES[2]) == (SHAPES[2], ())  # while the thread is held at the first one
        assert jitted.asked == [(SHAPES[0], True), (SHAPES[2], False)]
        jitted.leave.set()
        assert step(SHAPES[0]) == (SHAPES[0], ())
        assert step(SHAPES[1]) == (SHAPES[1], ())
        assert step(SHAPES[2]) == (SHAPES[2], ())
    assert [shape for shape, _ in jitted.asked] == [SHAPES[0], SHAPES[2], SHAPES[1]]


def test_a_shape_that_the_thread_has_begun_is_waited_for():
    jitted = Compiling()
    with steps(jitted) as step:
        assert jitted.begun.wait(LIMIT)
        threading.Timer(0.1, jitted.leave.set).start()
        assert step(SHAPES[0]) == (SHAPES[0], ())
    assert [shape for shape, _ in jitted.asked].count(SHAPES[0]) == 1


def test_at_the_end_what_is_not_begun_is_given_up_and_what_is_begun_is_waited_for():
    jitted = Compiling()
    with steps(jitted):
        assert jitted.begun.wait(LIMIT)
        threading.Timer(0.1, jitted.leave.set).start()
    assert jitted.asked == [(SHAPES[0], True)]
    assert jitted.done.qsize() == 1


@pytest.mark.parametrize("held", [False, True])
def test_what_goes_wrong_in_compiling_is_raised_to_whoever_needs_the_shape_and_to_nobody_else(held):
    """Whether the thread compiles it or, being held at the first one, leaves it to the caller."""
    jitted = Compiling(fails=SHAPES[1])
    if not held:
        jitted.leave.set()
    with steps(jitted) as step:
        assert jitted.begun.wait(LIMIT)
        if not held:
            assert step(SHAPES[0]) == (SHAPES[0], ())
            assert step(SHAPES[2]) == (SHAPES[2], ())
        with pytest.raises(RuntimeError, match=r"no room for \(4, 4\)"):
            step(SHAPES[1])
        jitted.leave.set()


def test_a_step_of_each_shape_is_computed_and_a_line_says_what_was_compiled(caplog):
    jitted = jax.jit(lambda x: x.sum())
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

    def arguments(shape: Size) -> tuple[Any, ...]:
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    with caplog.at_level("INFO", "sdxl_eqx"), StepsByShape(jitted, arguments, SHAPES, mesh) as step:
        for h, w in SHAPES:
            assert float(step((h, w), jnp.ones((h, w)))) == h * w
        with pytest.raises(TypeError):  # compiled for one shape alone
            step(SHAPES[0], jnp.ones(SHAPES[1]))
    assert sorted(line.split(" pixels in ")[0] for line in caplog.messages) == [
        "compiled the step for 2 x 3", "compiled the step for 3 x 2", "compiled the step for 4 x 4"
    ]  # fmt: skip
