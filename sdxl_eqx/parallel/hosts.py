"""Many processes that train together: how they find each other, agree, and hand arrays to one of them."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdxl_eqx.parallel.devices import on_tpu_vm

log = logging.getLogger("sdxl_eqx")

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""What a plain `host:port` start needs in the environment of each process."""

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")


def start(*, skip: bool, hardware: str) -> None:
    """Start `jax.distributed` where the environment says that there are other processes; before JAX finds devices.

    In this order: `host:port` in the environment (above; MaxDiffusion's names for GPUs too), Slurm's srun, Open MPI,
    a TPU VM, whose pod JAX finds by its metadata. Without any of them this process is alone.

    Where the others do not come within JAX's five minutes, jaxlib ends the process.

    Raises:
        ValueError: where the environment names a coordinator and not which process of how many this is, or the first
            process's port is taken.
    """
    if skip:
        return
    try:
        found = explicit(os.environ)
        if found is not None:
            log.info("joining %s as process %d of %d; waiting up to 5 minutes for all", found[0], found[2], found[1])
            jax.distributed.initialize(*found)
        elif _several(SLURM, "SLURM_NTASKS") or _several(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"):
            jax.distributed.initialize()
        elif hardware in ("auto", "tpu") and on_tpu_vm():
            _start_on_tpu()
    except (RuntimeError, TimeoutError) as error:
        raise ValueError(
            f"jax.distributed: the processes did not find each other ({str(error).splitlines()[0][:200]}); check that "
            "all were started and reach the first one's port, or run alone: --skip-jax-distributed-system."
        ) from error


def explicit(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(host:port of the first process, number of processes, index of this one) from the environment, if it says so.

    Raises:
        ValueError: where it says so in part.
    """
    names = (ADDRESS, COUNT, INDEX)
    address = environment.get(ADDRESS, "")
    if not address and "JAX_COORDINATOR_IP" in environment:
        names = ("JAX_COORDINATOR_IP", "NNODES", "NODE_RANK")
        address = f"{environment['JAX_COORDINATOR_IP']}:{environment.get('JAX_COORDINATOR_PORT', '1234')}"
    if not address:
        return None
    numbers = [environment.get(name, "") for name in names[1:]]
    if not all(number.isdigit() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise ValueError(
            f"{names[0]} is {address}, so {names[1]} must be the number of processes and {names[2]} this one's, from 0 "
            f"on; they are {numbers[0]!r} and {numbers[1]!r}. Set both, or run alone: --skip-jax-distributed-system."
        )
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"{names[0]} {address!r}: must be HOST:PORT of the first process.")
    return address, int(numbers[0]), int(numbers[1])


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def agree(value: str) -> str:
    """The first process's value."""
    return gather_texts(value)[0]


def index() -> int:
    """Which of the processes this is."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def gather_bytes(text: bytes) -> list[bytes]:
    """The bytes of each process, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text, np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def gather_texts(text: str) -> list[str]:
    """The text of each process, in their order."""
    return [one.decode() for one in gather_bytes(text.encode())]


def gather_json(value: T) -> list[T]:
    """A JSON value of each process, in their order."""
    return [json.loads(text) for text in gather_texts(json.dumps(value))]


def raise_together(error: Exception | None) -> None:
    """Raise `error`, and where it is another process's, its message: so that none waits for one that has ended.

    Returns when all processes are here and none has one.

    Raises:
        ValueError: where any process has one.
    """
    texts = gather_texts("" if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for i, text in enumerate(texts):
        if text:
            raise ValueError(f"process {i}: {text}")


def together(make: Callable[[], T], says: Callable[[T], Any] | None = None, /) -> T:
    """`make()`, or the error of any process that had one; what each `says` of it, if given, must be the same JSON.

    Raises:
        ValueError: with the message of one process, or with what one says and the first does not.
    """
    made = error = None
    try:
        made = make()
    except (ValueError, OSError) as found:
        error = found
    raise_together(error)
    if says is not None:
        same(says(cast(T, made)), "read")
    return cast(T, made)


def same(value: Any, what: str) -> None:
    """Check that all processes have the same JSON value.

    Raises:
        ValueError: in all of them, where one has another.
    """
    first, *others = gather_json(value)
    for i, one in enumerate(others, 1):
        if one != first:
            if isinstance(one, dict) and isinstance(first, dict):
                keys = [key for key in one.keys() | first.keys() if one.get(key) != first.get(key)]
                one, first = ({key: values.get(key) for key in sorted(keys)} for values in (one, first))
            raise ValueError(f"process {i} has {what} {one}, process 0 {first}; give all the same.")


def to_host(tree: T) -> T:
    """Every array whole in this process's memory. All processes must call it."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def all_stop(question: int) -> bool:
    """Whether all processes stop here, since one of them was told to by SIGTERM (JAX's preemption service).

    All must ask the same questions, whose numbers rise.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(question)


def _several(names: tuple[str, ...], count: str) -> bool:
    """Whether a launcher set all these variables and started more than one process."""
    return all(name in os.environ for name in names) and int(os.environ[count]) > 1


def _start_on_tpu() -> None:
    """By the pod's metadata; a TPU VM without any is alone."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        log.info("no other hosts: this TPU VM has no metadata of a pod")
