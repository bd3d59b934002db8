"""Write the golden files of Flax: which arrays its SDXL has, what its files look like, and what its models compute.

Run as `python tests/golden/make_flax_golden.py` in an environment of its own: Flax left diffusers and transformers
since. These versions did: Python 3.11, diffusers 0.35.2, transformers 4.49.0, flax 0.12.8, jax 0.10.2, numpy 2.4.6,
msgpack 1.2.4; no PyTorch; beside them this package's equinox, jaxtyping and safetensors, and pytest and hypothesis
because tiny configs, weights and inputs are those of tests/weights/test_flax.py.

Everything is told from Flax's modules alone: full size from their abstract initialization, the tiny files from
their `save_pretrained`. One thing is changed: Flax's UNet has the tanh GELU, and eps 1e-5 before its transformers; it
is run with the exact GELU and 1e-6, as in PyTorch, where SDXL was trained. How far its own are off is printed. Then
our reader and our models are held against all of it.
"""

# The environment of the others has none of this.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from diffusers.models import attention_flax
from flax import linen, serialization, traverse_util
from flax.core import unfreeze
from transformers import CLIPTextConfig, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "weights"), str(TESTS.parent)]

# Below, since the path must be set first.
import parity_models as tiny  # noqa: E402
import test_flax as ours  # noqa: E402

from sdxl_eqx.weights.flax import FLAX, read_flax  # noqa: E402

CLASSES: dict[str, Any] = {
    "unet": FlaxUNet2DConditionModel,
    "vae": FlaxAutoencoderKL,
    "text_encoder": FlaxCLIPTextModel,
    "text_encoder_2": FlaxCLIPTextModelWithProjection,
}


def model_of(part: str, config: dict[str, Any]) -> Any:
    """Flax's model of a config, without weights."""
    if part.startswith("text_encoder"):
        return CLASSES[part](CLIPTextConfig(**config), _do_init=False)
    return CLASSES[part].from_config(config)


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path and shape of each of its arrays; nothing is computed."""
    model = model_of(part, config)
    text = part.startswith("text_encoder")
    tree = model.params_shape_tree if text else jax.eval_shape(model.init_weights, jax.random.key(0))
    leaves = traverse_util.flatten_dict(unfreeze(tree), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


@contextmanager
def as_in_pytorch() -> Iterator[None]:
    """Flax's transformers with the exact GELU and PyTorch's eps."""
    changed = types.ModuleType("linen")
    vars(changed).update(vars(linen))
    vars(changed)["gelu"] = lambda x: linen.gelu(x, approximate=False)
    vars(changed)["GroupNorm"] = lambda num_groups, epsilon: linen.GroupNorm(num_groups=num_groups, epsilon=1e-6)
    with mock.patch.object(attention_flax, "nn", changed):
        yield


def outputs(part: str, params: Any) -> tiny.Tensors:
    """What Flax's tiny model computes, under the names of `test_flax.outputs` and in NHWC."""
    model = model_of(part, ours.TINY[part])
    given = {name: jax.numpy.asarray(x) for name, x in ours.inputs(part).items()}
    if part == "unet":
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        x = jax.numpy.moveaxis(given["x"], -1, 1)
        y = model.apply({"params": params}, x, given["t"], given["context"], added).sample
        return {"unet": tiny.nhwc(np.asarray(y))}
    if part == "vae":
        x = jax.numpy.moveaxis(given["x"], -1, 1)
        z = jax.numpy.moveaxis(given["z"], -1, 1)
        moments = model.apply({"params": params}, x, method=model.encode).latent_dist
        decoded = model.apply({"params": params}, z, method=model.decode).sample
        return {
            "vae.mean": np.asarray(moments.mean),
            "vae.logvar": np.asarray(moments.logvar),
            "vae.decoded": tiny.nhwc(np.asarray(decoded)),
        }
    found = model(given["ids"], params=params, output_hidden_states=True)
    pooled = found.text_embeds if part == "text_encoder_2" else found.pooler_output
    return {f"{part}.penultimate": np.asarray(found.hidden_states[-2]), f"{part}.pooled": np.asarray(pooled)}


def saved(part: str, arrays: dict[str, np.ndarray], folder: Path) -> Path:
    """The file that Flax's own `save_pretrained` writes of a tiny model with these weights."""
    model_of(part, ours.TINY[part]).save_pretrained(folder, params=ours.tree(arrays))
    return folder / FLAX[part]


def kinds() -> bytes:
    """What Flax writes of every kind of leaf; more than 64 bytes are divided."""
    with mock.patch.object(serialization, "MAX_CHUNK_SIZE", 64):
        return serialization.msgpack_serialize(dict(ours.kinds()), in_place=True)


def main() -> None:
    """Compute everything, check our side against it, and write it beside this file."""
    packages = ("diffusers", "transformers", "flax", "jax", "numpy", "msgpack")
    keys: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    keys["full"] = {part: tiny.table(shapes_of(part, ours.FULL[part])) for part in FLAX}
    keys["kinds"] = ours.sha256(kinds())
    keys["tiny"] = {}
    computed: tiny.Tensors = {}
    for part in FLAX:
        arrays = {path: ours.array(path, shape) for path, shape in shapes_of(part, ours.TINY[part]).items()}
        with tempfile.TemporaryDirectory() as folder:
            file = saved(part, arrays, Path(folder))
            keys["tiny"][part] = ours.sha256(file.read_bytes())
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            read_flax(file, part, config)  # the config that Flax writes is one that we read
            tensors, _ = read_flax(file, part, ours.TINY[part])
            own = ours.outputs(part, tensors)
        with as_in_pytorch():
            theirs = outputs(part, ours.tree(arrays))
        if part == "unet":
            unchanged = outputs(part, ours.tree(arrays))["unet"]
            print(f"unet with Flax's own GELU and eps: {np.abs(unchanged - own['unet']).max():.2g} off")
        for name, value in theirs.items():
            print(f"{name}: {np.abs(value - np.asarray(own[name])).max():.2g} off, of std {np.std(value):.2g}")
            tiny.assert_close(own[name], value, 1e-4)
        computed |= theirs
    ours.OUTPUTS.write_bytes(serialization.msgpack_serialize(computed))
    ours.KEYS.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
