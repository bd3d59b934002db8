"""The folder of a run: its name, its lock, and what lies in it."""

import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

ADJECTIVES = ("amber", "bold", "brave", "calm", "clear", "fair", "fresh", "gentle", "lucid", "mellow", "quiet", "rapid")
NOUNS = ("badger", "cedar", "comet", "coral", "falcon", "fjord", "heron", "lynx", "maple", "otter", "river", "willow")


def new_name() -> str:
    """A readable name that no other run has, such as `20260131-142501-calm-otter`."""
    words = f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}"
    return f"{datetime.now():%Y%m%d-%H%M%S}-{words}"


@dataclass(frozen=True)
class RunFolder:
    """`ROOT/NAME/` and the places in it."""

    path: Path
    lock: FileLock | None
    """Held by the first of the run's processes, for all of them."""

    @classmethod
    def open(cls, root: str, name: str, *, is_first: bool = True) -> "RunFolder":
        """Make the folder if it is not there, and lock it for this run.

        Raises:
            ValueError: where another process runs in it, or it cannot be made.
        """
        path = Path(root) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output-dir: cannot make {path} ({error.strerror}); choose another.") from None
        if not is_first:
            return cls(path, None)
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--run-name {name}: another process runs in {path}; wait for it, stop it, or choose another name."
            ) from None
        return cls(path, lock)

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints, one folder a step."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The diffusers folder."""
        return self.path / "export"

    @property
    def finished_step(self) -> int:
        """The step at which the run was finished last, export and all; 0 where it never was."""
        try:
            return int((self.path / "finished").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def finish(self, step: int) -> None:
        """Note that everything of a run that ends at `step` is written."""
        (self.path / "finished").write_text(f"{step}\n")

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
    def config(self) -> Path:
        """The resolved config, which `--config` reads back."""
        return self.path / "config.yaml"

    def write_config(self, text: str) -> None:
        """Write the resolved config, by the process that holds the folder."""
        if self.lock is not None:
            self.config.write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Let other processes in."""
        if self.lock is not None:
            self.lock.release()
