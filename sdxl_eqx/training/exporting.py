"""What a run leaves for other programs: a model, a LoRA or a ControlNet in the files that they load."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdxl_eqx.data.tokenizer import save_tokenizers
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.sdxl import SDXL, cast
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.targets import lora_shape
from sdxl_eqx.weights.adapters import PEFT, parts_of, to_lora
from sdxl_eqx.weights.destination import appearing
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.index import index_of
from sdxl_eqx.weights.lora import LoRA, write_kohya, write_peft
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.write import file_tensors, model_of


def export(run: Run, step: int, trained: Networks) -> None:
    """Write the folder export/ of a run, by the first process, and note that the run is finished.

    A whole model is a diffusers folder; a LoRA is a file for diffusers and PEFT, and one for kohya, ComfyUI and A1111
    named after the run; a ControlNet is a folder of diffusers' `ControlNetModel`.

    Raises:
        ValueError: for weights that are not finite.
        OSError: where it cannot be written.
    """
    dtype = jnp.dtype(run.config.checkpoint.export_dtype)
    kind = run.config.trains
    wanted: Any = trained
    if kind == "unet":
        wanted = run.model(trained)
    elif kind == "controlnet":
        wanted = trained.controlnet
    if jax.process_count() > 1:  # alone, each tensor is fetched as it is written
        wanted = hosts.to_host(cast(wanted, dtype))
    write = {"unet": _write_model, "lora": _write_lora, "controlnet": _write_controlnet}[kind]
    hosts.together(partial(_by_first, run, step, partial(write, run, wanted, dtype)))


def _by_first(run: Run, step: int, write: partial[None]) -> None:
    if hosts.is_first():
        write()
        run.folder.finish(step)


def _write_model(run: Run, whole: SDXL, dtype: Any) -> None:
    model = model_of(whole, run.parts.schedule.to_json(), dtype=dtype)
    model = dataclasses.replace(model, index=index_of(caption_dropout=run.config.data.caption_dropout))
    tokenizers = partial(save_tokenizers, run.parts.tokenizers)
    write_folder(model, run.folder.export, save_tokenizers=tokenizers, overwrite=True)


def _write_lora(run: Run, trained: Networks, dtype: Any) -> None:
    shape = lora_shape(run.config.lora)
    lora = to_lora(parts_of(trained.unet, trained.encoders), shape, {"ss_output_name": run.config.run.run_name})
    lora = LoRA({name: layer.cast(dtype) for name, layer in lora.layers.items()}, lora.metadata)
    kohya = f"{run.config.run.run_name}.safetensors"
    with appearing(run.folder.export, overwrite=True, files=(PEFT, kohya)) as folder:
        write_peft(lora, folder / PEFT)
        write_kohya(lora, run.parts.unet, folder / kohya)


def _write_controlnet(run: Run, net: ControlNet, dtype: Any) -> None:
    model = Model({"controlnet": file_tensors(net, dtype=dtype)}, {"controlnet": net.config.to_json()})
    write_folder(model, run.folder.export, save_tokenizers=lambda folder: None, overwrite=True)
