import logging
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.parallel import hosts

PLAIN = {"JAX_COORDINATOR_ADDRESS": "first:4000", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
MAXDIFFUSION = {"JAX_COORDINATOR_IP": "10.0.0.1", "JAX_COORDINATOR_PORT": "5000", "NNODES": "2", "NODE_RANK": "0"}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
TPU = {"TPU_NAME": "pod"}

Call = tuple[Any, ...]


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    """An environment that lacks one name."""
    return {key: value for key, value in environment.items() if key != name}


@pytest.fixture
def begun(monkeypatch):
    """Starts in an environment; what JAX was called with, or raises the error that it is to end with."""
    monkeypatch.setattr(hosts, "on_tpu_vm", lambda: "TPU_NAME" in os.environ)
    for name in (*PLAIN, *MAXDIFFUSION, *SLURM, *OPEN_MPI, *TPU):
        monkeypatch.delenv(name, raising=False)

    def begin(
        environment: dict[str, str], *, skip: bool = False, hardware: str = "auto", error: Exception | None = None
    ) -> list[Call]:
        calls: list[Call] = []

        def initialize(*arguments: Any) -> None:
            calls.append(arguments)
            if error is not None:
                raise error

        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        hosts.start(skip=skip, hardware=hardware)
        return calls

    return begin


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (PLAIN, ("first:4000", 4, 3)),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "[fd00::1]:4000"}, ("[fd00::1]:4000", 4, 3)),
        ({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, ("first:4000", 1, 0)),
        (without(PLAIN, "JAX_COORDINATOR_ADDRESS"), None),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": ""}, None),
        (MAXDIFFUSION, ("10.0.0.1:5000", 2, 0)),
        (without(MAXDIFFUSION, "JAX_COORDINATOR_PORT"), ("10.0.0.1:1234", 2, 0)),
        (without(MAXDIFFUSION, "JAX_COORDINATOR_IP"), None),
        ({**MAXDIFFUSION, **PLAIN}, ("first:4000", 4, 3)),
    ],
)
def test_the_environment_says_who_is_first_how_many_there_are_and_which_this_is(environment, found):
    assert hosts.explicit(environment) == found


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (without(PLAIN, "JAX_NUM_PROCESSES"), r"JAX_NUM_PROCESSES must .* they are '' and '3'"),
        (without(PLAIN, "JAX_PROCESS_ID"), r"JAX_PROCESS_ID this one's, from 0 on; they are '4' and ''"),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, r"JAX_COORDINATOR_ADDRESS is first:4000, .* they are '4' and '4'"),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, r"they are '4' and '-1'"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "two"}, r"they are 'two' and '3'\. .*--skip-jax-distributed-system"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, r"they are '0' and '0'"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "first"}, r"JAX_COORDINATOR_ADDRESS 'first': must be HOST:PORT"),
        (without(MAXDIFFUSION, "NNODES"), r"JAX_COORDINATOR_IP is 10\.0\.0\.1:5000, so NNODES must .* '' and '0'"),
        (without(MAXDIFFUSION, "NODE_RANK"), r"NODE_RANK this one's, from 0 on; they are '2' and ''"),
        ({**MAXDIFFUSION, "JAX_COORDINATOR_PORT": "any"}, r"JAX_COORDINATOR_IP '10\.0\.0\.1:any': must be HOST:PORT"),
    ],
)
def test_an_environment_that_says_so_in_part_is_refused_with_what_is_missing(environment, says):
    with pytest.raises(ValueError, match=says):
        hosts.explicit(environment)


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, []),
        (PLAIN, [("first:4000", 4, 3)]),
        (MAXDIFFUSION, [("10.0.0.1:5000", 2, 0)]),
        ({**SLURM, **TPU, **PLAIN}, [("first:4000", 4, 3)]),
        (SLURM, [()]),
        ({**SLURM, "SLURM_NTASKS": "1"}, []),
        (without(SLURM, "SLURM_STEP_NODELIST"), []),  # a shell of salloc, or a batch script without srun
        (OPEN_MPI, [()]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, []),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), []),
        (TPU, [()]),
    ],
)
def test_jax_is_told_what_the_environment_says_or_finds_it_or_is_left_alone(begun, environment, calls):
    assert begun(environment) == calls


