"""A folder of this machine whose files appear, whole, in a bucket."""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import fsspec

from sdxl_eqx.data.sources.files import PACKAGES, is_local, joined, whole_file

log = logging.getLogger("sdxl_eqx")

HERE = ("cache", "checkpoints", "export", "finished")
"""What lies at the top of a run's folder and is not sent with the rest: the data's cache, which can be made again, what
Orbax writes there itself, and what `send_model` and `write` are for."""

MARKER = "model_index.json"
"""Without it a folder of weights is no model."""

SECONDS_APART = 60.0
"""Between two sendings that nobody waits for: an object is written whole or not at all, so a file that grows is sent
from its beginning each time."""


class Mirror:
    """A local folder and the place of its files in a bucket.

    Raises (in every method that does not say otherwise):
        ValueError: nothing here reads such a place, or its package is not installed.
        OSError: for all that goes wrong on the way there.
    """

    def __init__(self, local: Path, remote: str):
        self.local, self.remote = local, remote.rstrip("/")
        self.system = system_of(remote)
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = Lock()
        self._thread: Thread | None = None
        self._last_began = -SECONDS_APART
        self._fails = False

    def claim(self) -> None:
        """Note that this process writes here, and say so where another one did and has not ended well."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        found = self.read("running.json")
        if found is not None:
            other = json.loads(found)
            # On this machine the lock of the local folder has told already that it has ended.
            if other["host"] != me["host"]:
                log.warning(
                    "%s: process %s on %s has written here since %s and did not end well; where it still runs, stop "
                    "one of the two: a bucket has no locks.",
                    self.remote, other["pid"], other["host"], other["since"],
                )  # fmt: skip
        self.write("running.json", json.dumps(me).encode())

    def clear(self) -> None:
        """Take away what an earlier process left in the local folder, but for the data's cache and the lock."""
        for path in self.local.iterdir():
            if path.name in ("cache", ".lock"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def fetch(self, name: str) -> None:
        """Copy a file from there, if there is one."""
        data = self.read(name)
        if data is not None:
            write_whole(str(self.local / name), data)

    def read(self, name: str) -> bytes | None:
        """What a file there holds; None where there is none."""
        try:
            with explained(self._there(name)):
                return bytes(self.system.cat_file(self._there(name)))
        except FileNotFoundError as error:
            log.debug("%s", error)
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file there, whole."""
        with explained(self._there(name)):
            self.system.pipe_file(self._there(name), data)

    def remove(self, name: str) -> None:
        """Take a file away there, if there is one."""
        try:
            with explained(self._there(name)):
                self.system.rm_file(self._there(name))
        except FileNotFoundError as error:
            log.debug("%s", error)

    def send(self) -> None:
        """Send what has changed since it was sent last, but for `HERE`."""
        with self._lock:
            for name in self._names(path for path in self.local.iterdir() if path.name not in HERE):
                file = self.local / name
                state = file.stat()
                if self._sent.get(name) == (state.st_size, state.st_mtime_ns):
                    continue
                data = file.read_bytes()
                # A line that is just being written counts next time.
                self.write(name, data[: data.rfind(b"\n") + 1] if name.endswith(".jsonl") else data)
                self._sent[name] = (state.st_size, state.st_mtime_ns)

    def begin(self) -> None:
        """Send as `send` does, while the caller goes on; what fails is said once and tried again the next time. Never
        raises."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if is_busy or time.monotonic() - self._last_began < SECONDS_APART:
            return
        self._last_began = time.monotonic()
        self._thread = Thread(target=self.try_send, name="upload", daemon=True)
        self._thread.start()

    def try_send(self) -> None:
        """Send, and say so where it fails."""
        try:
            self.send()
        except (OSError, ValueError) as error:
            if not self._fails:
                log.error("not sent to %s, will be tried again: %s", self.remote, error)
            self._fails = True
        else:
            self._fails = False

    def send_model(self, folder: str) -> None:
        """Send a folder of weights in place of the one there, which is no model any more until all of it has come."""
        with self._lock:
            self.remove(f"{folder}/{MARKER}")
            names = sorted(self._names([self.local / folder]), key=lambda name: (name == f"{folder}/{MARKER}", name))
            for name in names:
                if name == f"{folder}/{MARKER}":
                    self._remove_others(folder, names)
                with explained(self._there(name)):
                    self.system.put_file(str(self.local / name), self._there(name))

    def close(self) -> None:
        """Send what is left and give the place free. What fails is said; never raises."""
        if self._thread is not None:
            self._thread.join()
        self.try_send()
        try:
            if not self._fails:
                self.remove("running.json")
        except OSError as error:
            log.error("%s", error)

    def _there(self, name: str) -> str:
        return joined(self.remote, name)

    def _names(self, paths: Iterable[Path]) -> Iterator[str]:
        """Files, from the local folder on, below paths; hidden ones are somebody's unfinished work."""
        for path in sorted(paths):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from self._names(path.iterdir())
            else:
                yield path.relative_to(self.local).as_posix()

    def _remove_others(self, folder: str, names: list[str]) -> None:
        """Take away there what an earlier model had and this one has not."""
        with explained(self._there(folder)):
            self.system.invalidate_cache()
            root = self._there(folder).partition("://")[2]
            for path in self.system.find(self._there(folder)):
                name = f"{folder}/{path.lstrip('/').removeprefix(root).lstrip('/')}"
                if name not in names:
                    self.system.rm_file(path)


def system_of(place: str) -> Any:
    """The fsspec file system of a place.

    Raises:
        ValueError: there is none, or its package is not installed.
    """
    protocol = place.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else str(error)
        raise ValueError(f"{place}: {protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{place}: nothing writes {protocol}://; give a local path or gs:// ({error})") from error


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turns whatever a file system raises into an OSError that names the place."""
    try:
        yield
    except Exception as error:  # those of HTTP, cloud and authentication libraries have no common class
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def write_whole(place: str, data: bytes) -> None:
    """Write a file, local or remote, that is there whole or not at all; its local folder is made if need be.

    Raises:
        ValueError: nothing here writes such a place.
        OSError: for all that goes wrong on the way there.
    """
    if is_local(place):
        target = Path(place.removeprefix("file://")).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as building:
            building.write_bytes(data)
        return
    with explained(place):
        system_of(place).pipe_file(place, data)
