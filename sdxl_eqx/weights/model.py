"""A model's weights under diffusers' names, whatever file they came from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.weights.tensors import Tensors

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Model:
    """A model's weights and configs; tensors are read when they are asked for."""

    parts: dict[str, Tensors]
    """Those of `PARTS` that there are."""
    configs: dict[str, dict[str, Any]]
    """Each part's JSON config, and that of `scheduler`."""
    left_out: tuple[str, ...] = ()
    """Keys of the file that have no place here."""
    tokenizers: Path | None = None
    """The folder that has the model's own tokenizers; None for SDXL's."""
    index: dict[str, Any] | None = None
    """`model_index.json`, where there is one."""

    def cast(self, dtype: np.dtype) -> "Model":
        """This model with every floating-point tensor in `dtype`."""
        parts = {part: {key: t.cast(dtype) for key, t in tensors.items()} for part, tensors in self.parts.items()}
        return replace(self, parts=parts)

    def with_part(self, part: str, other: "Model") -> "Model":
        """This model with a part of another one, and with the prediction type that the other UNet states."""
        configs = {**self.configs, part: other.configs[part]}
        stated = other.configs.get("scheduler", {}) if part == "unet" else {}
        if stated.get("prediction_type"):
            words = {key: stated[key] for key in ("prediction_type", "rescale_betas_zero_snr") if key in stated}
            configs["scheduler"] = {**self.configs.get("scheduler", {}), **words}
        return replace(
            self,
            parts={**self.parts, part: other.parts[part]},
            configs=configs,
            left_out=(*self.left_out, *other.left_out),
        )

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for tensors in self.parts.values() for t in tensors.values())
