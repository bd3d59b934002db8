import http.server
import io
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import feather, parquet

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.tables import Table, arrow_files, arrow_table, hub_table, parquet_table

BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def dataset(**columns) -> datasets.Dataset:
    """A table in memory."""
    return datasets.Dataset(pa.table(columns))


def table(rows: datasets.Dataset | None = None, **options) -> Table:
    if rows is None:
        rows = dataset(image=pa.array([b"picture 0", b"picture 1"]), text=["a", "b"])
    return Table(rows, **{"image_column": "image", "caption_column": "text", **options})


def arrow(start: int, stop: int) -> pa.Table:
    """Rows of pictures and captions that tell which they are."""
    numbers = range(start, stop)
    pictures = pa.array([{"bytes": b"picture %d" % i, "path": None} for i in numbers], BYTES_AND_PATH)
    return pa.table({"image": pictures, "text": [f"caption {i}" for i in numbers]})


def numbers(rows: datasets.Dataset) -> list[int]:
    """Which rows these are, in their order; pictures and captions must agree."""
    source = table(rows)
    captions = [int(source.captions(i)[0].removeprefix("caption ")) for i in range(len(source))]
    assert [source.picture(i) for i in range(len(source))] == [b"picture %d" % i for i in captions]
    return captions


def write_stream(path: Path, content: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content)
    return path


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def test_rows_are_samples_with_names():
    source = table(name="owner/set")
    assert isinstance(source, Source)
    assert len(source) == 2
    assert [source.picture(i) for i in range(2)] == [b"picture 0", b"picture 1"]
    assert [source.captions(i) for i in range(2)] == [("a",), ("b",)]
    assert source.name(1) == "row 1 of owner/set"
    assert repr(source) == "Table('owner/set', 2 samples)"


@pytest.mark.parametrize(
    "pictures",
    [
        pa.array([b"one", b"two"]),
        pa.array([b"one", b"two"], pa.large_binary()),
        pa.array([b"one", b"two"], pa.binary_view()),
        pa.array([{"bytes": b"one", "path": "x"}, {"bytes": b"two", "path": None}], BYTES_AND_PATH),
        pa.array([{"bytes": b"one"}, {"bytes": b"two"}], pa.struct([("bytes", pa.large_binary())])),
    ],
    ids=lambda pictures: str(pictures.type),
)
@pytest.mark.parametrize("order", [None, [1, 0, 1]])
def test_a_picture_is_its_bytes_in_whatever_form_they_are_stored(pictures, order):
    rows = dataset(image=pictures, text=["a", "b"])
    source = table(rows if order is None else rows.select(order))
    for index, expected in enumerate([b"one", b"two"] if order is None else [b"two", b"one", b"two"]):
        assert source.picture(index) == expected
        for limit in (0, 1, 2, 3, 4):
            assert source.picture(index, limit) == expected[:limit]


def test_an_image_column_gives_the_files_that_were_put_in_without_decoding_them(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.jpg")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.jpg")], "text": ["a"]}, features=features)
    data = (tmp_path / "a.jpg").read_bytes()
    assert table(rows).picture(0) == data
    embedded = rows.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": {"bytes": data, "path": "gone.jpg"}}, features=features, keep_in_memory=True
    )
    (tmp_path / "a.jpg").unlink()
    assert table(embedded).picture(0) == data
    assert table(embedded).picture(0, 3) == b"\xff\xd8\xff"


