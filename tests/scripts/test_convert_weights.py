"""The command line of scripts/convert_weights.py."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "convert_weights.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_folder_becomes_a_file_and_the_size_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "model.safetensors"
    assert run(monkeypatch, str(model), str(file), "--to", "single-file") == 0
    assert file.is_file()
    said = capsys.readouterr().out
    assert str(file) in said and "GB" in said and "text_encoder_2" in said


def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bad.safetensors").write_bytes(b"<html>not found</html>")
    assert run(monkeypatch, str(tmp_path / "bad.safetensors"), str(tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "a web page" in line
    assert not (tmp_path / "out").exists()
