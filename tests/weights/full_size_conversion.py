"""Full-size SDXL through every pair of formats: sha256 of every tensor, peak memory, and seconds beside `cp`.

    python tests/weights/full_size_conversion.py FOLDER

needs PyTorch and diffusers (`pip install -e '.[dev]'`), 35 GB of disk in FOLDER and 12 GB of memory. The model is made
by diffusers and transformers with random half-precision weights (7 GB) and stays in FOLDER for the next time. Memory is
RssAnon, sampled: mapped pages do not count. Limits: 1.5 times the largest tensor plus 300 MB over what the same
interpreter takes for its imports; twice the time of a copy of the same bytes, four times into the native format.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {"diffusers": "diffusers", "single-file": "single.safetensors", "native": "native"}
MB = 1e6


@dataclass(frozen=True)
class Ran:
    """A process that ended well."""

    seconds: float
    anonymous: float
    """Most of RssAnon, in bytes."""


def run(*words: str, env: dict[str, str] | None = None) -> Ran:
    """Run to the end, and sample the memory on the way.

    Raises:
        RuntimeError: where it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})})
    most = 0
    while process.poll() is None:
        most = max(most, anonymous(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}")
    return Ran(time.perf_counter() - began, most)


def anonymous(pid: int) -> int:
    """RssAnon of a process, in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def make(folder: Path) -> None:
    """SDXL base as diffusers and transformers save it, with random weights in half precision."""
    sys.path.insert(0, str(ROOT / "tests"))
    import diffusers
    import parity_published as published
    import torch
    import transformers

    from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
    from sdxl_eqx.diffusion.schedule import ScheduleConfig
    from sdxl_eqx.weights.folder import INDEX, write_json

    lazy: Any = diffusers
    text: Any = transformers
    torch.manual_seed(0)
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    for part, kind, config in (
        ("unet", lazy.UNet2DConditionModel, published.UNET),
        ("vae", lazy.AutoencoderKL, published.VAE),
        ("text_encoder", text.CLIPTextModel, text.CLIPTextConfig(**published.TEXT)),
        ("text_encoder_2", text.CLIPTextModelWithProjection, text.CLIPTextConfig(**published.TEXT_2)),
    ):
        with torch.device("meta"):
            module = kind(**config) if isinstance(config, dict) else kind(config)
        module = module.to(torch.float16).to_empty(device="cpu")
        for value in module.state_dict().values():
            if value.dtype == torch.float16:
                # Every bit of 16 but a large exponent, so that nothing compresses and nothing is alike.
                bits = torch.randint(-(2**15), 2**15, value.shape, dtype=torch.int16)
                value.copy_((bits & ~0x4000).view(torch.float16))
        module.save_pretrained(building / part, safe_serialization=True, max_shard_size="100GB")
        del module
    write_json(ScheduleConfig().to_json(), building / "scheduler" / "scheduler_config.json")
    write_json(INDEX, building / "model_index.json")
    save_tokenizers(bundled_tokenizers(), building)
    building.rename(folder)


def sums(name: Path) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor of a model in any format."""
    import numpy as np

    from sdxl_eqx.weights.open import Source, open_model

    found = {}
    for part, tensors in open_model(Source(str(name), "FOLDER")).parts.items():
        for key, tensor in tensors.items():
            x = np.ascontiguousarray(tensor.read())
            digest = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
            digest.update(x.reshape(-1).view(np.uint8).data)
            found[f"{part}.{key}"] = digest.hexdigest()
    return found


def remove(path: Path) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> Ran:
    """The time of a plain copy that is on the disk at its end."""
    return run("sh", "-c", f"cp --reflink=never -r '{source}' '{target}' && sync -f '{target}'")


def conversions(folder: Path) -> list[dict[str, Any]]:
    """Every format to every other, beside a copy of what it read."""
    script = str(ROOT / "scripts" / "convert_weights.py")
    own = run(sys.executable, script, "--help").anonymous
    places = {name: folder / file for name, file in NAMES.items()}
    rows = []
    wanted = sums(places["diffusers"])
    largest = largest_bytes(places["diffusers"])
    for source, target in sorted(itertools.permutations(NAMES, 2), key=lambda pair: pair[0] != "diffusers"):
        first = not places[target].exists()
        to = places[target] if first else folder / f"again-{NAMES[target]}"
        remove(to)
        copied = copy(places[source], folder / "copy")
        remove(folder / "copy")
        converted = run(sys.executable, script, str(places[source]), str(to), "--to", target)
        equal = sums(to) == wanted
        if not first:
            remove(to)
        over = converted.anonymous - own
        rows.append(
            {
                "conversion": f"{source} to {target}",
                "tensors": len(wanted),
                "equal": equal,
                "seconds": round(converted.seconds, 1),
                "cp_seconds": round(copied.seconds, 1),
                "times_cp": round(converted.seconds / copied.seconds, 2),
                "limit_times_cp": 4 if target == "native" else 2,
                "peak_anonymous_mb_over_imports": round(over / MB),
                "limit_mb": round((1.5 * largest[target] + 300e6) / MB),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def largest_bytes(model: Path) -> dict[str, int]:
    """The largest array by the format that is written: the native one has the blocks of a stage in one."""
    from sdxl_eqx.weights.open import Source, open_model
    from sdxl_eqx.weights.skeletons import skeleton_places

    opened = open_model(Source(str(model), "FOLDER"))
    alone = max(tensor.nbytes for tensors in opened.parts.values() for tensor in tensors.values())
    stacked = max(
        sum(opened.parts[part][key].nbytes for key in place.keys)
        for part in opened.parts
        for place in skeleton_places(part, opened.configs[part])
    )
    return {"diffusers": alone, "single-file": alone, "native": stacked}


LOAD = """
import sys, resource, jax, jax.random as jr
from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig, ParallelConfig
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.parallel.mesh import make_mesh
config = ModelConfig(pretrained_model_name_or_path=sys.argv[1], weights_dtype="bfloat16")
parts = ModelParts.read(config, DiffusionSchedulerConfig(), token="")
mesh = make_mesh(ParallelConfig(ici_fsdp_parallelism=8), jax.devices())
unet = parts.new_unet(config, mesh, key=jr.key(0))
jax.block_until_ready(unet)
held = sum(s.data.nbytes for x in jax.tree.leaves(unet) for s in x.addressable_shards)
print("held", held, flush=True)
"""


def loading(folder: Path) -> list[dict[str, Any]]:
    """The UNet onto 8 devices that share it, from each format: memory beside what the devices hold."""
    rows = []
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    own = run(
        sys.executable, "-c", "import sys; sys.argv[1:]=['']\n" + LOAD.split("config = ")[0] + "jax.devices()", env=env
    )
    for name in NAMES:
        place = str(folder / NAMES[name])
        ran = run(sys.executable, "-c", LOAD, place, env=env)
        held = int(
            subprocess.run(
                [sys.executable, "-c", LOAD, place],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        rows.append(
            {
                "loading": f"{name} onto 8 devices, bfloat16",
                "seconds": round(ran.seconds, 1),
                "devices_hold_mb": round(held / MB),
                "peak_anonymous_mb_over_that": round((ran.anonymous - own.anonymous - held) / MB),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Make the model if it is not there, convert, compare; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("single-file", "native"):
        remove(folder / NAMES[name])
    if not (folder / NAMES["diffusers"]).exists():
        make(folder / NAMES["diffusers"])
    rows = conversions(folder)
    loading(folder)
    broken = [
        row["conversion"]
        for row in rows
        if not row["equal"]
        or row["times_cp"] > row["limit_times_cp"]
        or row["peak_anonymous_mb_over_imports"] > row["limit_mb"]
    ]
    print(f"broken: {broken}" if broken else "every limit holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