@pytest.mark.parametrize(
    "kind", [lambda path: path, lambda path: {"bytes": None, "path": path}], ids=["path", "bytes and path"]
)
def test_a_path_starts_from_the_folder_and_an_absolute_one_from_nowhere(tmp_path, kind):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "b.png"):
        (tmp_path / name).write_bytes(f"picture {name}".encode())
    paths = ["in/a.png", str(tmp_path / "b.png")]
    rows = dataset(image=[kind(path) for path in paths], text=["a", "b"])
    if kind("a") != "a":
        rows = dataset(image=pa.array([kind(path) for path in paths], BYTES_AND_PATH), text=["a", "b"])
    source = table(rows, folder=str(tmp_path))
    assert [source.picture(i) for i in range(2)] == [b"picture in/a.png", b"picture b.png"]
    assert source.picture(0, 7) == b"picture"
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(BadSample, match=r"row 0 of the table: .*in/a.png"):
        source.picture(0)
    with pytest.raises(BadSample, match=r"its picture is 'in/a.png', of which the table does not say in what folder"):
        table(rows).picture(0)


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(["a", "a"]),
        pa.array(["a", "a"], pa.large_string()),
        pa.array(["a", "a"], pa.string_view()),
        pa.array([b"a", b"a"]),
        pa.array([["a"], ["a"]]),
        pa.array([["a"], ["a"]], pa.large_list(pa.string())),
        pa.array([["a"], ["a"]], pa.list_(pa.string(), 1)),
        pa.array([{"long": "a", "score": 1}, {"long": "a", "score": 2}]),
        pa.array(['["a"]', '{"long": "a"}'], pa.json_()),
    ],
    ids=lambda captions: str(captions.type),
)
def test_captions_are_read_in_whatever_form_they_are_stored(captions):
    source = table(dataset(image=pa.array([b"", b""]), text=captions))
    assert [source.captions(i) for i in range(2)] == [("a",), ("a",)]


def test_several_captions_are_a_list_or_json():
    source = table(dataset(image=pa.array([b"", b""]), text=pa.array([["a", "b"], ["c"]])))
    assert [source.captions(i) for i in range(2)] == [("a", "b"), ("c",)]
    source = table(dataset(image=pa.array([b"", b""]), text=['["a", "b"]', "[bracketed]"]))
    assert [source.captions(i) for i in range(2)] == [("a", "b"), ("[bracketed]",)]


def test_a_row_without_a_picture_or_caption_is_a_bad_sample():
    pictures = [None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}, {"bytes": b"one", "path": ""}]
    rows = dataset(image=pa.array(pictures, BYTES_AND_PATH), text=pa.array([None, "b", "c", "d"]))
    source = table(rows, folder="/nowhere")
    for index in range(3):
        with pytest.raises(BadSample, match=f"row {index} of the table: it has no picture"):
            source.picture(index)
    assert source.picture(3) == b"one"
    with pytest.raises(BadSample, match=r"row 0 of the table: a caption must be a string.*not 'None'"):
        source.captions(0)
    assert source.captions(1) == ("b",)
    with pytest.raises(BadSample, match="it has no picture"):
        table(dataset(image=pa.array([None, b"x"]), text=["a", "b"])).picture(0)
    with pytest.raises(BadSample, match="a caption must be"):
        table(dataset(image=pa.array([b""]), text=pa.array([[]], pa.list_(pa.string())))).captions(0)


def test_captions_are_read_without_the_picture():
    source = table()
    source._pictures = None  # pyright: ignore[reportAttributeAccessIssue]
    assert source.captions(1) == ("b",)
    assert source._texts is not None and source._texts.column_names == ["text"]


def test_columns_can_have_other_names():
    rows = dataset(jpg=pa.array([b"p"]), txt=["t"])
    source = table(rows, image_column="jpg", caption_column="txt")
    assert (source.picture(0), source.captions(0)) == (b"p", ("t",))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            {"image_column": "jpg"},
            r"set has no column 'jpg' \(columns: 'image', 'text', 'score', 'scores', 'box'\); --image-column names",
        ),
        ({"caption_column": "txt"}, r"has no column 'txt' \(columns: .*'box'\); --caption-column names"),
        ({"image_column": "score"}, "column 'score' must be of pictures.*not of int64; --image-column"),
        ({"caption_column": "score"}, "column 'score' must be of strings.*not of int64; --caption-column"),
        ({"image_column": "scores"}, "must be of pictures"),
        ({"caption_column": "scores"}, "must be of strings"),
        ({"image_column": "box"}, "must be of pictures"),
        ({"caption_column": "box"}, "must be of strings"),
    ],
)
def test_a_column_that_is_not_there_or_of_another_kind_is_an_error(options, rule):
    rows = dataset(image=pa.array([b"p"]), text=["t"], score=[1], scores=[[1]], box=[{"left": 1}])
    with pytest.raises(ValueError, match=rule):
        table(rows, name="set", **options)


