"""The same tiny models in diffusers and transformers, and what they make of the same inputs. Needs PyTorch."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import parity_models as tiny
import parity_schedulers as cases
import pytest
from parity_models import Tensors, nchw, nhwc

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPTextConfig
from sdxl_eqx.models.controlnet import ControlNetConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig


@contextlib.contextmanager
def their_warnings_are_theirs() -> Iterator[None]:
    """Warnings of the reference implementations fail no test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with their_warnings_are_theirs():
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    # Lazy modules: named here, so that all their imports happen under the filter.
    lazy: Any = diffusers
    AutoencoderKL = lazy.AutoencoderKL
    ControlNetModel = lazy.ControlNetModel
    DDPMScheduler = lazy.DDPMScheduler
    EulerDiscreteScheduler = lazy.EulerDiscreteScheduler
    MultiControlNetModel = lazy.MultiControlNetModel
    StableDiffusionXLPipeline = lazy.StableDiffusionXLPipeline
    UNet2DConditionModel = lazy.UNet2DConditionModel
    TorchTextConfig: Any = transformers.CLIPTextConfig
    CLIPTextModel: Any = transformers.CLIPTextModel
    CLIPTextModelWithProjection: Any = transformers.CLIPTextModelWithProjection

diffusers.utils.logging.disable_progress_bar()


def fill(model: Any, *, salt: int = 0) -> Any:
    """The weights that follow from the keys; `text_model.` is part of a text encoder's, whatever this version says."""
    bare = isinstance(model, CLIPTextModel) and not any(key.startswith("text_model.") for key in model.state_dict())
    prefix = "text_model." if bare else ""
    state = {
        key: torch.from_numpy(tiny.tensor(prefix + key, tuple(value.shape), salt=salt))
        for key, value in model.state_dict().items()
        if not key.endswith("position_ids")
    }
    model.load_state_dict(state, strict=False)
    return model.eval()


def their_unet(config: UNetConfig, *, salt: int = 0) -> Any:
    """diffusers' UNet of that config."""
    with their_warnings_are_theirs():
        return fill(UNet2DConditionModel.from_config(config.to_json()), salt=salt)


def their_controlnet(config: ControlNetConfig, *, salt: int = 0) -> Any:
    """diffusers' ControlNet of that config; its zero convolutions are filled too."""
    with their_warnings_are_theirs():
        return fill(ControlNetModel.from_config(config.to_json()), salt=salt)


def their_vae(config: VAEConfig, *, salt: int = 0) -> Any:
    """diffusers' autoencoder of that config."""
    with their_warnings_are_theirs():
        return fill(AutoencoderKL.from_config(config.to_json()), salt=salt)


def their_text(config: CLIPTextConfig, *, salt: int = 0) -> Any:
    """transformers' text encoder of that config."""
    kind = CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection
    with their_warnings_are_theirs():
        return fill(kind(TorchTextConfig(**config.to_json())), salt=salt)


def scheduler(kind: Any, **changes: Any) -> Any:
    """A scheduler of diffusers with the config that we write."""
    with their_warnings_are_theirs():
        return kind.from_config({**ScheduleConfig(**changes).to_json(), "clip_sample": False})


def to_torch(x: Any) -> Any:
    """A tensor; pictures from our layout to PyTorch's."""
    x = np.asarray(x)
    return torch.from_numpy(nchw(x) if x.ndim == 4 else np.ascontiguousarray(x))


def to_numpy(x: Any) -> np.ndarray:
    """An array; pictures from PyTorch's layout to ours."""
    y = x.detach().numpy()
    return nhwc(y) if y.ndim == 4 else y


def added_conditions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' name for pooled text and micro-conditioning."""
    return {"text_embeds": to_torch(inputs["pooled"]), "time_ids": to_torch(inputs["time_ids"])}


def call_unet(unet: Any, x: Any, t: Any, inputs: Mapping[str, Any], **residuals: Any) -> Any:
    """diffusers' UNet as its SDXL pipelines call it."""
    with their_warnings_are_theirs():
        return unet(x, t, to_torch(inputs["context"]), added_cond_kwargs=added_conditions(inputs), **residuals).sample


