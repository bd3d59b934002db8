"""Held-out loss over a short training on real pictures: plain, with min-SNR weights, and of the moving average.

    python tests/training/learning_curves.py FOLDER OUTPUT

FOLDER is that of `tests/data/real_sets.py`, which fetches the 1,852 emoji and writes them as an image folder. Each run
is of scripts/train.py, one after the other, on the CPU, and is stopped after some minutes where it is not done. The
runs, their logs and learning_curves.png lie in OUTPUT; what was run there before is not run again. It ends with exit
code 1 where a run fails or its held-out loss does not fall.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH = 16
SIZE = (960, 600)
"""(width, height) of the plot in pixels."""

BOX = (80, 50, 930, 540)
"""(left, top, right, bottom) of its axes."""


@dataclass(frozen=True)
class Curve:
    """A run, and which of its held-out losses is drawn."""

    name: str
    flags: tuple[str, ...]
    metric: str
    color: str


CURVES = (
    Curve("plain", (), "eval/loss", "#1f77b4"),
    Curve("min-SNR", ("--snr-gamma", "5"), "eval/loss", "#d62728"),
    Curve("EMA", ("--ema-decay", "0.99"), "eval/loss_ema", "#2ca02c"),
)
"""The held-out loss is without weights of timesteps, so that all of them measure the same."""

Points = Sequence[tuple[int, float]]
"""Steps, and the loss after each."""


def train(curve: Curve, pictures: Path, output: Path, *, steps: int, every: int, minutes: float) -> Path:
    """Run to the end, or until the time is over, and return the run's folder.

    Raises:
        RuntimeError: the run fails.
    """
    folder, log = output / curve.name, output / f"{curve.name}.log"
    words = [
        sys.executable, "scripts/train.py", "--run-name", curve.name, "--output-dir", str(output),
        "--pretrained-model-name-or-path", "asset:tiny-sdxl", "--train-new-unet", "--new-text-encoders",
        "--activations-dtype", "float32", "--train-data-dir", str(pictures), "--resolution", "64",
        "--dataset-save-location", str(output / "cache"), "--jax-cache-dir", str(output / "compiled"),
        "--per-device-batch-size", str(BATCH), "--max-train-steps", str(steps), "--learning-rate", "1e-3",
        "--warmup-steps-fraction", "0.02", "--opt-enable-grad-global-norm-clipping", "--samples-per-grid", "0",
        "--eval-split", "0.1", "--eval-every", str(every * BATCH), *curve.flags,
    ]  # fmt: skip
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file, subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file) as process:
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves, and can be gone on with
            code = process.wait(120)
    if code not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"{curve.name}: exit code {code}; see {log}")
    return folder


def read(file: Path, metric: str) -> Points:
    """What a run's metrics say of one of them."""
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(record["step"], float(record[metric])) for record in records if metric in record]


def draw(curves: Sequence[tuple[Curve, Points]], file: Path, title: str) -> None:
    """All curves in one picture, both axes from their least to their largest value."""
    picture, font = Image.new("RGB", SIZE, "white"), ImageFont.load_default(16)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = BOX
    steps, losses = zip(*(point for _, points in curves for point in points), strict=True)
    low, high, last = min(losses), max(losses), max(steps)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (loss - low) / (high - low) * (bottom - top)

    pen.rectangle(BOX, outline="black")
    pen.text((left, 18), title, fill="black", font=font)
    for i in range(6):
        step, loss = last * i / 5, low + (high - low) * i / 5
        x, y = place(step, loss)
        pen.line((left, y, right, y), fill="#dddddd")
        pen.text((left - 8, y), f"{loss:.3f}", fill="black", font=font, anchor="rm")
        pen.text((x, bottom + 8), f"{step:.0f}", fill="black", font=font, anchor="mt")
    for i, (curve, points) in enumerate(curves):
        places = [place(*point) for point in points]
        pen.line(places, fill=curve.color, width=3)
        for x, y in places:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=curve.color)
        text = f"{curve.name}: {points[-1][1]:.4f} after step {points[-1][0]}"
        pen.text((right - 16, top + 20 + 24 * i), text, fill=curve.color, font=font, anchor="rm")
    pen.text(((left + right) / 2, SIZE[1] - 22), "step", fill="black", font=font, anchor="mm")
    picture.save(file)


def main() -> int:
    """All runs and the picture of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each run at most")
    asked = parser.parse_args()
    pictures, output = asked.folder.absolute() / "emoji-imagefolder", asked.output.absolute()
    if not pictures.is_dir():
        parser.error(f"{pictures}: not there; python tests/data/real_sets.py {asked.folder} makes it")
    output.mkdir(parents=True, exist_ok=True)
    curves: list[tuple[Curve, Points]] = []
    for curve in CURVES:
        run = train(curve, pictures, output, steps=asked.steps, every=asked.every, minutes=asked.minutes)
        points = read(run / "metrics.jsonl", curve.metric)
        curves.append((curve, points))
        print(f"{curve.name}: " + ", ".join(f"{loss:.4f} ({step})" for step, loss in points), flush=True)
    draw(curves, output / "learning_curves.png", "held-out loss (10% of 1,852 emoji, 64 pixels, batches of 16)")
    return 0 if all(len(points) > 1 and points[-1][1] < points[0][1] for _, points in curves) else 1


if __name__ == "__main__":
    sys.exit(main())
