"""How a run decides to compute: attention, heads on the mesh, and what is kept in memory."""

import dataclasses
import logging
from typing import Any

import jax
import jax.random as jr
import pytest
from tiny_step import UNET

from sdxl_eqx.config import (
    AttentionConfig,
    DataConfig,
    DiffusionSchedulerConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.choose import Folded, FromLength
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.sharded import Sharded
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.computing import encoding_compute
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training import computing
from sdxl_eqx.training.computing import unet_compute
from sdxl_eqx.training.memory import BY_RECOMPUTATION, NONE, Encoding, kept_bytes, step_bytes
from sdxl_eqx.training.networks import Networks, split


def config(parallel: ParallelConfig | None = None, **attention: Any) -> TrainConfig:
    """A config with these choices."""
    return dataclasses.replace(
        TrainConfig(), attention=AttentionConfig(**attention), parallel=parallel or ParallelConfig()
    )


def layout(asked: TrainConfig, count: int) -> Layout:
    """The mesh of so many devices."""
    return Layout(make_mesh(asked.parallel, jax.devices()[:count]), asked.parallel.logical_axis_rules)


def chosen(asked: TrainConfig, count: int = 1, *, memory: int | None = None) -> Compute:
    """How the small UNet is computed."""
    return unet_compute(asked, UNET, layout(asked, count), 8, side=8, memory=memory)


def test_one_device_needs_no_mesh_and_a_cpu_keeps_everything():
    assert chosen(config()) == Compute(dot_product, "none")


def test_flags_of_attention_reach_the_kernel(caplog):
    asked = config(
        attention="flash", flash_min_seq_length=100, split_head_dim=False, mask_padding_tokens=False, scan_unroll=2,
        remat_policy="full",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        compute = chosen(asked)
    kernel = Flash("splash", asked.flash_block_sizes, mask_padding=False, interpret=True)
    assert compute == Compute(FromLength(Folded(kernel), Folded(dot_product), 100), "full", 2)
    assert any("dot_product below 100 queries or keys" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("uniform", [True, False])
def test_on_a_mesh_attention_is_shared_and_weights_are_gathered_where_fsdp_shares_them(uniform):
    parallel = ParallelConfig(ici_fsdp_parallelism=2, ici_context_parallelism=2, ici_tensor_parallelism=2)
    asked = config(parallel, attention_sharding_uniform=uniform)
    if not uniform:  # the two heads would be shared by context and tensor
        with pytest.raises(ValueError, match=r"the 4 devices of tensor x context share .* this UNet's 2;"):
            chosen(asked, 8)
        return
    compute, where = chosen(asked, 8), layout(asked, 8)
    assert compute.attend == Sharded(dot_product, where.mesh, ("data", "fsdp"), ("tensor",), ("context",), uniform=True)
    assert compute.gather is not None and compute.place is not None
    assert chosen(config(), 8).gather is None  # data alone
    assert isinstance(encoding_compute(asked, where).attend, Sharded)


def test_heads_that_tensor_does_not_divide_are_refused():
    asked = config(ParallelConfig(ici_tensor_parallelism=4))
    with pytest.raises(
        ValueError, match=r"--ici-tensor-parallelism 4: the 4 devices .* this UNet's 2; let them be 1 or 2"
    ):
        chosen(asked, 4)


def test_policies_that_compute_more_again_keep_less():
    unet = jax.eval_shape(lambda: UNet(UNET, key=jr.key(0)))
    trained, frozen = split(Networks(unet, None), TrainConfig())
    kept = [kept_bytes(trained, frozen, 2, 8, Compute(remat=remat)) for remat in BY_RECOMPUTATION]
    assert kept == sorted(kept, reverse=True) and kept[0] > 2 * kept[-1]


def test_more_devices_by_fsdp_and_smaller_moments_take_less_memory_each():
    one, bf16 = (
        config(),
        dataclasses.replace(config(), optim=dataclasses.replace(TrainConfig().optim, moments_dtype="bfloat16")),
    )
    eight = config(ParallelConfig(ici_fsdp_parallelism=8))
    wide = dataclasses.replace(UNET, block_out_channels=(256,), heads=(4,), norm_num_groups=8)

    def size(asked: TrainConfig, count: int) -> float:
        return step_bytes(asked, wide, layout(asked, count), 0.0, 8, Compute())

    assert size(eight, 8) < 0.2 * size(one, 1)
    assert size(bf16, 1) == pytest.approx(12 / 16 * size(one, 1))


@pytest.mark.parametrize(("axis", "share"), [("data", 4), ("fsdp", 4), ("context", 4), ("tensor", 8)])
def test_auto_counts_the_samples_of_a_device_and_all_that_tensor_may_leave_whole(axis, share, monkeypatch):
    sizes: Any = {"ici_data_parallelism": 1, f"ici_{axis}_parallelism": 2}
    asked = config(ParallelConfig(**sizes))
    seen = []
    monkeypatch.setattr(computing, "step_bytes", lambda *values: seen.append(values[3]) or 0.0)
    assert chosen(asked, 2, memory=10**9).remat == "none"
    assert seen == [share]


def test_encoders_that_run_in_the_step_take_their_weights_and_what_they_need_before_the_unet():
    asked, beside = config(), Encoding(weights=1e9, each=5e8)

    def needed(batch: float, encoders: Encoding) -> float:
        return step_bytes(asked, UNET, layout(asked, 1), batch, 8, Compute(), encoders)

    assert needed(0.0, beside) == needed(0.0, NONE) + 1e9
    parameters = 12 * needed(0.0, NONE) / 16  # without what is cast and its gradient
    assert needed(8.0, beside) == pytest.approx(parameters + 1e9 + 8 * 5e8)


def test_the_encoders_of_a_model_are_counted_as_they_are_laid_out():
    model, schedule = ModelConfig("asset:tiny-sdxl", train_new_unet=True), DiffusionSchedulerConfig()
    parts = ModelParts.read(model, schedule, token="")
    one = layout(config(), 1)
    encoders = jax.eval_shape(
        lambda: parts.encoders(dataclasses.replace(model, new_text_encoders=True), one, key=jr.key(0))
    )
    found = Encoding.of(
        parts, one, TrainConfig(data=DataConfig(resolution=64, cache_latents_text_encoder_outputs=False))
    )
    assert found.weights == sum(4 * leaf.size for leaf in jax.tree.leaves(encoders))
    assert found.each == 4 * 4 * 64 * 64 * parts.vae.block_out_channels[0]
    assert Encoding.of(parts, one, TrainConfig(data=DataConfig(caption_shuffle=True))) == Encoding(found.weights)
    assert Encoding.of(parts, one, TrainConfig()) == NONE


def test_longer_captions_keep_more_for_the_backward_pass():
    one, two = (
        dataclasses.replace(config(), data=DataConfig(caption_chunks=chunks, resolution=64)) for chunks in (1, 2)
    )
    with_one, with_two = (step_bytes(asked, UNET, layout(asked, 1), 8.0, 8, Compute()) for asked in (one, two))
    assert with_two > 1.02 * with_one


@pytest.mark.parametrize(("share", "remat"), [(2.0, "none"), (0.0, "full")])
def test_auto_takes_the_least_recomputation_that_fits_the_device(share, remat, caplog):
    asked = config()
    needed = step_bytes(asked, UNET, layout(asked, 1), 8.0, 8, Compute())
    with caplog.at_level(logging.INFO):
        compute = chosen(asked, memory=int(share * needed))
    assert compute.remat == remat
    *_, said = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"remat auto: {remat} (about ") and ("may not fit" in said) == (share == 0)
