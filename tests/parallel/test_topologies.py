"""Accelerators by name, and what there is to compile for."""

import pytest
from compilers import HAS_CUDA, HAS_LIBTPU

from sdxl_eqx.parallel import topologies


@pytest.mark.parametrize(
    ("name", "hardware", "gigabytes"), [("v5p:2x2x1", "tpu", 102), ("v5e:16x16", "tpu", 17), ("h100x8", "gpu", 85)]
)
def test_a_name_says_which_chip_it_is(name, hardware, gigabytes):
    chip = topologies.chip(name)
    assert chip.hardware == hardware and round(chip.memory / 1e9) == gigabytes
    assert 0.85 * chip.memory < chip.limit < chip.memory


UNKNOWN = [
    "", "v5p", "v5p:4", "v5px8", "h100", "h100:2x2", "h100x0", "a100x8", "tpu:2x2", "v5e:2x2;rm", "V5E:2x2", "v5p:2x2",
    "v6e:2x2x2",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_any_other_name_is_refused_with_the_forms_there_are(name):
    with pytest.raises(ValueError, match=r"write CHIP:SHAPE for TPUs, as v5p:2x2x1.* or CARDxCOUNT .* v5e, v5p, v6e"):
        topologies.devices(name)


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="--compile-topology-num-slices 2: GPUs have none; name all of them, as h100x"):
        topologies.devices("h100x8", 2)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_its_compiler_a_tpu_is_refused_with_what_to_install():
    with pytest.raises(ValueError, match=r"libtpu does not describe it .* pip install -e '\.\[tpu\]'"):
        topologies.devices("v5e:2x2")


@pytest.mark.skipif(HAS_CUDA, reason="JAX's CUDA plugin is installed")
def test_without_its_compiler_a_gpu_is_refused_with_what_to_install():
    with pytest.raises(ValueError, match=r"CUDA plugin does not describe it .* pip install -e '\.\[cuda13\]'"):
        topologies.devices("h100x1")


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_tpus_come_in_slices_and_in_shapes_that_are_sold(monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    devices = topologies.devices("v5e:2x2", 2)
    assert len(devices) == 8 and {device.slice_index for device in devices} == {0, 1}
    assert [len(topologies.devices(name)) for name in ("v4:2x2x1", "v5p:2x2x1", "v5e:1x1")] == [4, 4, 1]
    with pytest.raises(ValueError, match=r"v5e:3x5: libtpu does not describe it .* Name a shape that is sold"):
        topologies.devices("v5e:3x5")


@pytest.mark.skipif(not HAS_CUDA, reason="JAX's CUDA plugin is not installed")
def test_gpus_are_all_of_one_kind():
    assert len({device.process_index for device in topologies.devices("h200x8")}) == 1
    assert len(topologies.devices("h100x16")) == 16
    with pytest.raises(ValueError, match="h100x9: a host has 8 GPUs"):
        topologies.devices("h100x9")
