import logging
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from filelock import FileLock

from sdxl_eqx.training import cloud
from sdxl_eqx.training.run_folder import RunFolder, new_name

ROOT = "memory://bucket/runs"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Another home and an empty bucket for each test."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield tmp_path / "home"
    system.store.clear()


def opened(*args: Any, **options: Any) -> Any:
    """A run's folder, of whose parts we know that they are there."""
    return RunFolder.open(*args, **options)


def there() -> dict[str, bytes]:
    """The files in the run's place in the bucket, by name."""
    system, root = fsspec.filesystem("memory"), "/bucket/runs/run/"
    return {path.removeprefix(root): system.cat_file(path) for path in system.find(root)}


def test_a_name_is_readable_and_new():
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z]+-[a-z]+", new_name())


def test_a_local_folder_is_locked_and_let_go(tmp_path):
    folder = opened(str(tmp_path), "run")
    assert folder.path == tmp_path / "run" and folder.place == str(tmp_path / "run") and folder.upload is None
    assert folder.checkpoints == folder.path / "checkpoints"
    with pytest.raises(ValueError, match=r"--run-name run: another process runs in .*choose another name"):
        opened(str(tmp_path), "run")
    opened(str(tmp_path), "run", is_first=False).close()
    folder.close()
    opened(str(tmp_path), "run").close()


def test_the_step_at_which_a_local_run_was_finished_is_kept(tmp_path):
    folder = opened(str(tmp_path), "run")
    assert folder.finished_step == 0
    folder.finish(7)
    folder.close()
    assert opened(str(tmp_path), "run").finished_step == 7


