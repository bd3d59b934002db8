"""Which sampler, with which options: diffusers' scheduler classes, and the JSON files that name them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sdxl_eqx.diffusion.schedule import ScheduleConfig, bare_name, stated

SchedulerName = Literal[
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]

NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)

ZERO_SNR = tuple(name for name in NAMES if name[:3] not in ("Heu", "LMS", "PND"))
"""The classes that diffusers gives `rescale_betas_zero_snr`; the others would drop it without a word."""

_KARRAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_MULTISTEP = {
    **_KARRAS,
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
}

OPTIONS: dict[SchedulerName, dict[str, Any]] = {
    "EulerDiscreteScheduler": {
        **_KARRAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {**_KARRAS, **_CLIP, "clip_sample": False},
    "DDIMScheduler": {**_CLIP, "set_alpha_to_one": True, "thresholding": False},
    "DDPMScheduler": {**_CLIP, "variance_type": "fixed_small", "thresholding": False},
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "LMSDiscreteScheduler": _KARRAS,
    "PNDMScheduler": {"skip_prk_steps": False, "set_alpha_to_one": False},
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": {
        **_CLIP,
        "clip_sample": False,
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_scaling": 10.0,
    },
}
"""The options that diffusers gives each class beside the schedule's, with that class's own defaults."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "lambda_min_clipped": (-float("inf"),),
    "solver_p": (None,),
    "shift_terminal": (None,),
}
"""Options that exist here with these values alone."""

_ALIASES = {
    ("DPMSolverMultistepScheduler", "algorithm_type"): {"deis": "dpmsolver++"},
    ("DPMSolverMultistepScheduler", "solver_type"): dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    ("UniPCMultistepScheduler", "solver_type"): dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
}
"""Values of a related class's file that diffusers reads as one of this class's own."""


def scheduler_name(text: str) -> SchedulerName:
    """The class that a user's word names: with or without a leading `Flax` and the last `Scheduler`.

    Raises:
        ValueError: for any other word, with the choices.
    """
    bare = bare_name(text)
    for name in NAMES:
        if bare in (name, name.removesuffix("Scheduler")):
            return name
    raise ValueError(f"scheduler {text!r} is not known; choose of {', '.join(NAMES)} (`Scheduler` may be left out).")


def _refuse(name: str, key: str, value: Any, allowed: Any) -> None:
    raise ValueError(f"{name}: {key}={value!r} is not supported; choose of {allowed}.")


@dataclass(frozen=True)
class Scheduler:
    """A sampler: one of diffusers' classes, the schedule it runs on and its options, under diffusers' names.

    The defaults are SDXL base's; `from_json` takes those of the class instead.
    """

    name: SchedulerName = "EulerDiscreteScheduler"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = False
    variance_type: str = "fixed_small"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    """midpoint or heun of DPM-Solver++, bh1 or bh2 of UniPC (which reads the others as bh2)."""
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    skip_prk_steps: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        choices = {
            "name": NAMES,
            "final_sigmas_type": ("zero", "sigma_min"),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun", "bh1", "bh2"),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
            "solver_order": (1, 2, 3),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                _refuse(self.name, key, getattr(self, key), allowed)
        if self.schedule.rescale_betas_zero_snr and self.name not in ZERO_SNR:
            raise ValueError(
                f"{self.name}: rescale_betas_zero_snr=True is not supported, so that its steps would not be those of "
                f"the model; choose of {', '.join(ZERO_SNR)}."
            )
        if self.schedule.prediction_type == "sample" and self.name == "PNDMScheduler":
            _refuse(self.name, "prediction_type", "sample", ("epsilon", "v_prediction"))

    @classmethod
    def from_json(cls, config: Mapping[str, Any], class_name: str = "") -> "Scheduler":
        """Read `scheduler_config.json`; `class_name` samples with another class than the file's (Euler without any).

        As in diffusers, keys that a class does not have are passed over, and a key that the file lacks takes the
        default of the class that samples.

        Raises:
            ValueError: for a class, an option or a value that is not supported, with the choices.
        """
        name = scheduler_name(class_name or config.get("_class_name") or "EulerDiscreteScheduler")
        said = stated(config)
        found: dict[str, Any] = {}
        for key, default in OPTIONS[name].items():
            value = said.get(key, default)
            value = _ALIASES.get((name, key), {}).get(value, value) if isinstance(value, str) else value
            if key in _ONLY:
                if value not in _ONLY[key]:
                    _refuse(name, key, value, _ONLY[key])
                continue
            found[key] = _typed(name, key, value, default)
        return cls(name=name, schedule=ScheduleConfig.from_json({**said, "_class_name": name}), **found)


def _typed(name: str, key: str, value: Any, default: Any) -> Any:
    """A value of the file as the field takes it."""
    if key == "disable_corrector":
        return tuple(value)
    if key == "variance_type" and default is None:  # DPM-Solver++ heeds it for models that predict their variance
        if value in ("learned", "learned_range"):
            _refuse(name, key, value, (None,))
        return "fixed_small"
    if default is None:
        return None if value is None else float(value)
    value = bool(value) if isinstance(default, bool) and value is None else value
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if type(value) is not type(default):
        _refuse(name, key, value, f"values such as {default!r}")
    return value