def test_the_only_column_of_pictures_will_do_where_there_is_none_of_the_name(caplog):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    features = datasets.Features({"img": datasets.Image(decode=False), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"img": [{"bytes": b"p", "path": None}], "text": ["t"]}, features=features)
    source = table(rows, name="set")
    assert source.picture(0) == b"p"
    assert [r.getMessage() for r in caplog.records] == [
        "set has no column 'image'; 'img', the only one of pictures, is read"
    ]
    features["mask"] = datasets.Image(decode=False)
    two = datasets.Dataset.from_dict({"img": [None], "mask": [None], "text": ["t"]}, features=features)
    with pytest.raises(ValueError, match=r"no column 'image'.*--image-column"):
        table(two)
    assert len(table(two, image_column="mask")) == 1


def test_addresses_in_the_web_are_refused():
    with pytest.raises(ValueError, match=r"row 0 of the table: column 'image' holds addresses in the web.*img2dataset"):
        table(dataset(image=["https://example.org/a.jpg"], text=["a"]))


def test_only_the_first_rows_are_there_where_a_number_is_given():
    assert [len(table(max_samples=n)) for n in (-1, 1, 5)] == [2, 1, 2]


def test_a_table_without_rows_is_an_error():
    with pytest.raises(ValueError, match="set has no rows; give one that has"):
        table(dataset(image=pa.array([], pa.binary()), text=pa.array([], pa.string())), name="set")


def test_many_threads_read_the_rows_that_one_does(tmp_path):
    source = table(arrow_files([write_stream(tmp_path / "a.arrow", arrow(0, 50))]))
    with ThreadPoolExecutor(8) as pool:
        order = [i % 50 for i in range(800)]
        assert list(pool.map(source.picture, order)) == [b"picture %d" % i for i in order]
        assert list(pool.map(source.captions, order)) == [(f"caption {i}",) for i in order]


def test_parquet_files_follow_one_another_and_are_converted_once(tmp_path, cache):
    folder = tmp_path / "we[i]rd *"
    folder.mkdir()
    for name, start in (("b", 0), ("a", 3)):
        parquet.write_table(arrow(start, start + 3), folder / f"{name}.parquet", row_group_size=2)
    paths = [folder / "b.parquet", str(folder / "a.parquet")]
    rows = parquet_table(paths, cache_dir=cache)
    assert numbers(rows) == list(range(6))
    (converted,) = [Path(file["filename"]) for file in rows.cache_files]
    assert converted.is_relative_to(cache)
    os.utime(converted, (1, 1))
    assert numbers(parquet_table(paths, cache_dir=cache)) == list(range(6))
    assert converted.stat().st_mtime == 1


def test_parquet_files_of_the_image_feature_are_pictures(tmp_path, cache):
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"photo": [{"bytes": b"p", "path": "p.jpg"}], "text": ["t"]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    source = table(parquet_table([tmp_path / "a.parquet"], cache_dir=cache))
    assert source.picture(0) == b"p"


@pytest.mark.parametrize("damage", ["gone", "cut", "other columns"])
def test_parquet_files_that_cannot_be_read_are_an_error(tmp_path, cache, damage):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        parquet.write_table(arrow(0, 3), path)
    if damage == "gone":
        paths[1].unlink()
    elif damage == "cut":
        paths[1].write_bytes(paths[1].read_bytes()[:-20])
    else:
        parquet.write_table(pa.table({"picture": [1]}), paths[1])
    with pytest.raises(ValueError, match=r"a.parquet and 1 more: \w+Error: .*; write or copy them again"):
        parquet_table(paths, cache_dir=cache)


def test_arrow_files_follow_one_another_and_stay_where_they_are(tmp_path, cache):
    paths = [write_stream(tmp_path / "b.arrow", arrow(0, 3)), write_stream(tmp_path / "a.arrow", arrow(3, 6))]
    rows = arrow_files(paths, cache_dir=cache)
    assert numbers(rows) == list(range(6))
    assert [Path(file["filename"]) for file in rows.cache_files] == paths
    assert not Path(cache).exists()


