"""How `scheduler_config.json` is read: names, each class's own defaults, and what is refused."""

import re
from typing import Any

import pytest

from sdxl_eqx.config.shared import SCHEDULERS
from sdxl_eqx.sampling.schedulers.scheduler import NAMES, Scheduler, scheduler_name

SDXL_FILE: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""SDXL base's."""


def test_sdxls_file_is_the_default():
    assert Scheduler.from_json(SDXL_FILE) == Scheduler()
    assert hash(Scheduler.from_json(SDXL_FILE)) == hash(Scheduler())


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_named_with_and_without_flax_and_scheduler(name: str):
    bare = name.removesuffix("Scheduler")
    assert {scheduler_name(word) for word in (name, bare, f"Flax{name}", f"Flax{bare}")} == {name}
    read = Scheduler.from_json(SDXL_FILE, class_name=bare)
    assert read.name == name
    assert (read.schedule.timestep_spacing, read.schedule.steps_offset) == ("leading", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_spacing_is_that_of_the_class_that_samples(name: str):
    file = {key: value for key, value in SDXL_FILE.items() if key != "timestep_spacing"}
    leading = name[:4] in ("DDIM", "DDPM", "PNDM", "LCMS")
    read = Scheduler.from_json(file, class_name=name)
    assert read.schedule.timestep_spacing == ("leading" if leading else "linspace")


def test_what_diffusers_marks_as_a_default_is_none_of_the_files_own_words():
    file = {**SDXL_FILE, "_use_default_values": ["timestep_spacing", "clip_sample"]}
    read = Scheduler.from_json(file, class_name="DDIM")
    assert read.clip_sample
    assert Scheduler.from_json(file).schedule.timestep_spacing == "linspace"


def test_the_option_of_another_class_is_passed_over():
    assert not Scheduler.from_json({**SDXL_FILE, "use_karras_sigmas": True}, class_name="DDIM").use_karras_sigmas
    assert Scheduler.from_json({**SDXL_FILE, "use_karras_sigmas": True}).use_karras_sigmas
    assert Scheduler.from_json({**SDXL_FILE, "thresholding": True}).name == NAMES[0]


def test_related_classes_words_for_a_solver_are_understood():
    assert Scheduler.from_json({**SDXL_FILE, "solver_type": "bh2"}, "DPMSolverMultistep").solver_type == "midpoint"
    assert Scheduler.from_json({**SDXL_FILE, "solver_type": "heun"}, "UniPCMultistep").solver_type == "bh2"
    assert Scheduler.from_json({**SDXL_FILE, "variance_type": "fixed_small"}, "DPMSolverMultistep").solver_order == 2


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("DDIM", "thresholding", True),
        ("EulerDiscrete", "use_exponential_sigmas", True),
        ("DPMSolverMultistep", "use_beta_sigmas", True),
        ("DPMSolverMultistep", "use_lu_lambdas", True),
        ("DPMSolverMultistep", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistep", "solver_order", 4),
        ("DPMSolverMultistep", "variance_type", "learned"),
        ("DPMSolverMultistep", "lambda_min_clipped", -5.1),
        ("DDPM", "variance_type", "learned_range"),
        ("UniPCMultistep", "use_flow_sigmas", True),
        ("UniPCMultistep", "solver_type", "bh3"),
        ("EulerDiscrete", "interpolation_type", "log_linear"),
        ("EulerDiscrete", "timestep_type", "continuous"),
        ("EulerDiscrete", "final_sigmas_type", "one"),
        ("EulerDiscrete", "use_karras_sigmas", "yes"),
        ("DDIM", "trained_betas", [0.1]),
        ("DDIM", "beta_schedule", "squaredcos_cap_v2"),
        ("DDIM", "timestep_spacing", "even"),
        ("DDIM", "prediction_type", "flow_prediction"),
        ("PNDM", "prediction_type", "sample"),
        ("HeunDiscrete", "rescale_betas_zero_snr", True),
        ("LMSDiscrete", "rescale_betas_zero_snr", True),
        ("PNDM", "rescale_betas_zero_snr", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_value(name: str, key: str, value: Any):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
        Scheduler.from_json({**SDXL_FILE, key: value}, class_name=name)


def test_an_unknown_class_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'Euler'.*EulerDiscreteScheduler.*LCMScheduler"):
        Scheduler.from_json(SDXL_FILE, class_name="Euler")
    with pytest.raises(ValueError, match="TCDScheduler"):
        Scheduler.from_json({**SDXL_FILE, "_class_name": "TCDScheduler"})


def test_the_flags_know_the_samplers_that_there_are():
    assert SCHEDULERS == NAMES
