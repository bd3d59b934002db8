"""The files of data sets, local or remote, listed and read alike."""

import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""What reads a protocol, where fsspec alone does not."""

STAMPS = ("blob_id", "md5Hash", "crc32c", "etag", "ETag", "xet_hash", "LastModified", "last_modified", "mtime",
          "updated", "created")  # fmt: skip
"""What file systems call something that changes with a file; the first that is there counts."""

BLOCK = 4 << 20
"""Bytes that a remote file opened with `Files.open` asks for at a time."""


class FileState(NamedTuple):
    """What tells one content of a file from another: its size in bytes and a stamp that changes with it."""

    size: int
    stamp: str


class Files:
    """Local paths, read with the operating system alone, and gs://, s3://, hf:// and others, read with fsspec.

    `token` is the Hub's, is given to hf:// alone and never shown. All methods are safe to call from many threads.

    Raises (in every method):
        ValueError: nothing here reads such a path.
        OSError: what is read cannot be, FileNotFoundError where there is none; network errors too.
    """

    def __init__(self, token: str = ""):
        self._token = token
        self._lock = Lock()
        self._systems: dict[str, Any] = {}

    def listing(self, folder: str) -> list[str]:
        """The paths, from the folder on, of all files in it and in its folders, in natural order.

        Names that begin with a dot, and __MACOSX, are left out; links are followed.

        Raises:
            ValueError: it is no folder.
        """
        if not self.is_folder(folder):
            private = "; a private one needs --hf-access-token" if folder.startswith("hf://") else ""
            raise ValueError(
                f"{folder} is no folder; give one that is there, local, gs://, s3:// or hf://, or asset:emoji{private}"
            )
        if is_local(folder):
            return natural_order(_local_names(_local(folder), "", frozenset()))
        with self._explained(folder):
            system = self._system(folder)
            system.invalidate_cache()
            # Names come as the system itself writes the folder, which may add a bucket's generation or a revision.
            root = system.info(folder)["name"].rstrip("/") + "/"
            names = [name.removeprefix(root) for name in system.find(folder) if name != root[:-1]]
        return natural_order(n for n in names if n[-1:] != "/" and not any(map(is_hidden, n.split("/"))))

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of this path."""
        if is_local(path):
            return os.path.isdir(_local(path))
        return (self._info(path) or {}).get("type") == "directory"

    def is_file(self, path: str) -> bool:
        """Whether there is a file of this path."""
        if is_local(path):
            return os.path.isfile(_local(path))
        return (self._info(path) or {}).get("type") == "file"

    def state(self, path: str) -> FileState:
        """A file's size and change stamp; where a remote system knows no stamp, the size must do."""
        if is_local(path):
            status = os.stat(_local(path))
            return FileState(status.st_size, str(status.st_mtime_ns))
        info = self._info(path)
        if info is None or info.get("type") != "file":
            raise FileNotFoundError(f"there is no file {path}")
        stamp = next((f"{name}={info[name]}" for name in STAMPS if info.get(name)), "")
        return FileState(int(info.get("size") or 0), stamp)

    def read(self, path: str, start: int = 0, stop: int = -1) -> bytes:
        """The bytes from `start` to before `stop` (-1: to the end), fewer where the file ends before."""
        if 0 <= stop <= start:
            return b""
        if is_local(path):
            with open(_local(path), "rb") as file:
                if start:
                    file.seek(start)
                return file.read(stop - start if stop >= 0 else -1)
        # The Hub's file system reads ahead by megabytes where it is not told otherwise.
        options = {"cache_type": "none"} if path.startswith("hf://") else {}
        with self._explained(path):
            return bytes(self._system(path).cat_file(path, start or None, stop if stop >= 0 else None, **options))

    def open(self, path: str) -> io.BufferedReader:
        """A file to read and seek in, by one thread; of a remote one `BLOCK` bytes at a time are fetched, as needed."""
        if is_local(path):
            return open(_local(path), "rb")
        return io.BufferedReader(_Remote(self, path), BLOCK)

    def local_copy(self, path: str) -> Path:
        """A local path of a file, for readers that take no other; a remote one is copied to ~/.cache/sdxl_eqx/files
        once, and again when it has changed."""
        if is_local(path):
            return Path(_local(path))
        state = self.state(path)
        target = cache_folder("files") / cache_name(f"{path}\n{state.size}\n{state.stamp}", path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):  # the processes of a host share one copy
            if target.is_file() and target.stat().st_size == state.size:
                return target
            with whole_file(target) as partial, self._explained(path):
                self._system(path).get_file(path, str(partial))
                if partial.stat().st_size != state.size:
                    raise OSError(f"{partial.stat().st_size} of {state.size} bytes came; start again")
        return target

    def _info(self, path: str) -> dict[str, Any] | None:
        """What the system says of a path; None where there is nothing."""
        try:
            with self._explained(path):
                return self._system(path).info(path)
        except FileNotFoundError:
            return None

    def _system(self, path: str) -> Any:
        """The file system of a remote path; one for all threads, since each keeps its own connections and listings.

        Raises:
            ValueError: there is none, or its package is not installed.
        """
        protocol = path.partition("://")[0]
        with self._lock:
            if protocol not in self._systems:
                options = {"token": self._token} if protocol == "hf" and self._token else {}
                try:
                    self._systems[protocol] = fsspec.filesystem(protocol, **options)
                except ImportError as error:
                    package = PACKAGES.get(protocol)
                    remedy = f"pip install {package}" if package else str(error)
                    raise _Unreadable(
                        f"{path}: {protocol}:// needs a package that is not installed: {remedy}"
                    ) from error
                except ValueError as error:
                    raise _Unreadable(
                        f"{path}: nothing reads {protocol}://; give a local path, gs://, s3:// or hf:// ({error})"
                    ) from error
            return self._systems[protocol]

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turns whatever a file system raises into an OSError that names the path and not the token."""
        try:
            yield
        except _Unreadable:
            raise
        except Exception as error:  # those of HTTP, cloud and authentication libraries have no common class
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            message = f"{path}: {type(error).__name__}: {error}"
            if self._token and self._token in message:
                raise kind(message.replace(self._token, "(the token)")) from None
            raise kind(message) from error


class _Unreadable(ValueError):
    """Nothing here reads such a path."""


class _Remote(io.RawIOBase):
    """A remote file without a buffer: each read is a request for that range."""

    def __init__(self, files: Files, path: str):
        self._files, self._path = files, path
        self._size = files.state(path).size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        data = self._files.read(self._path, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine: file://, or without a protocol."""
    return path.startswith("file://") or not re.match(r"[A-Za-z][\w+.:-]*://", path)


