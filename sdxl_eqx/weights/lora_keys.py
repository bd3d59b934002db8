"""What the keys and the metadata of LoRA files mean, in every format people use.

Sources: kohya-ss/sd-scripts `networks/lora.py`, diffusers `loaders/lora_conversion_utils.py` and
`utils/state_dict_utils.py`, PEFT `LoraConfig`, ComfyUI `lora.py`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.weights import ldm
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.read import read_json
from sdxl_eqx.weights.tensors import Tensors

Role = Literal["down", "up", "alpha", "magnitude"]

ADAPTER_METADATA = "lora_adapter_metadata"
"""Key of the file's metadata under which diffusers and PEFT keep the adapter's config, as JSON."""

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
"""kohya's prefix of each part that a LoRA can change."""

COMFY = {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."}
"""ComfyUI's own prefixes; the UNet's is `diffusion_model.`, before Stability AI's names."""

_OLD = r"(?:\.lora_linear_layer|\.lora|_lora)"
_ROLES: dict[Role, str] = {
    "down": rf"(?:\.lora_down|\.lora_A(?:\.[^.]+)?|{_OLD}\.down)\.weight",
    "up": rf"(?:\.lora_up|\.lora_B(?:\.[^.]+)?|{_OLD}\.up)\.weight",
    "alpha": rf"{_OLD}?(?:\.down\.weight)?\.alpha",
    "magnitude": r"(?:\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)",
}
_ENDINGS: dict[Role, re.Pattern[str]] = {role: re.compile(f"(.+?){ending}") for role, ending in _ROLES.items()}

_OTHER_METHOD = "merge it into the model in the program that made it, or train a plain LoRA"
_REFUSED = tuple(
    (re.compile(pattern), what, remedy)
    for pattern, what, remedy in (
        (r"\.hada_", "a LoHa (LyCORIS)", _OTHER_METHOD),
        (r"\.lokr_", "a LoKr (LyCORIS)", _OTHER_METHOD),
        (r"\.b?oft_", "an OFT (orthogonal finetuning)", _OTHER_METHOD),
        (r"\.(?:a1|a2|b1|b2)\.weight$|\.on_input$", "a GLoRA or IA3 (LyCORIS)", _OTHER_METHOD),
        (r"\.lora_mid\.", "a LoCon with lora_mid (Tucker decomposition)", "train it without use_tucker / use_cp"),
        (r"\.(?:diff|diff_b|set_weight)$", "a LoRA with whole weights beside it (.diff)", _OTHER_METHOD),
        (r"\.lora_[AB](?:\.[^.]+)?\.bias$", "a LoRA with biases", "train it with lora_bias=False"),
        (r"^lllite_", "a ControlNet-LLLite", "it is no LoRA; use it in the program that it is for"),
        (r"^lora_controlnet$", "a Control-LoRA", "it is no LoRA of the UNet; use a ControlNet"),
        (r"string_to_param|^emb_params$|^clip_[lg]$|^bundle_emb\.", "a textual inversion", "give a file of LoRA alone"),
        (
            r"(?:^|[._])(?:double_blocks|single_blocks|joint_blocks|single_transformer_blocks)[._]|"
            r"^(?:lora_)?transformer[._]|^lora_te3_|^text_encoder_3\.|^lora_prior_",
            "a LoRA of Flux, Stable Diffusion 3 or another model with a transformer",
            "give a LoRA of SDXL",
        ),
        (r"^lora_te_", "a LoRA of Stable Diffusion 1 or 2 (lora_te_)", "give a LoRA of SDXL"),
    )
)
"""(pattern of a key, what a file with it is, the remedy)."""

_CROSS = re.compile(r".*attn2[._](?:processor\.)?to_[kv]")
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}


def role(key: str) -> tuple[str, Role] | None:
    """(name of the module as the file spells it, which of its tensors); None for what is no key of a LoRA."""
    for which, ending in _ENDINGS.items():
        if match := ending.fullmatch(key):
            return match[1], which
    return None


def kohya_name(module: str, unet: UNetConfig) -> str:
    """kohya's name of a `part.path`: the UNet's are of Stability AI's layout, on which its scripts train SDXL."""
    part, _, path = module.partition(".")
    path = _ldm_path(path, unet) if part == "unet" else path
    return KOHYA[part] + path.replace(".", "_")


