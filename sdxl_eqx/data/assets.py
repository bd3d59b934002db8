"""The pictures, vocabulary and small model that come with the package, and the `asset:NAME` paths that name them."""

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
"""The folder inside the package."""

PREFIX = "asset:"


def resolve(path: str) -> Path:
    """The folder of an `asset:NAME` path; any other string is a path already.

    Raises:
        ValueError: there is no asset of that name.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    name = path.removeprefix(PREFIX)
    known = sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir() and folder.name[0] not in "._")
    if name not in known:
        raise ValueError(f"{path!r} names no bundled asset; known are {', '.join(PREFIX + k for k in known)}")
    return ASSETS / name


def located(name: str) -> str:
    """An `asset:NAME` as the path of its folder, and any other name of a model as it is: it may be one of the Hub.

    Raises:
        ValueError: there is no asset of that name.
    """
    return str(resolve(name)) if name.startswith(PREFIX) else name