def their_output(unet: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    """The UNet's output at inputs of `unet_inputs`."""
    with torch.no_grad():
        return to_numpy(call_unet(unet, to_torch(inputs["x"]), to_torch(inputs["t"]), inputs))


def their_controlled_output(
    unet: Any, net: Any, inputs: Mapping[str, Any], image: Any, scale: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(residuals of the skips, of the mid block, the UNet's output with both), as diffusers' pipeline makes them.

    `image` and `scale` are lists where `net` is a `MultiControlNetModel`.
    """
    x, t = to_torch(inputs["x"]), to_torch(inputs["t"])
    pictures = [to_torch(one) for one in image] if isinstance(image, list) else to_torch(image)
    with torch.no_grad(), their_warnings_are_theirs():
        down, mid = net(
            x,
            t,
            encoder_hidden_states=to_torch(inputs["context"]),
            controlnet_cond=pictures,
            conditioning_scale=scale,
            added_cond_kwargs=added_conditions(inputs),
            return_dict=False,
        )
        out = call_unet(unet, x, t, inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    return [to_numpy(residual) for residual in down], to_numpy(mid), to_numpy(out)


def their_gradient(unet: Any, inputs: Mapping[str, Any], prediction_type: str) -> tuple[float, Tensors]:
    """(loss, gradient by key) of the training script's loss: add_noise, predict, squared error with the target."""
    ddpm = scheduler(DDPMScheduler, prediction_type=prediction_type)
    x0, eps, t = (to_torch(inputs[name]) for name in ("x", "eps", "t"))
    target = eps if prediction_type == "epsilon" else ddpm.get_velocity(x0, eps, t.long())
    unet.zero_grad()
    prediction = call_unet(unet, ddpm.add_noise(x0, eps, t.long()), t, inputs)
    loss = torch.nn.functional.mse_loss(prediction, target)
    loss.backward()
    return float(loss.detach()), {key: value.grad.numpy().copy() for key, value in unet.named_parameters()}


def their_trajectory(
    unet: Any,
    inputs: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    steps: int,
    guidance_scale: float,
    **changes: Any,
) -> np.ndarray:
    """Latents that the Euler sampler draws from the noise `inputs["eps"]`, guided away from `uncond`."""
    euler = scheduler(EulerDiscreteScheduler, **changes)
    with torch.no_grad(), their_warnings_are_theirs():
        euler.set_timesteps(steps)
        x = to_torch(inputs["eps"]) * euler.init_noise_sigma
        for t in euler.timesteps:
            scaled = euler.scale_model_input(x, t)
            out = call_unet(unet, scaled, t, inputs)
            if uncond is not None:
                without = call_unet(unet, scaled, t, uncond)
                out = without + guidance_scale * (out - without)
            x = euler.step(out, t, x).prev_sample
    return to_numpy(x)


def their_encoding(vae: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, logvar) of pixels."""
    with torch.no_grad():
        posterior = vae.encode(to_torch(x)).latent_dist
    return to_numpy(posterior.mean), to_numpy(posterior.logvar)


def their_decoding(vae: Any, z: np.ndarray) -> np.ndarray:
    """Pixels of unscaled latents."""
    with torch.no_grad():
        return to_numpy(vae.decode(to_torch(z)).sample)


def their_states(encoder: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(penultimate, pooled) as diffusers' SDXL pipeline takes them."""
    with torch.no_grad(), their_warnings_are_theirs():
        out = encoder(torch.from_numpy(ids).long(), output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return to_numpy(out.hidden_states[-2]), to_numpy(pooled)


def their_levels(**changes: Any) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """(timesteps, sigmas, scale of the initial noise) of the Euler sampler for each number of STEPS."""
    euler = scheduler(EulerDiscreteScheduler, **changes)
    for steps in tiny.STEPS:
        with their_warnings_are_theirs():
            euler.set_timesteps(steps)
        yield euler.timesteps.numpy(), euler.sigmas.numpy(), float(euler.init_noise_sigma)


def their_scheduler(case: cases.Case) -> Any:
    """diffusers' scheduler of a case, its timesteps set."""
    with their_warnings_are_theirs():
        theirs = getattr(lazy, case.name).from_config(case.config)
        if case.timesteps:
            theirs.set_timesteps(timesteps=list(case.timesteps))
        else:
            theirs.set_timesteps(case.steps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(case.start)
    return theirs


def their_drawing(case: cases.Case, model: Any = None, shape: tuple[int, ...] = cases.SHAPE) -> np.ndarray:
    """The last latents of a case as diffusers' pipelines draw them, over the cheap model or `(x, t) -> output`."""
    model = model or (lambda x, t: cases.cheap(torch, x, t))
    theirs = their_scheduler(case)
    timesteps = theirs.timesteps[case.start : case.stop]
    noises = iter(to_torch(noise) for noise in cases.step_noises(len(timesteps), shape))
    eps = to_torch(cases.unit_noise("x", shape))
    module = sys.modules[type(theirs).__module__]
    options = {"eta": case.eta} if case.name == cases.DDIM else {}
    with torch.no_grad(), their_warnings_are_theirs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(noises), raising=False)
        x = eps * theirs.init_noise_sigma
        if case.start > 0:
            x = theirs.add_noise(to_torch(cases.picture(shape)), eps, timesteps[:1])
        for t in timesteps:
            x = theirs.step(model(theirs.scale_model_input(x, t), t), t, x, **options).prev_sample
    return to_numpy(x)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Every key and shape of a model's file, as the published files have them."""
    found = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    if isinstance(model, CLIPTextModel):
        found = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in found.items()}
    return found


def published_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes of the published models, built from their configs on the meta device."""
    import parity_published as published

    with torch.device("meta"), their_warnings_are_theirs():
        return {
            "unet": shapes(UNet2DConditionModel(**published.UNET)),
            "refiner": shapes(UNet2DConditionModel(**published.REFINER)),
            "vae": shapes(AutoencoderKL(**published.VAE)),
            "text_encoder": shapes(CLIPTextModel(TorchTextConfig(**published.TEXT))),
            "text_encoder_2": shapes(CLIPTextModelWithProjection(TorchTextConfig(**published.TEXT_2))),
        }


def golden() -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Everything that the golden files hold: tensors by file, and the tables of keys."""
    files: dict[str, Tensors] = {}
    for name, config, grid, count in (("unet", tiny.UNET, (12, 10), 6), ("refiner", tiny.REFINER, (10, 12), 5)):
        inputs = tiny.unet_inputs(config, grid, time_ids=count)
        files[name] = {"output": their_output(their_unet(config), inputs)}
    inputs = tiny.unet_inputs(tiny.UNET, (12, 10))
    loss, gradient = their_gradient(their_unet(tiny.UNET), inputs, "epsilon")
    sketches = {key: np.array(tiny.sketch(key, value), np.float64) for key, value in gradient.items()}
    files["gradient"] = {"loss": np.array([loss]), **sketches}
    uncond = tiny.unet_inputs(tiny.UNET, (12, 10), seed=1)
    files["trajectory"] = {"latents": their_trajectory(their_unet(tiny.UNET), inputs, uncond, **tiny.GUIDED)}
    vae = their_vae(tiny.VAE_CONFIG)
    mean, logvar = their_encoding(vae, tiny.pixels())
    files["vae"] = {"mean": mean, "logvar": logvar, "pixels": their_decoding(vae, tiny.latents())}
    files["text"] = {}
    for name, config, ids in zip(("first", "second"), (tiny.TEXT, tiny.TEXT_2), tiny.prompt_ids(), strict=True):
        penultimate, pooled = their_states(their_text(config), ids)
        files["text"] |= {f"{name}.ids": ids, f"{name}.penultimate": penultimate, f"{name}.pooled": pooled}
    files["schedule"] = {"alphas_cumprod": scheduler(DDPMScheduler).alphas_cumprod.numpy()}
    for spacing in ("leading", "trailing"):
        rows = list(their_levels(timestep_spacing=spacing))
        files["schedule"] |= {
            f"{spacing}.timesteps": np.concatenate([t for t, _, _ in rows]),
            f"{spacing}.sigmas": np.concatenate([s for _, s, _ in rows]),
            f"{spacing}.initial": np.array([scale for _, _, scale in rows], np.float32),
        }
    files["schedulers"] = {str(case): their_drawing(case) for case in cases.GOLDEN_CASES}
    return files, {name: tiny.table(found) for name, found in published_shapes().items()}


def save(tensors: Mapping[str, Any], file: Path) -> Path:
    """A safetensors file as PyTorch writes it."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return file
