"""A policy of rematerialization can keep what attention needs for its backward pass."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.cudnn import cudnn
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.residuals import CUDNN, keep_attention
from sdxl_eqx.kernels.sharded import Sharded


@pytest.mark.parametrize(
    ("attend", "of"),
    [(Flash("splash", interpret=True), "jitted function '_splash_attention'"), (cudnn, CUDNN), (dot_product, "")],
    ids=["splash", "cudnn", "dot_product"],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "data 2"])
def test_the_result_and_its_log_sum_exp_are_kept(attend, of, sharded, capsys, monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    if sharded:
        kind = (jax.sharding.AxisType.Auto,)
        attend = Sharded(attend, jax.make_mesh((2,), ("data",), axis_types=kind, devices=jax.devices()[:2]))
        of = of and "shard_map"

    def kept(policy) -> int:
        block = jax.checkpoint(lambda x: jnp.sum(attend(x, x, x).astype(jnp.float32)), policy=policy)
        print_saved_residuals(block, jnp.ones((2, 16, 1, 8), jnp.bfloat16))
        return capsys.readouterr().out.count(f"output of {of}")

    assert kept(None) == 0
    assert kept(keep_attention) == (2 if of else 0)