def test_empty_arrow_files_hold_no_rows(tmp_path):
    parts = [(0, 0), (0, 2), (2, 2), (2, 2), (2, 5), (5, 5)]
    rows = arrow_files([write_stream(tmp_path / str(i), arrow(*part)) for i, part in enumerate(parts)])
    assert numbers(rows) == list(range(5))


def test_arrow_files_of_both_formats_are_read(tmp_path, cache):
    feather.write_feather(arrow(0, 3), str(tmp_path / "a.arrow"), compression="uncompressed")
    write_stream(tmp_path / "b.arrow", arrow(3, 6))
    assert numbers(arrow_files([tmp_path / "a.arrow", tmp_path / "b.arrow"], cache_dir=cache)) == list(range(6))


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "other columns"])
def test_arrow_files_that_cannot_be_read_are_an_error(tmp_path, cache, damage):
    paths = [write_stream(tmp_path / name, arrow(0, 3)) for name in ("a.arrow", "b.arrow")]
    if damage == "gone":
        paths[1].unlink()
    elif damage == "cut":
        paths[1].write_bytes(paths[1].read_bytes()[:-100])
    elif damage == "other":
        paths[1].write_bytes(b"no arrow file" * 50)
    else:
        write_stream(paths[1], pa.table({"image": pa.array([1]), "text": ["t"]}))
    with pytest.raises(ValueError, match=r"a.arrow and 1 more: .*; write or copy them again"):
        arrow_files(paths, cache_dir=cache)


def test_what_save_to_disk_wrote_is_read_back_in_its_order(tmp_path):
    rows = datasets.Dataset(arrow(0, 6))
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert numbers(arrow_table(tmp_path / "one")) == list(range(6))
    rows.shuffle(seed=0).save_to_disk(tmp_path / "two")
    assert numbers(arrow_table(str(tmp_path / "two"))) == [int(text[8:]) for text in rows.shuffle(seed=0)["text"]]


def test_of_several_splits_the_one_asked_for_is_read(tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset(arrow(0, 3)), "test": datasets.Dataset(arrow(3, 5))})
    splits.save_to_disk(tmp_path)
    assert numbers(arrow_table(tmp_path)) == [0, 1, 2]
    assert numbers(arrow_table(tmp_path, split="test")) == [3, 4]
    with pytest.raises(ValueError, match="has no split 'eval', only train, test; give one with --train-split"):
        arrow_table(tmp_path, split="eval")


def test_a_folder_of_arrow_files_is_read_in_natural_order(tmp_path):
    folder = tmp_path / "we[i]rd"
    folder.mkdir()
    for number in (10, 2):
        write_stream(folder / f"set-{number}.arrow", arrow(number, number + 2))
    assert numbers(arrow_table(folder)) == [2, 3, 10, 11]


def test_a_folder_without_arrow_files_or_with_damaged_ones_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no arrow files, nor a data set of save_to_disk; give one that has"):
        arrow_table(tmp_path)
    datasets.Dataset(arrow(0, 3)).save_to_disk(tmp_path)
    for file in tmp_path.glob("*.arrow"):
        file.unlink()
    with pytest.raises(ValueError, match=r"FileNotFoundError.*; save it again"):
        arrow_table(tmp_path)


def test_a_token_that_is_none_is_an_error_without_it():
    with pytest.raises(ValueError, match="'owner/set': the access token has characters that no token has") as caught:
        hub_table("owner/set", token="geheim\u0308")
    assert "geheim" not in str(caught.value)


def test_no_token_is_in_an_error_whatever_the_library_says(monkeypatch):
    def load(*args, **kwargs):
        try:
            raise OSError("request of hf_fromtheenvironmentofthisuser")
        except OSError as error:
            raise RuntimeError("secret was refused: {'authorization': 'Bearer other'}") from error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"RuntimeError: \(the token\) was refused: .*, from OSError: request"
    ) as caught:
        hub_table("owner/set", token="secret")
    for word in ("secret", "other", "hf_fromtheenvironmentofthisuser"):
        assert word not in str(caught.value)
    assert caught.value.__suppress_context__