def test_what_a_run_writes_appears_in_its_bucket_but_for_the_cache_and_what_is_unfinished(caplog):
    folder = opened(ROOT, "run")
    assert folder.place == f"{ROOT}/run"
    folder.write_config("seed: 0\n")
    assert there()["config.yaml"] == b"seed: 0\n"
    folder.metrics.write_bytes(b'{"step": 1}\n{"st')
    for name in ("samples/step_1.png", "cache/1", "export/unet/x", ".x.part", "samples/.hidden", "finished"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(b"x")
    folder.send()
    assert set(there()) == {"config.yaml", "running.json", "metrics.jsonl", "samples/step_1.png"}
    assert there()["metrics.jsonl"] == b'{"step": 1}\n'
    folder.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    folder.close()
    assert there()["metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n' and "running.json" not in there()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_resumed_run_begins_with_what_is_in_the_bucket_and_not_with_what_was_left_here():
    folder = opened(ROOT, "run")
    folder.metrics.write_bytes(b"{}\n")
    (folder.path / "cache").mkdir()
    folder.close()
    folder.metrics.write_bytes(b"{}\n{}\n{}\n")
    (folder.path / "export").mkdir()
    again = opened(ROOT, "run")
    assert again.metrics.read_bytes() == b"{}\n"
    assert {path.name for path in again.path.iterdir()} == {"cache", "metrics.jsonl", ".lock"}
    again.close()
    shutil.rmtree(again.path)
    elsewhere = opened(ROOT, "run")
    assert elsewhere.metrics.read_bytes() == b"{}\n"
    elsewhere.close()


def export(folder: RunFolder, *names: str) -> None:
    """An export of these files, in place of the one before."""
    shutil.rmtree(folder.export, ignore_errors=True)
    for name in ("model_index.json", *names):
        (folder.export / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.export / name).write_text(name)


def test_an_export_is_a_model_and_the_run_finished_only_when_all_of_it_has_come(monkeypatch):
    folder = opened(ROOT, "run")
    export(folder, "unet/1", "vae/1")
    folder.finish(5)
    assert folder.finished_step == 5
    assert {"export/model_index.json", "export/unet/1", "export/vae/1", "finished"} <= set(there())

    export(folder, "unet/2", "vae/1")
    system, put = folder.mirror.system, folder.mirror.system.put_file

    def breaks(source, target, **options):
        assert not {"export/model_index.json", "finished"} & set(there())
        if "vae" in target:
            raise ConnectionError("the network is down")
        put(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(system, "put_file", breaks)
        with pytest.raises(OSError, match=r"vae/1: ConnectionError: the network is down"):
            folder.finish(9)
    assert folder.finished_step == 0 and "export/model_index.json" not in there()
    folder.finish(9)
    assert folder.finished_step == 9
    assert {name for name in there() if name.startswith("export")} == {
        "export/model_index.json", "export/unet/2", "export/vae/1",
    }  # fmt: skip
    folder.close()


def test_only_the_first_process_sends_and_the_others_know_what_is_finished():
    first, other = opened(ROOT, "run"), opened(ROOT, "run", is_first=False)
    assert other.upload is None and first.upload is not None
    other.metrics.write_bytes(b"{}\n")
    other.send()
    other.close()
    assert set(there()) == {"running.json"}
    first.export.mkdir()
    (first.export / "model_index.json").touch()
    first.finish(3)
    assert other.finished_step == 3
    first.close()


def warnings_in(caplog) -> list[str]:
    """What is said loudly."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_that_another_machine_may_still_write_is_said(caplog, monkeypatch):
    opened(ROOT, "run").lock.release()  # and ends without a word
    opened(ROOT, "run").lock.release()
    assert not warnings_in(caplog)
    monkeypatch.setattr(cloud.socket, "gethostname", lambda: "elsewhere")
    folder = opened(ROOT, "run")
    (said,) = warnings_in(caplog)
    assert "did not end well; where it still runs, stop one of the two: a bucket has no locks" in said
    folder.close()


def test_a_folder_in_a_bucket_is_locked_on_its_machine():
    folder = opened(ROOT, "run")
    with pytest.raises(ValueError, match=r"another process runs in memory://bucket/runs/run;"):
        opened(ROOT, "run")
    folder.close()


def test_a_bucket_that_cannot_be_written_is_said_with_the_remedy_and_the_lock_let_go(monkeypatch, home):
    def refused(*_, **__):
        raise PermissionError("403")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refused)
    with pytest.raises(ValueError, match=r"cannot read and write memory.*PermissionError: 403.*gcloud auth"):
        opened(ROOT, "run")
    (lock,) = home.rglob(".lock")
    with FileLock(lock, timeout=0):
        pass


def test_sending_fails_once_in_the_log_and_is_tried_again(monkeypatch, caplog):
    folder = opened(ROOT, "run")
    folder.metrics.write_bytes(b"{}\n")
    with monkeypatch.context() as patch:
        patch.setattr(folder.mirror.system, "pipe_file", lambda *_, **__: 1 / 0)
        folder.send()
        folder.send()
    (said,) = warnings_in(caplog)
    assert "not sent to memory://bucket/runs/run, will be tried again" in said and "ZeroDivisionError" in said
    assert "metrics.jsonl" not in there()
    folder.send()
    assert "metrics.jsonl" in there()
    folder.close()


def test_sending_in_the_background_is_not_begun_again_too_soon(monkeypatch):
    folder = opened(ROOT, "run")
    mirror = folder.mirror
    for text in (b"{}\n", b"{}\n{}\n"):
        folder.metrics.write_bytes(text)
        folder.upload()
        mirror._thread.join()
    assert there()["metrics.jsonl"] == b"{}\n"
    monkeypatch.setattr(cloud, "SECONDS_APART", 0.0)
    folder.upload()
    mirror._thread.join()
    assert there()["metrics.jsonl"] == b"{}\n{}\n"
    folder.close()


def test_a_place_that_nothing_writes_is_said():
    with pytest.raises(ValueError, match=r"nothing writes nowhere://; give a local path or gs://"):
        opened("nowhere://bucket", "run")


@pytest.mark.parametrize("place", ["{}/a/b.json", "file://{}/a/b.json", "memory://b.json"])
def test_a_file_is_written_whole_or_not_at_all(place, tmp_path):
    place = place.format(tmp_path)
    cloud.write_whole(place, b"1")
    cloud.write_whole(place, b"2")
    with fsspec.open(place, "rb") as file:
        assert file.read() == b"2"  # pyright: ignore[reportAttributeAccessIssue]
    assert not list(tmp_path.rglob(".*"))
