"""The folder of a run: its name, its lock, and what lies in it."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from etils import epath
from filelock import FileLock, Timeout

from sdxl_eqx.data.sources.files import cache_folder, cache_name, is_local, joined
from sdxl_eqx.training.cloud import Mirror

log = logging.getLogger("sdxl_eqx")

ADJECTIVES = ("amber", "bold", "brave", "calm", "clear", "fair", "fresh", "gentle", "lucid", "mellow", "quiet", "rapid")
NOUNS = ("badger", "cedar", "comet", "coral", "falcon", "fjord", "heron", "lynx", "maple", "otter", "river", "willow")


def new_name() -> str:
    """A readable name that no other run has, such as `20260131-142501-calm-otter`."""
    words = f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}"
    return f"{datetime.now():%Y%m%d-%H%M%S}-{words}"


@dataclass(frozen=True)
class RunFolder:
    """`ROOT/NAME/` and the places in it.

    Where ROOT is in a bucket, all is written into a local folder and sent from there, but for the checkpoints, which
    Orbax writes where they belong.
    """

    path: Path
    """On this machine."""
    lock: FileLock | None
    """Held by the first of the run's processes, for all of them."""
    mirror: Mirror | None = None
    """What sends the folder to its bucket, if ROOT is in one; only the first process sends."""

    @classmethod
    def open(cls, root: str, name: str, *, is_first: bool = True) -> "RunFolder":
        """Make the folder if it is not there, and lock it for this run.

        Raises:
            ValueError: where another process runs in it, or it cannot be made, read or written.
        """
        remote = "" if is_local(root) else joined(root, name)
        path = (
            cache_folder("runs") / cache_name(remote, remote) if remote else Path(root.removeprefix("file://")) / name
        )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output-dir: cannot make {path} ({error.strerror}); choose another.") from None
        mirror = Mirror(path, remote) if remote else None
        if not is_first:
            return cls(path, None, mirror)
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--run-name {name}: another process runs in {remote or path}; wait for it, stop it, or choose another "
                "name."
            ) from None
        folder = cls(path, lock, mirror)
        try:
            folder._begin_mirror()
        except OSError as error:
            lock.release()
            raise ValueError(
                f"--output-dir: cannot read and write {remote} ({error}); check the bucket's name and the credentials "
                "(gcloud auth application-default login), or choose another."
            ) from error
        return folder

    @property
    def place(self) -> str:
        """Where the run lies, as its owner calls it."""
        return str(self.path) if self.mirror is None else self.mirror.remote

    @property
    def checkpoints(self) -> Path | epath.Path:
        """Orbax checkpoints, one folder a step; in the bucket, if the run is in one."""
        return self.path / "checkpoints" if self.mirror is None else epath.Path(joined(self.place, "checkpoints"))

    @property
    def export(self) -> Path:
        """The diffusers folder."""
        return self.path / "export"

    @property
    def finished_step(self) -> int:
        """The step at which the run was finished last, export and all; 0 where it never was."""
        try:
            text = (self.path / "finished").read_bytes() if self.mirror is None else self.mirror.read("finished")
            return int(text or 0)
        except (FileNotFoundError, ValueError):
            return 0

    def finish(self, step: int) -> None:
        """Note that everything of a run that ends at `step` is written; in a bucket it is so only when all has come.

        Raises:
            OSError: where it could not be sent or written.
        """
        if self.mirror is None:
            (self.path / "finished").write_text(f"{step}\n")
            return
        log.info("sending the export to %s", self.place)
        self.mirror.remove("finished")
        self.mirror.send_model("export")
        self.mirror.send()
        self.mirror.write("finished", f"{step}\n".encode())

    @property
    def upload(self) -> Callable[[], Any] | None:
        """What begins to send what is new, if the run is in a bucket and this process is the one that sends."""
        return None if self.mirror is None or self.lock is None else self.mirror.begin

    @property
    def samples(self) -> Path:
        """Grids drawn while training."""
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        """Pictures of caption retrieval."""
        return self.path / "eval"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def periods(self) -> Path:
        """Files of gcs_metrics."""
        return self.path / "metrics"

    @property
    def config(self) -> Path:
        """The resolved config, which `--config` reads back."""
        return self.path / "config.yaml"

    def send(self) -> None:
        """Send what is new now, by the first process; what fails is said."""
        if self.mirror is not None and self.lock is not None:
            self.mirror.try_send()

    def write_config(self, text: str, *, also: Sequence[str] = ()) -> None:
        """Write the resolved config, under other names `also`, by the process that holds the folder.

        Raises:
            OSError: where it cannot be written or sent.
        """
        if self.lock is not None:
            for file in (self.config, *(self.path / name for name in also)):
                file.write_text(text, encoding="utf-8")
            if self.mirror is not None:
                self.mirror.send()

    def close(self) -> None:
        """Send what is left, and let other processes in."""
        if self.lock is not None:
            if self.mirror is not None:
                self.mirror.close()
            self.lock.release()

    def _begin_mirror(self) -> None:
        """Begin with what is in the bucket, whatever an earlier process left on this machine."""
        if self.mirror is not None:
            self.mirror.claim()
            self.mirror.clear()
            self.mirror.fetch(self.metrics.name)
            log.info("%s is written in %s and sent from there", self.place, self.path)
