"""How a picture was made, in the words of AUTOMATIC1111's web UI.

Its form is that of `create_infotext` (modules/processing.py) and `parse_generation_parameters`
(modules/infotext_utils.py) of version 1.10; ControlNets are written as sd-webui-controlnet writes them, and
guidance_rescale as SD.Next does.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdxl_eqx import __version__

SAMPLERS = {
    ("EulerDiscreteScheduler", ""): "Euler",
    ("EulerAncestralDiscreteScheduler", ""): "Euler a",
    ("HeunDiscreteScheduler", ""): "Heun",
    ("LMSDiscreteScheduler", ""): "LMS",
    ("KDPM2DiscreteScheduler", ""): "DPM2",
    ("KDPM2AncestralDiscreteScheduler", ""): "DPM2 a",
    ("DPMSolverMultistepScheduler", ""): "DPM++ 2M",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++"): "DPM++ 2M SDE",
    ("DPMSolverSDEScheduler", ""): "DPM++ SDE",
    ("DDIMScheduler", ""): "DDIM",
    ("PNDMScheduler", ""): "PLMS",
    ("UniPCMultistepScheduler", ""): "UniPC",
    ("LCMScheduler", ""): "LCM",
    ("DDPMScheduler", ""): "DDPM",
    ("TCDScheduler", ""): "TCD",
}
"""A1111's name of diffusers' class and algorithm_type ('' for the default); others keep the class's name."""

SCHEDULES = ("Karras", "Exponential", "SGM Uniform", "Beta")
"""A1111's names of schedules that older files hold at the end of the sampler's name."""

Text = tuple[tuple[str, str], ...]

_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:([^:>\n]+):([-+.\d]+(?:e[-+]?\d+)?)[^>\n]*>")


@dataclass(frozen=True)
class ControlNetUse:
    """A ControlNet that helped to draw a picture; `start` and `end` are shares of the steps."""

    model: str
    module: str = "none"
    """What made its picture: 'canny', or 'none' where it came as it is."""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Parameters:
    """How a picture was made. What is '' or None is not written.

    Names of LoRAs, ControlNets and models are those without folder and suffix, by which the web UIs find them.
    """

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    """diffusers' class."""
    guidance_scale: float
    seed: int
    width: int
    height: int
    algorithm_type: str = ""
    """Of DPMSolverMultistepScheduler, where it is not dpmsolver++."""
    schedule_type: str = "Automatic"
    """As `schedule_type` gives it."""
    prompt_2: str = ""
    """Of the second text encoder, where it has its own."""
    guidance_rescale: float = 0.0
    model: str = ""
    model_hash: str = ""
    """The first 10 digits of the file's sha256, as A1111 has it."""
    vae: str = ""
    loras: tuple[tuple[str, float], ...] = ()
    controlnets: tuple[ControlNetUse, ...] = ()
    denoising_strength: float | None = None
    refiner: str = ""
    refiner_switch_at: float | None = None
    """The share of the steps before the refiner."""
    others: Text = ()
    """Keys that are not among the above, and their values."""
    version: str = f"sdxl_eqx {__version__}"
    """Not a number alone: A1111 would take it for its own version, and would sample as that one did."""


def schedule_type(
    timestep_spacing: str,
    *,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
) -> str:
    """A1111's name of the noise levels that diffusers' options give; 'Automatic' where it has none that is theirs."""
    if use_karras_sigmas:
        return "Karras"
    if use_exponential_sigmas:
        return "Exponential"
    if use_beta_sigmas:
        return "Beta"
    return {"trailing": "SGM Uniform", "linspace": "Uniform"}.get(timestep_spacing, "Automatic")