COMMIT = "a" * 40
REVISION = "/api/datasets/owner/set/revision/v1"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as one data set of two splits needs, which only who has the token may see."""

    files: dict[str, bytes] = {}  # noqa: RUF012  one for all handlers, as HTTPServer makes them
    asked: list[str] = []  # noqa: RUF012  likewise

    def log_message(self, format: str, *args):
        """Nothing."""

    def answer(self, body: bytes | list | dict, status: int = 200, **headers: str):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        tree, resolved = f"/api/datasets/owner/set/tree/{COMMIT}", f"/datasets/owner/set/resolve/{COMMIT}/"
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            # What is quoted here must not come out of the error.
            self.answer({"error": f"go away, {self.headers.get('authorization')}"}, 401)
        elif path in ("/api/datasets/owner/set", f"/api/datasets/owner/set/revision/{COMMIT}", REVISION):
            self.answer({"id": "owner/set", "sha": COMMIT, "siblings": []})
        elif path.startswith(tree):
            inside = path.removeprefix(tree).strip("/")
            if inside:
                found = [{"type": "file", "path": name, "size": len(data), "oid": "b" * 40}
                         for name, data in self.files.items() if name.startswith(f"{inside}/")]  # fmt: skip
            else:
                found = [{"type": "directory", "path": "data", "size": 0, "oid": "c" * 40}]
            self.answer(found)
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.files:
            name = path.removeprefix(resolved)
            self.answer(self.files[name], ETag=f'"{name[5:].encode().hex():0<40.40}"', X_Repo_Commit=COMMIT)
        else:
            self.answer({"error": "nothing"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815  http.server's name


@pytest.fixture
def hub():
    for name, start in (("train", 0), ("test", 3)):
        file = io.BytesIO()
        parquet.write_table(arrow(start, start + 3), file)
        Hub.files[f"data/{name}-00000-of-00001.parquet"] = file.getvalue()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def in_another_process(home: Path, calls: list[dict], **environment: str) -> tuple[list, str]:
    """What `hub_table` gives for each call, in a process that reads the environment anew; and what it wrote."""
    program = """
import json, sys
from sdxl_eqx.data.sources.tables import Table, hub_table
assert "datasets" not in sys.modules
found = []
for call in json.loads(sys.argv[1]):
    try:
        source = Table(hub_table(**call), image_column="image", caption_column="text")
        found.append([source.picture(i).decode() for i in range(len(source))])
    except ValueError as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, json.dumps(calls)],
        env={**outside, "HF_HOME": str(home), **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_a_data_set_of_the_hub_is_fetched_once_and_read_offline_from_the_cache(hub, tmp_path):
    train, test = ([f"picture {i}" for i in numbers] for numbers in (range(3), range(3, 6)))
    calls = [
        {"name": "owner/set", "token": f"{TOKEN}\n"},
        {"name": "owner/set", "token": TOKEN, "split": "test[:2]"},
        {"name": "owner/set", "token": TOKEN, "data_files": "data/te*"},
        {"name": "owner/set", "token": TOKEN, "revision": "v1"},
        {"name": "owner/set", "token": TOKEN, "split": "eval"},
        {"name": "owner/set", "token": TOKEN, "config_name": "large"},
        {"name": "owner/other", "token": TOKEN},
        {"name": "owner/other", "token": "hf_ofanotherwhomaynotseeit"},
    ]
    found, written = in_another_process(tmp_path, calls, HF_ENDPOINT=hub)
    assert found[:4] == [train, test[:2], test, train]
    assert REVISION in Hub.asked
    for message, reason in zip(
        found[4:], ['Unknown split "eval"', "BuilderConfig 'large' not found", "404", "401"], strict=True
    ):
        assert message.startswith("ValueError: --dataset-name 'owner/")
        assert reason in message
        assert "--hf-access-token" in message
    assert "hf_" not in written + "".join(found[4:])
    assert "%|" not in written
    assert "it/s" not in written
    assert "examples" not in written

    calls = [{"name": "owner/set"}, {"name": "owner/set", "split": "test"}, {"name": "owner/other"}]
    found, _ = in_another_process(tmp_path, calls, HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_OFFLINE="1")
    assert found[:2] == [train, test]
    assert "--dataset-name 'owner/other': ConnectionError" in found[2]