@pytest.mark.parametrize("environment", [PLAIN, MAXDIFFUSION, SLURM, OPEN_MPI, TPU])
def test_a_run_that_is_to_be_alone_is_whatever_the_environment_says(begun, environment):
    assert begun(environment, skip=True) == []


@pytest.mark.parametrize(("hardware", "calls"), [("auto", [()]), ("tpu", [()]), ("cpu", []), ("gpu", [])])
def test_a_tpu_vm_looks_for_its_pod_only_where_tpus_are_meant(begun, hardware, calls):
    assert begun(TPU, hardware=hardware) == calls


def test_a_process_says_whom_it_joins(begun, caplog):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    begun(PLAIN)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "joining first:4000 as process 3 of 4; waiting up to 5 minutes for all"


def test_a_tpu_vm_without_a_pod_is_alone_and_says_so(begun, caplog):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    assert begun(TPU, error=ValueError("coordinator_address should be defined.")) == [()]
    assert "no other hosts" in caplog.text


def test_any_other_error_of_a_pod_is_not_taken_for_its_absence(begun):
    with pytest.raises(ValueError, match="unsupported worker-network-endpoints format"):
        begun(TPU, error=ValueError("unsupported worker-network-endpoints format: x"))


@pytest.mark.parametrize("environment", [PLAIN, SLURM, TPU])
@pytest.mark.parametrize("error", [RuntimeError, TimeoutError, jax.errors.JaxRuntimeError])
def test_processes_that_do_not_find_each_other_are_told_what_to_check(begun, environment, error):
    says = r"^jax\.distributed: the processes did not find each other \(nobody came\); .*--skip-jax-distributed-system"
    with pytest.raises(ValueError, match=says) as raised:
        begun(environment, error=error("nobody came\nand more"))
    assert isinstance(raised.value.__cause__, error)


def test_one_process_is_the_first_and_agrees_with_itself():
    assert hosts.is_first()
    assert hosts.gather_texts("grüße") == ["grüße"]
    assert hosts.agree("name") == "name"
    assert hosts.gather_json({"next_index": 3}) == [{"next_index": 3}]
    assert not hosts.all_stop(1)


def test_one_process_raises_its_own_error_and_nothing_without_one():
    hosts.raise_together(None)
    error = OSError("no such folder")
    with pytest.raises(OSError) as raised:
        hosts.raise_together(error)
    assert raised.value is error


def test_texts_of_any_length_come_from_all_processes_in_their_order(monkeypatch):
    texts = ["", "grüße", "a longer one than the others"]
    data = [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def gather(mine: Any) -> np.ndarray:
        if np.ndim(mine) == 0:
            return np.array([len(one) for one in data])
        return np.stack([np.pad(one, (0, len(mine) - len(one))) for one in data])

    monkeypatch.setattr(jax, "process_count", lambda: len(texts))
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    for text in texts:
        assert hosts.gather_texts(text) == texts
        assert hosts.agree(text) == texts[0]
    with pytest.raises(ValueError, match=r"^process 1: grüße$"):
        hosts.raise_together(None)


def test_what_processes_made_must_be_the_same(monkeypatch):
    assert hosts.together(lambda: 3, lambda made: [made]) == 3
    monkeypatch.setattr(hosts, "gather_texts", lambda text: [text, text] if text == "" else [text, "[4]"])
    assert hosts.together(lambda: 4, lambda made: [made]) == 4
    with pytest.raises(ValueError, match=r"^process 1 has read \[4\], process 0 \[3\]; give all the same\.$"):
        hosts.together(lambda: 3, lambda made: [made])


def test_shared_arrays_come_whole_into_the_memory_of_a_host():
    x = np.arange(16.0).reshape(8, 2)
    shared = jax.device_put(x, NamedSharding(jax.make_mesh((8,), ("data",)), P("data")))
    found = hosts.to_host({"shared": shared, "none": None, "whole": jax.device_put(x)})
    assert found["none"] is None
    for name in ("shared", "whole"):
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_array_equal(found[name], x)