def write_parameters(parameters: Parameters) -> str:
    """The text of A1111 for a picture; `parse_parameters` reads it back.

    What cannot be said in that form changes: lines of the prompts lose the spaces around them, and the characters
    that end a LoRA's or ControlNet's name become `_`.
    """
    p = parameters
    tags = "".join(f"<lora:{_plain(name)}:{_number(weight)}>" for name, weight in p.loras)
    lines = [" ".join(part for part in (p.prompt, tags) if part)]
    if p.negative_prompt:
        lines.append(f"Negative prompt: {p.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in _fields(p)))
    return "\n".join(lines).strip()


def parse_parameters(text: str) -> Parameters:
    """What such a text says, A1111's own included; what it lacks is '', 0 or None.

    Raises:
        ValueError: it has no line of settings, or one of them is no number where one must be.
    """
    *lines, last = text.strip().split("\n")
    found = {key: _unquoted(value) for key, value in _FIELD.findall(last)}
    if len(found) < 3:  # as A1111 tells settings from a prompt
        raise ValueError(f"{last[:80]!r} is no line of settings; it must be like 'Steps: 20, Sampler: Euler, Seed: 1'")
    prompt, negative = _prompts(lines)
    loras = tuple((name, float(weight)) for name, weight in _LORA.findall(prompt))
    sampler, algorithm, schedule = _sampler(found.pop("Sampler", ""), found.pop("Schedule type", ""))
    width, _, height = found.pop("Size", "0x0").partition("x")
    try:
        return Parameters(
            prompt=_LORA.sub("", prompt).strip() if loras else prompt,
            negative_prompt=negative,
            steps=int(found.pop("Steps", 0)),
            sampler=sampler,
            guidance_scale=float(found.pop("CFG scale", 0)),
            seed=int(found.pop("Seed", 0)),
            width=int(width),
            height=int(height),
            algorithm_type=algorithm,
            schedule_type=schedule,
            prompt_2=found.pop("Prompt 2", ""),
            guidance_rescale=float(found.pop("CFG rescale", 0)),
            model=found.pop("Model", ""),
            model_hash=found.pop("Model hash", ""),
            vae=found.pop("VAE", ""),
            loras=loras,
            controlnets=tuple(_controlnets(found)),
            denoising_strength=_optional(found.pop("Denoising strength", "")),
            refiner=found.pop("Refiner", ""),
            refiner_switch_at=_optional(found.pop("Refiner switch at", "")),
            version=found.pop("Version", ""),
            others=tuple(found.items()),
        )
    except ValueError as error:
        raise ValueError(f"a setting of {last[:200]!r} is no number ({error})") from error


def _fields(p: Parameters) -> Iterator[tuple[str, str]]:
    """The settings in A1111's order."""
    fields: list[tuple[str, Any]] = [
        ("Steps", p.steps),
        ("Sampler", SAMPLERS.get((p.sampler, p.algorithm_type), f"{p.sampler} {p.algorithm_type}".strip())),
        ("Schedule type", p.schedule_type),
        ("CFG scale", p.guidance_scale),
        ("Seed", p.seed),
        ("Size", f"{p.width}x{p.height}"),
        ("Model hash", p.model_hash),
        ("Model", p.model),
        ("VAE", p.vae),
        ("Denoising strength", p.denoising_strength),
        ("CFG rescale", p.guidance_rescale or None),
        ("Refiner", p.refiner),
        ("Refiner switch at", p.refiner_switch_at),
        *((f"ControlNet {i}", _unit(use)) for i, use in enumerate(p.controlnets)),
        ("Prompt 2", p.prompt_2),
        *p.others,
        ("Version", p.version),
    ]
    for key, value in fields:
        if value is not None and value != "":
            yield key, value if isinstance(value, str) else _number(value)


def _number(value: int | float) -> str:
    """A number as people write it: 7, not 7.0."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _plain(name: str) -> str:
    """A name without the characters that end it."""
    return re.sub(r"[<>:,\n]", "_", name)


def _unit(use: ControlNetUse) -> str:
    weight, start, end = (_number(value) for value in (use.weight, use.start, use.end))
    module, model = _plain(use.module), _plain(use.model)
    return f"Module: {module}, Model: {model}, Weight: {weight}, Guidance Start: {start}, Guidance End: {end}"


def _controlnets(found: dict[str, str]) -> Iterator[ControlNetUse]:
    """The ControlNets among settings, which are taken out of them."""
    for key in [key for key in found if re.fullmatch(r"ControlNet \d+", key)]:
        unit: dict[str, str] = {}
        for part in found.pop(key).split(", "):
            name, _, value = part.partition(": ")
            unit[name] = value
        numbers = (float(unit.get(name, value)) for name, value in
                   (("Weight", 1), ("Guidance Start", 0), ("Guidance End", 1)))  # fmt: skip
        yield ControlNetUse(unit.get("Model", ""), unit.get("Module", "none"), *numbers)


def _quoted(value: str) -> str:
    """A value that ends where it should: what holds a comma, colon or newline as a JSON string.

    A1111 quotes no more than that; the rest here would come back changed, and it reads it as well.
    """
    plain = not re.search(r"[,:\r\n]", value) and value == value.strip() and not value.startswith('"')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value  # quotation marks of the value itself, as A1111 takes them


def _prompts(lines: list[str]) -> tuple[str, str]:
    """(prompt, negative prompt) of the lines before the settings."""
    prompt, negative = "", None
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            line = line.removeprefix("Negative prompt:").strip()
            negative = negative or ""
        if negative is not None:
            negative += f"\n{line}" if negative else line
        else:
            prompt += f"\n{line}" if prompt else line
    return prompt, negative or ""


def _sampler(name: str, schedule: str) -> tuple[str, str, str]:
    """(diffusers' class, algorithm_type, schedule) of A1111's names, the older ones included ('DPM++ 2M Karras')."""
    for suffix in SCHEDULES:
        if not schedule and name.endswith(f" {suffix}"):
            name, schedule = name.removesuffix(f" {suffix}"), suffix
    known = {theirs: ours for ours, theirs in SAMPLERS.items()}
    sampler, algorithm = known.get(name, (name, ""))
    return sampler, algorithm, schedule or "Automatic"


def _optional(value: str) -> float | None:
    return float(value) if value else None
