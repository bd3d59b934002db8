"""The loss on samples that are not trained on, at fixed noise and timesteps, so that it can be compared over a run."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.batch import AnyBatch, to_batch
from sdxl_eqx.diffusion.loss import Draws, training_loss
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.mesh import batch_sharding, own_rows
from sdxl_eqx.training.feed import Feed
from sdxl_eqx.training.networks import Networks, join
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.training.step import StepConfig, encode, latent_shape, placed, predictor

log = logging.getLogger("sdxl_eqx")

LEVELS = (125, 375, 625, 875)
"""Timesteps, of 1000, that every held-out sample is noised to."""


@dataclass(frozen=True)
class _Chunk:
    """Samples of one shape that are measured together; the last ones are filled up."""

    samples: Int[np.ndarray, " b"]
    is_real: Bool[np.ndarray, " b"]


class Validation:
    """Measures the held-out loss of a run. Every process must call it at the same time."""

    def __init__(self, run: Run, data: Feed):
        self._run, self._data = run, data
        self._size = run.program.part_size
        self._sharding = batch_sharding(run.mesh, run.config.parallel.data_sharding, self._size)
        self._chunks = list(_chunks(data.held, self._size))
        self._losses = jax.jit(
            functools.partial(held_out_losses, config=run.program.step_config), out_shardings=run.layout.whole
        )
        self._schedule = Schedule(run.parts.schedule)
        if self._chunks:
            log.info("%d samples are held out", int((data.held >= 0).sum()))

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def measure(self, state: TrainState) -> dict[str, float]:
        """`eval/loss` of the weights, `eval/loss_ema` of their average, and each by timestep.

        Raises:
            ValueError: where none of the samples can be used.
        """
        models = {"loss": state.trained} | ({} if state.ema is None else {"loss_ema": state.ema})
        totals = {name: np.zeros(len(LEVELS)) for name in models}
        count = 0
        for chunk in self._chunks:
            batch, is_read = self._read(chunk)
            real = chunk.is_real & is_read
            ids = jax.make_array_from_process_local_data(self._sharding, chunk.samples[self._rows].astype(np.int32))
            for name, trained in models.items():
                losses = self._losses(trained, self._run.frozen, batch, self._schedule, ids)
                totals[name] += np.asarray(losses)[:, real].sum(axis=1)
            count += int(real.sum())
        if count == 0:
            raise ValueError("--eval-split: none of the held-out samples can be used; the log says why.")
        values: dict[str, float] = {}
        for name, total in totals.items():
            values[f"eval/{name}"] = float(total.mean() / count)
            values |= {f"eval/{name}_t{t}": float(x / count) for t, x in zip(LEVELS, total, strict=True)}
        return values

    @property
    def _rows(self) -> list[int]:
        return list(own_rows(self._sharding, self._size))

    def _read(self, chunk: _Chunk) -> tuple[AnyBatch, Bool[np.ndarray, " b"]]:
        """(the batch on the devices, which of its samples could be read by the process that has them)."""
        mine = hosts.together(functools.partial(self._local, chunk))
        rows, arrays, good = self._rows, *mine
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), to_batch(arrays))
        is_read = np.ones(self._size, bool)
        bad = hosts.gather_json([row for row, ok in zip(rows, good, strict=True) if not ok])
        is_read[[row for some in bad for row in some]] = False
        return batch, is_read

    def _local(self, chunk: _Chunk) -> tuple[dict[str, np.ndarray], list[bool]]:
        seed = self._run.config.run.seed

        def read(sample: int) -> dict[str, np.ndarray] | BadSample:
            try:
                return self._data.read(sample, np.random.default_rng([seed, sample, 0]))
            except BadSample as error:
                return error

        samples = chunk.samples[self._rows].tolist()
        threads = self._run.config.data.transform_images_num_proc
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        items = list(grain.MapDataset.source(samples).map(read).to_iter_dataset(options))
        whole = [item for item in items if not isinstance(item, BadSample)]
        for item in items:
            if isinstance(item, BadSample):
                self._data.bad.add(item)
        if not whole:
            raise ValueError(f"--eval-split: none of {len(items)} held-out samples can be used; the log says why.")
        filled = [whole[0] if isinstance(item, BadSample) else item for item in items]
        arrays = {name: np.stack([item[name] for item in filled]) for name in filled[0]}
        return arrays, [not isinstance(item, BadSample) for item in items]


def _chunks(held: Int[np.ndarray, " n"], size: int) -> Sequence[_Chunk]:
    found = []
    for bucket in np.unique(held[held >= 0]):
        members = np.flatnonzero(held == bucket)
        padded = np.concatenate([members, np.repeat(members[-1:], -len(members) % size)])
        is_real = np.arange(len(padded)) < len(members)
        found += [
            _Chunk(part, real) for part, real in zip(padded.reshape(-1, size), is_real.reshape(-1, size), strict=True)
        ]
    return found


def held_out_losses(
    trained: Networks,
    frozen: Networks,
    batch: AnyBatch,
    schedule: Schedule,
    ids: Int[Array, " b"],
    *,
    config: StepConfig,
) -> Float[Array, "levels b"]:
    """The loss of each sample at each of LEVELS, without weights of timesteps; noise follows from `ids` alone."""
    ids = placed(ids, config)
    networks = join(trained, frozen)
    shape = latent_shape(batch, networks.encoders)
    # The posterior's middle: nothing is left to chance.
    x0, cond = encode(networks.encoders, batch, jnp.zeros(shape, jnp.float32), config=config)
    predict = predictor(networks, batch, config)
    total = schedule.config.num_train_timesteps

    def at(t: Array) -> Array:
        def noise(sample: Array) -> Array:
            return jr.normal(jr.fold_in(jr.fold_in(jr.key(0), sample), t), shape[1:], jnp.float32)

        eps = jax.vmap(noise)(ids)
        draws = Draws(eps, eps, jnp.full(ids.shape, t))
        how = {"dtype": config.dtype, "compute": config.compute}
        return training_loss(predict, schedule, config.loss, x0, draws, cond, **how)[1]

    return jax.lax.map(at, jnp.asarray([level * total // 1000 for level in LEVELS], jnp.int32))
