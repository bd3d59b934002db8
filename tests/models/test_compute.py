"""Choices of computing that must change neither value nor gradient: rematerialization and unrolling."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.compute import Compute

SMALL = dataclasses.replace(
    tiny.UNET,
    block_out_channels=(16,),
    attention_levels=(True,),
    transformer_layers=(2,),
    heads=(2,),
    norm_num_groups=4,
)
"""One level: compiling is what this costs."""


def run(compute: Compute) -> tuple[float, list[np.ndarray]]:
    loss, gradient = tiny.unet_gradient(tiny.filled(UNet, SMALL), tiny.unet_inputs(SMALL, (4, 6)), "epsilon", compute)
    return loss, [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


@pytest.fixture(scope="module")
def plain() -> tuple[float, list[np.ndarray]]:
    return run(Compute())


@pytest.mark.parametrize("remat, scan_unroll", [("dots", 2), ("full", 1), ("attention", 1), ("offload", 1)])
def test_remat_and_unrolling_change_neither_loss_nor_gradient(
    remat: Any, scan_unroll: int, plain: tuple[float, list[np.ndarray]]
):
    loss, gradient = run(Compute(remat=remat, scan_unroll=scan_unroll))
    assert loss == pytest.approx(plain[0], rel=1e-6)
    for ours, wanted in zip(gradient, plain[1], strict=True):
        assert np.linalg.norm(ours - wanted) <= 1e-6 * max(1.0, float(np.linalg.norm(wanted)))


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full", "offload"])
def test_every_model_has_a_gradient_under_every_remat(remat: Any):
    compute = Compute(remat=remat)

    def of_vae(vae: VAE) -> jax.Array:
        moments = vae.encode(jnp.asarray(tiny.pixels()), compute=compute)
        return vae.decode(moments.mean, compute=compute).sum()

    def of_text(encoder: CLIPText) -> jax.Array:
        return encoder(jnp.asarray(tiny.prompt_ids()[1]), compute=compute)[1].sum()

    for make, config, function in ((VAE, tiny.VAE_CONFIG, of_vae), (CLIPText, tiny.TEXT_2, of_text)):
        model = eqx.filter_eval_shape(make, config, key=jr.key(0))
        assert jax.tree.leaves(jax.eval_shape(jax.grad(function), model))


def test_unrolling_leaves_a_text_encoder_as_it_is():
    encoder, ids = tiny.filled(CLIPText, tiny.TEXT_2), tiny.prompt_ids()[1]
    unrolled = tiny.strict(lambda model, ids: model(ids, compute=Compute(scan_unroll=2)))(encoder, ids)
    for ours, wanted in zip(unrolled, tiny.run_text(encoder, ids), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)
