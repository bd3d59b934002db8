"""How two pictures were made, and what A1111's text of the second is."""

from typing import Any

from sdxl_eqx.sampling.parameters import ControlNetUse, Parameters

PLAIN = Parameters("a cat", "", 20, "EulerAncestralDiscreteScheduler", 7.0, 1, 1024, 768, version="")
FULL = Parameters(
    prompt="a cat, on a mat",
    negative_prompt="dog: brown\nbad",
    steps=30,
    sampler="DPMSolverMultistepScheduler",
    algorithm_type="sde-dpmsolver++",
    schedule_type="Karras",
    guidance_scale=6.5,
    seed=42,
    width=832,
    height=1216,
    prompt_2="oil, thick",
    guidance_rescale=0.7,
    model="sd_xl_base_1.0",
    model_hash="31e35c80fc",
    vae="sdxl_vae.safetensors",
    loras=(("pixel-art", 0.8), ("ink", 1.0)),
    controlnets=(ControlNetUse("canny-sdxl", "canny", 0.5, 0.0, 0.75),),
    denoising_strength=0.4,
    refiner="sd_xl_refiner_1.0",
    refiner_switch_at=0.8,
    version="sdxl_eqx 0.1.0",
)
SAID = (
    "a cat, on a mat <lora:pixel-art:0.8><lora:ink:1>\n"
    "Negative prompt: dog: brown\nbad\n"
    "Steps: 30, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 832x1216, "
    "Model hash: 31e35c80fc, Model: sd_xl_base_1.0, VAE: sdxl_vae.safetensors, Denoising strength: 0.4, "
    "CFG rescale: 0.7, Refiner: sd_xl_refiner_1.0, Refiner switch at: 0.8, "
    'ControlNet 0: "Module: canny, Model: canny-sdxl, Weight: 0.5, Guidance Start: 0, Guidance End: 0.75", '
    'Prompt 2: "oil, thick", Version: sdxl_eqx 0.1.0'
)


def changed(parameters: Parameters, **changes: Any) -> Parameters:
    """Parameters of which some are others."""
    return Parameters(**{**parameters.__dict__, **changes})