def _ldm_path(path: str, unet: UNetConfig) -> str:
    return ldm.rename(ldm.unet_rules(unet), to_file=True)(f"{path}.").removesuffix(".")


def module_names(model: Model) -> dict[str, str]:
    """The `part.path` of every name that files give the modules of UNet and text encoders that have a matrix.

    kohya joins words with the underscore that they hold themselves, so a name can be looked up but not taken apart.
    """
    names: dict[str, str] = {}
    for part in KOHYA:
        if part not in model.parts:
            continue
        rename = str
        if part == "unet":
            rename = ldm.rename(ldm.unet_rules(UNetConfig.from_json(model.configs["unet"])), to_file=True)
        for key, tensor in model.parts[part].items():
            if not key.endswith(".weight") or len(tensor.shape) < 2 or ".embeddings." in key:
                continue
            path = key.removesuffix(".weight")
            for name in _spellings(part, path, rename(f"{path}.").removesuffix(".")):
                if names.setdefault(name, f"{part}.{path}") != f"{part}.{path}":
                    raise AssertionError(f"{name} could be {names[name]} and {part}.{path}")
    return names


def _spellings(part: str, path: str, other: str) -> set[str]:
    """The names of a module; `other` is its path in Stability AI's layout."""
    found = {KOHYA[part] + p.replace(".", "_") for p in (path, other)}
    if part == "unet":
        # Before PEFT, diffusers' own layers stood in the attention's place and had no dropout beside the matrix.
        paths = {path, path.removesuffix(".0") if path.endswith(".to_out.0") else path}
        return found | {f"unet.{p}" for p in paths} | paths | {f"diffusion_model.{other}"}
    parent, _, last = path.rpartition(".")
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last)
    paths = {path, f"{parent}.{old}"} if old else {path}
    # transformers 5 saves the first encoder without `text_model.`.
    paths |= {p.removeprefix("text_model.") for p in paths}
    return found | {f"{part}.{p}" for p in paths} | {COMFY[part] + path}


def modules(tensors: Tensors, model: Model, file: Path) -> dict[str, dict[Role, str]]:
    """The keys of each module of `model` that a file has a LoRA of.

    Raises:
        ValueError: for what is no LoRA of that model, saying what it is instead as far as can be seen.
    """
    _refuse(tensors, model, file)
    names = module_names(model)
    found: dict[str, dict[Role, str]] = {}
    absent: dict[str, str] = {}
    unknown = []
    for key in tensors:
        split = role(key)
        # PEFT's wrapper and diffusers' attention processors once had a place in the path.
        stem = re.sub(r"(^|\.)base_model\.model\.", r"\1", split[0]).replace(".processor.", ".") if split else ""
        if split is None or stem not in names:
            part = next((p for p in KOHYA if stem.startswith((KOHYA[p], f"{p}.", COMFY.get(p, f"{p}.")))), "")
            if part and part not in model.parts:
                absent[part] = key
            unknown.append(split[0] if split else key)
            continue
        keys = found.setdefault(names[stem], {})
        if split[1] in keys:
            raise ValueError(
                f"{file}: {names[stem]} is there twice, as {keys[split[1]]} and as {key}; "
                "the file was put together from two, of which one must go."
            )
        keys[split[1]] = key
    for part, key in absent.items():
        raise ValueError(
            f"{file}: changes {part} ({key}), the model has only {', '.join(sorted(model.parts))}; "
            "give the whole model, as a folder or a single file."
        )
    if unknown:
        shown = _list(list(dict.fromkeys(unknown)))
        raise ValueError(f"{file}: {shown}: no modules of this model; give a LoRA that was trained on it.")
    halves = [key for keys in found.values() if not {"down", "up"} <= keys.keys() for key in keys.values()]
    if halves:
        raise ValueError(
            f"{file}: {_list(halves)}: of modules that lack down or up; the file is incomplete, fetch it again."
        )
    return found


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} of its names ({', '.join(keys[:5])}{more})"


