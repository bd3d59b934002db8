"""A MaxDiffusion file, flat as it is, trains with `--config` alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import Trainer, checkpoints, metrics

BASE_XL = Path(__file__).parent.parent / "published" / "base_xl.yml"
STEPS = 3


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory, train: Trainer, model: Path) -> Path:
    """base_xl.yml with data set, model and place of the runs filled in, and made short."""
    text = BASE_XL.read_text(encoding="utf-8")
    values: dict[str, Any] = {
        "train_data_dir": "asset:emoji",
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(train.root),
        "resolution": 16,
        "max_train_steps": STEPS,
    }
    lines = text.splitlines()
    for key, value in values.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{key}:")]
        lines[at] = f"{key}: {value}"
    file = tmp_path_factory.mktemp("user") / "base_xl.yml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {**yaml.safe_load(text), **values}
    return file


@pytest.mark.slow
def test_base_xl_trains_with_config_alone(train: Trainer, user_file: Path):
    before = train.folders()
    ended = train("--config", str(user_file))
    assert ended.code == 0, ended.output
    (folder,) = train.folders() - before
    assert [record["step"] for record in metrics(folder)] == list(range(1, STEPS + 1))
    assert checkpoints(folder) == [STEPS]
    assert (folder / "export" / "model_index.json").is_file()
    assert (folder / "samples" / f"step_{STEPS:06d}.png").is_file()
    said = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert (said["hardware"], said["revision"], said["dataset_type"]) == ("auto", "main", "auto")
    assert "Traceback" not in ended.output
    lines = [line for line in ended.output.splitlines() if line.startswith(f"{user_file}: ")]
    assert [line.split(": ")[2].split(" ")[0] for line in lines[:6]] == ["mapped"] * 6
    assert lines[6].startswith(f"{user_file}: ignored: enable_mllog")
    assert len(lines) == 7