def joined(folder: str, name: str) -> str:
    """The path of a name in a folder, local or remote."""
    return f"{folder.rstrip('/')}/{name}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name holds nothing for us: it begins with a dot, or is what macOS adds."""
    return name.startswith(".") or name == "__MACOSX"


def natural_order(names: Iterable[str]) -> list[str]:
    """Names with the numbers in them by value (img2 before img10), folder by folder; always the same order."""
    return sorted(sorted(names), key=_natural)


def cache_folder(name: str) -> Path:
    """The folder of this user for what can be made again."""
    return Path.home() / ".cache" / "sdxl_eqx" / name


def cache_name(key: str, path: str) -> str:
    """A file name for what is kept of a path, another for every key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', path.rpartition('/')[2])[-100:]}"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes the target when all is written, and goes where something is raised."""
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _local(path: str) -> str:
    return path.removeprefix("file://")


def _local_names(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The files in a folder and its folders; `above` are the folders on the way, so that no link goes round."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _local_names(entry.path, f"{prefix}{entry.name}/", above | {here})
            elif entry.is_file():
                yield prefix + entry.name


def _natural(name: str) -> str:
    """A string that sorts as the name does in natural order: each number after its number of digits."""
    return re.sub("0*([0-9]+)", _number, name.replace("/", "\0"))


def _number(digits: re.Match[str]) -> str:
    return f"0{chr(len(digits[1]))}{digits[1]}"