def _refuse(tensors: Tensors, model: Model, file: Path) -> None:
    """Raise for a file that is something else than a LoRA of SDXL."""
    for pattern, what, remedy in _REFUSED:
        key = next((key for key in tensors if pattern.search(key)), None)
        if key is not None:
            raise ValueError(f"{file}: {what}, by its key {key}; {remedy}.")
    width = UNetConfig.from_json(model.configs["unet"]).cross_attention_dim if "unet" in model.parts else None
    lora = False
    for key, tensor in tensors.items():
        split = role(key)
        lora = lora or (split is not None and split[1] in ("down", "up"))
        if split is None or split[1] != "down" or not _CROSS.fullmatch(split[0]) or len(tensor.shape) < 2:
            continue
        if width not in (None, tensor.shape[1]) and tensor.shape[1] in _WIDTHS:
            raise ValueError(
                f"{file}: a LoRA of {_WIDTHS[tensor.shape[1]]}: {key} reads text of width {tensor.shape[1]}, "
                f"this model's is {width}; give a LoRA of SDXL."
            )
    if not lora:
        whole = any(key.startswith(("model.diffusion_model.", "conv_in.", "input_blocks.")) for key in tensors)
        what = "a whole model" if whole else f"its first is {next(iter(tensors))}" if tensors else "it is empty"
        raise ValueError(f"{file}: no key of a LoRA in it ({what}); give a LoRA file.")


@dataclass(frozen=True)
class AdapterConfig:
    """What of PEFT's `LoraConfig` says how strong a LoRA is, with that class's defaults."""

    r: float = 8.0
    lora_alpha: float = 8.0
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "AdapterConfig":
        """Read PEFT's config, whose other fields matter only to training.

        Raises:
            ValueError: for values of another kind, and for what a LoRA file alone cannot say.
        """
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise ValueError(
                f"init_lora_weights={init!r} has changed the model under the LoRA; save it in PEFT with "
                "path_initial_model_for_weight_conversion."
            )
        found: dict[str, Any] = {"use_rslora": bool(config.get("use_rslora"))}
        for name in ("r", "lora_alpha"):
            if config.get(name) is not None:
                found[name] = _number(config[name], name)
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(name) or {}
            if not isinstance(patterns, dict):
                raise ValueError(f"{name} must be numbers by pattern, is {str(patterns)[:80]}.")
            found[name] = {pattern: _number(value, name) for pattern, value in patterns.items()}
        return cls(**found)

    def alpha(self, path: str, rank: int) -> float:
        """Alpha, as divided by the rank, of the module at a path.

        Raises:
            ValueError: where the config is of another rank, or of no strength.
        """
        wanted = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        if wanted != rank or alpha == 0:
            raise ValueError(
                f"rank {rank}, and the metadata say rank {wanted:g} and alpha {alpha:g}; "
                "the ranks must be equal and alpha not 0: save the file again."
            )
        return alpha * rank**0.5 if self.use_rslora else alpha


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"{name} must be a number, is {str(value)[:80]}.")
    return float(value)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that fits, as PEFT's `get_pattern_key` has it: a regex of the end of a path.

    Text encoders' patterns may be without `text_model.`, as transformers 5 names their modules.
    """
    for name in dict.fromkeys((path, path.removeprefix("text_model."))):
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"the metadata's pattern {pattern!r} is no regular expression ({error}).") from None
    return default


def adapter_configs(tensors: Tensors, metadata: Mapping[str, str], file: Path) -> dict[str, AdapterConfig]:
    """Each part's config, from the file's metadata or from the `adapter_config.json` that PEFT saves beside it.

    Raises:
        ValueError: where it cannot be read.
    """
    raw: Any = {}
    if ADAPTER_METADATA in metadata:
        try:
            raw = json.loads(metadata[ADAPTER_METADATA])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: its metadata {ADAPTER_METADATA} is not JSON ({error}).") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: its metadata {ADAPTER_METADATA} must be a JSON object.")
    elif any(key.startswith("base_model.model.") for key in tensors):
        beside = file.with_name("adapter_config.json")
        raw = read_json(beside) if beside.is_file() else {}
    found = {}
    for part in KOHYA:
        own = {key.removeprefix(f"{part}."): v for key, v in raw.items() if key.startswith(f"{part}.")}
        # A UNet saved alone has neither its keys nor its metadata prefixed.
        own = own or (raw if part == "unet" and ("r" in raw or "lora_alpha" in raw) else {})
        if own:
            try:
                found[part] = AdapterConfig.from_json(own)
            except ValueError as error:
                raise ValueError(f"{file}: the adapter's config of {part}: {error}") from None
    return found
