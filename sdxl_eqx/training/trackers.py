"""Weights & Biases, beside TensorBoard, for who asks for it and has it installed."""

import hashlib
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.config import MetricsConfig

log = logging.getLogger("sdxl_eqx")

PROJECT = "sdxl_eqx"


def check_tracker(config: MetricsConfig) -> None:
    """Check that the package of --tracker is there, before anything is loaded.

    Raises:
        ValueError: where it is not.
    """
    if config.tracker == "wandb" and config.write_metrics:
        _wandb()


def open_tracker(
    config: MetricsConfig, *, folder: Path, run_name: str, place: str, flags: Mapping[str, Any]
) -> "Wandb | None":
    """The tracker that is asked for, or None; by the first process alone.

    `place`: the whole path of the run, which tells it from others of its name; `flags`: shown as its config.

    Raises:
        ValueError: where it cannot be begun.
    """
    if config.tracker != "wandb" or not config.write_metrics:
        return None
    return Wandb(folder=folder, run_name=run_name, place=place, flags=flags)


class Wandb:
    """A run of Weights & Biases, which goes on when the run is resumed.

    What fails there is said once, and training goes on.
    """

    def __init__(self, *, folder: Path, run_name: str, place: str, flags: Mapping[str, Any]):
        self._module = _wandb()
        # The same for a run that is resumed from the same place, another for another run of that name.
        identity = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        config = {name: value for name, value in flags.items() if not name.endswith("_token")}
        try:
            self._run = self._module.init(
                project=PROJECT, name=run_name, id=identity, resume="allow", dir=str(folder), config=config
            )
            # Of a step that a resumed run takes again the last value counts, and evaluations come after their step:
            # wandb's own step only rises.
            self._run.define_metric("train/step")
            self._run.define_metric("*", step_metric="train/step")
        except Exception as error:  # of the network, its server or its login, without a common class
            raise ValueError(
                f"--tracker wandb: {type(error).__name__}: {error}; log in with `wandb login`, set WANDB_MODE=offline, "
                "or leave it out."
            ) from error
        self._fails = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step."""
        self._log({**values, "train/step": step})

    def text(self, name: str, value: str) -> None:
        """Nothing: of texts there is the config alone, which it has already as values."""

    def picture(self, name: str, picture: Any, step: int) -> None:
        """A picture `[H, W, 3]` from 0 to 255."""
        self._log({name: self._module.Image(np.asarray(picture)), "train/step": step})

    def close(self) -> None:
        """Send what is left, and wait for it."""
        try:
            self._run.finish()
        except Exception as error:  # as above
            log.error("--tracker wandb: %s: %s", type(error).__name__, error)

    def _log(self, values: Mapping[str, Any]) -> None:
        try:
            self._run.log(dict(values))
        except Exception as error:  # as above
            if not self._fails:
                log.error("--tracker wandb: %s: %s", type(error).__name__, error)
            self._fails = True


def _wandb() -> Any:
    """The package, which is imported only where it is asked for.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"--tracker wandb: its package is not installed ({error}); install it: pip install 'sdxl-eqx[wandb]'."
        ) from error
