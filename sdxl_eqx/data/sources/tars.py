"""WebDataset shards: tars whose members of one key are a sample, read at random by an index of where each lies."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import tar_index
from sdxl_eqx.data.sources.files import Files, cache_folder, cache_name, is_local, natural_order
from sdxl_eqx.data.sources.folder import PICTURES, TEXTS, report_further_lines, text_lines
from sdxl_eqx.data.sources.source import Conditioned, texts, texts_or
from sdxl_eqx.data.sources.tar_index import TarIndex, key_text

logger = logging.getLogger("sdxl_eqx")


class Tars(Conditioned):
    """The samples of WebDataset tars, local or remote, in natural order of the tars and the order in each.

    A sample is the members of one key: of one path up to the first dot of the file's name. Its picture is the member
    whose extension is `image_column`, else the first with a picture's. Its caption is the member whose extension is
    `caption_column`, else .txt or .caption, as beside the pictures of an `ImageFolder`, else the field
    `caption_column` of .json; a `caption_column` other than `text` is looked for in .json before the texts are.
    `caption` is that of samples that have none; where it is '' keys without one are left out. What a ControlNet sees is
    the member whose extension is `condition_column`, or that and a picture's: `conditioning_image.png`.

    The index of a tar is made once and lies beside it as NAME.tar.index, or under ~/.cache/sdxl_eqx/index where it
    cannot, or in `index_folder` where one is given. A tar that has changed gets another.

    Raises:
        ValueError: a tar is compressed, damaged or none, no key of any has a picture and a caption, or none what a
            ControlNet sees, where it is asked for.
        OSError: a tar cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_column: str = "image",
        caption_column: str = "text",
        condition_column: str = "",
        caption: str = "",
        max_samples: int = -1,
        token: str = "",
        index_folder: Path | None = None,
    ):
        if not paths:
            raise ValueError("there are no tars; give the paths of some")
        self.paths = natural_order(paths)
        self._caption_column, self._caption = caption_column, caption
        self._files = Files(token)
        self._index_folder = index_folder
        pictures = [{image_column.lower()}, {end[1:] for end in PICTURES}]
        captions = [{end[1:]} for end in TEXTS]
        captions.insert(len(captions) if caption_column == "text" else 0, {"json"})
        seen = condition_column.lower()
        conditions = [{seen, *(f"{seen}{end}" for end in PICTURES)}] if seen else []
        self._samples, self._keys = self._gather(
            pictures, [{caption_column.lower()}, *captions], conditions, max_samples
        )
        if seen and (self._samples["condition_size"] < 0).all():
            raise ValueError(f"no key of {len(paths)} tars ({', '.join(self.paths[:3])}) has a member {seen!r} or "
                             f"{seen + '.png'!r} for a ControlNet to see; --conditioning-image-column names the "
                             "extension")  # fmt: skip
        self._look_at_json()
        if not self._samples["is_json"].all():
            report_further_lines(self, self._line_text, 1000 if all(map(is_local, self.paths)) else 16)

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        return f"Tars({len(self.paths)} from {self.paths[0]!r} on, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The tar's path and the key in it."""
        sample = self._samples[index]
        return f"{self.paths[sample['tar']]}:{key_text(self._keys[sample['key'] : sample['key_end']])}"

    def captions(self, index: int) -> tuple[str, ...]:
        """The one in its text, or those in its .json, which is read now.

        Raises:
            BadSample: it cannot be read, or holds none.
        """
        if self._samples[index]["caption_size"] < 0:
            return (self._caption,)
        data = self._read(index, "caption")
        try:
            if not self._samples[index]["is_json"]:
                return (text_lines(data)[0] if data.strip() or not self._caption else self._caption,)
            fields = json.loads(data.decode("utf-8-sig"))
            if self._caption and isinstance(fields, dict):
                said = fields.get(self._caption_column)
                return texts_or(texts(said), self._caption) if said else (self._caption,)
            if not isinstance(fields, dict) or self._caption_column not in fields:
                have = ", ".join(map(repr, fields)) if isinstance(fields, dict) else f"none, a {type(fields).__name__}"
                raise ValueError(f"no field {self._caption_column!r} (fields: {have}); --caption-column names the one "
                                 "to read")  # fmt: skip
            return texts(fields[self._caption_column])
        except (ValueError, RecursionError) as error:
            raise BadSample(self.name(index), f"its caption: {error}") from error

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes of its member, or the first `limit`.

        Raises:
            BadSample: they cannot be read.
        """
        return self._read(index, "picture", limit)

    def condition(self, index: int) -> bytes:
        """The bytes of its member that a ControlNet sees.

        Raises:
            BadSample: it has none, or they cannot be read.
        """
        if self._samples[index]["condition_size"] < 0:
            raise BadSample(self.name(index), "it has no member for a ControlNet to see")
        return self._read(index, "condition")

    def _line_text(self, index: int) -> bytes:
        sample = self._samples[index]
        return b"" if sample["is_json"] or sample["caption_size"] < 0 else self._read(index, "caption")

    def _read(self, index: int, member: str, limit: int = -1) -> bytes:
        """The first `limit` bytes (-1: all) of a sample's picture, caption or condition."""
        sample = self._samples[index]
        start, size = int(sample[member]), int(sample[f"{member}_size"])
        size = size if limit < 0 else min(size, limit)
        try:
            data = self._files.read(self.paths[sample["tar"]], start, start + size)
        except OSError as error:
            raise BadSample(self.name(index), f"{type(error).__name__}: {error}") from error
        if len(data) != size:
            raise BadSample(self.name(index), f"the tar ends {size - len(data)} bytes before its {member} does; if it "
                            "has changed, start again")  # fmt: skip
        return data

    def _gather(
        self, pictures: list[set[str]], captions: list[set[str]], conditions: list[set[str]], max_samples: int
    ) -> tuple[np.ndarray, UInt8[np.ndarray, " bytes"]]:
        """The samples of all tars, and the bytes of their keys."""
        samples: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        totals, left_out, first = Counter(), Counter(), dict[str, str]()
        seen = ""
        if new := sum(not any(place.is_file() for place in self._places(path)) for path in self.paths):
            logger.info("%d of %d tars have no index yet: it is made once and kept", new, len(self.paths))
        pool = ThreadPoolExecutor(8)  # for remote tars, which wait for the network
        try:
            for number, index in enumerate(pool.map(self._index, self.paths)):
                picture, caption, condition = (index.pick(wanted) for wanted in (pictures, captions, conditions))
                rows = index.samples(picture, caption, condition, needs_caption=not self._caption)
                rows["tar"] = number
                rows["key"] += totals["bytes"]
                rows["key_end"] += totals["bytes"]
                samples.append(rows)
                keys.append(index.keys)
                totals.update(bytes=len(index.keys), keys=len(picture), samples=len(rows))
                for why, count in index.left_out(picture, caption, needs_caption=not self._caption).items():
                    left_out[why] += count
                    first.setdefault(why, self.paths[number])
                seen = seen or index.summary()
                if 0 <= max_samples <= totals["samples"]:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
        if not totals["samples"]:
            raise ValueError(f"no key of {len(samples)} tars ({', '.join(self.paths[:3])}) has picture and caption; "
                             f"there are {seen or 'no keys'}; --image-column and --caption-column name the extensions, "
                             "or the field of .json")  # fmt: skip
        for why, count in left_out.items():
            logger.warning("%d %s in %d tars with %d keys, the first in %s: left out",
                           count, why, len(samples), totals["keys"], first[why])  # fmt: skip
        return np.concatenate(samples)[: max_samples if max_samples >= 0 else None], np.concatenate(keys)

    def _index(self, path: str) -> TarIndex:
        """The index of a tar, from where it is kept or made now."""
        state = self._files.state(path)
        places = self._places(path)
        for place in places:
            try:
                if index := tar_index.load(place, state):
                    return index
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is made again", place, error)
        with self._files.open(path) as file:
            index = tar_index.scan(file, path)
        reason = None
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                tar_index.save(index, place, state)
                return index
            except OSError as error:
                reason = error
        logger.warning("the index of %s cannot be kept, so that each run makes it again: %s", path, reason)
        return index

    def _places(self, path: str) -> list[Path]:
        """Where the index of a tar may lie, the first choice first."""
        if is_local(path):
            path = os.path.abspath(path.removeprefix("file://"))
        cached = (self._index_folder or cache_folder("index")) / f"{cache_name(path, path)}.index"
        return [Path(f"{path}.index"), cached] if is_local(path) and self._index_folder is None else [cached]

    def _look_at_json(self) -> None:
        """Refuse a caption column that no .json has, before a run counts every sample as bad.

        Raises:
            ValueError: none of some that are spread over all can be read.
        """
        all_json = np.flatnonzero(self._samples["is_json"])
        some = all_json[:: max(1, len(all_json) // 10)]
        reason = None
        for index in some:
            try:
                self.captions(int(index))
                return
            except BadSample as bad:
                reason = bad
        if len(some) == len(self) or len(some) >= 10:
            raise ValueError(f"none of the {len(some)} .json looked at has a caption, such as {reason}") from reason
