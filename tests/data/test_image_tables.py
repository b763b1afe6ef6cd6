"""Parquet files and hub datasets."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polypatch.data import load_images
from polypatch.data.tables import parquet_files
from polypatch.errors import PolypatchError
from tests.data.pictures import encoded, picture

pytestmark = pytest.mark.usefixtures("hub_cache")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, *, features=None):
    """A parquet file; ``columns``: name → (type, values), ``features``: the hub's metadata."""
    fields = [pa.field(name, kind) for name, (kind, _) in columns.items()]
    meta = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    table = pa.table(
        [pa.array(values, kind) for kind, values in columns.values()],
        schema=pa.schema(fields, metadata=meta),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def pictures(count, start=0):
    return [{"bytes": encoded(picture(start + i)), "path": None} for i in range(count)]


def hub_file(path, labels, *, start=0, names=("cat", "dog"), column="img"):
    return write(
        path,
        {column: (IMAGE, pictures(len(labels), start)), "label": (pa.int64(), labels)},
        features={
            column: {"_type": "Image"},
            "label": {"_type": "ClassLabel", "names": list(names)},
        },
    )


def test_hub_layout(tmp_path):
    hub_file(tmp_path / "train-00000-of-00002.parquet", [0, 1, 1])
    hub_file(tmp_path / "train-00001-of-00002.parquet", [0, 0, 1], start=3)
    hub_file(tmp_path / "test.parquet", [1, 0], start=6)
    data = load_images(str(tmp_path), resolution=16)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.train.read(torch.arange(6))[1].tolist() == [0, 1, 1, 0, 0, 1]
    images, labels = data.test.read(torch.tensor([1, 0]))
    assert labels.tolist() == [0, 1]
    from polypatch.data.decode import decode_image

    expected = decode_image(encoded(picture(6)), name="", resolution=16)
    assert torch.equal((images[1] * 255).round().byte(), torch.tensor(expected))


def test_data_folder_and_validation(tmp_path):
    hub_file(tmp_path / "data" / "train.parquet", [0, 1])
    hub_file(tmp_path / "data" / "validation-0.parquet", [1], start=2)
    assert set(parquet_files(tmp_path)) == {"train", "validation"}
    data = load_images(str(tmp_path))
    assert (len(data.train), len(data.test)) == (2, 1)
    assert "no test images for class 'cat'" in data.notes


def test_one_file_is_split_by_hash(tmp_path):
    path = hub_file(tmp_path / "all.parquet", [0, 1] * 10)
    first, again = load_images(str(path)), load_images(str(path))
    assert (len(first.train), len(first.test)) == (16, 4)
    assert first.fingerprint == again.fingerprint
    both = load_images(str(tmp_path), test_fraction=0.5)
    assert len(both.test) == 10


def test_plain_parquet_without_metadata(tmp_path):
    raw = [p["bytes"] for p in pictures(8)]
    path = write(
        tmp_path / "x.parquet",
        {
            "photo": (pa.binary(), raw),
            "kind": (pa.string(), ["b", "a"] * 4),
        },
    )
    assert load_images(str(path), resolution=8).classes == ("a", "b")
    path = write(
        tmp_path / "y.parquet",
        {"photo": (IMAGE, pictures(8)), "target": (pa.int32(), [7, 30] * 4)},
    )
    assert load_images(str(path), resolution=8).classes == ("7", "30")


def test_broken_and_missing_images_are_skipped(tmp_path):
    images = pictures(10)
    images[0] = {"bytes": b"nonsense", "path": None}
    images[1] = {"bytes": images[1]["bytes"][:300], "path": None}
    images[2] = {"bytes": None, "path": str(tmp_path / "a.png")}
    picture(50).save(tmp_path / "a.png")
    images[3] = None
    labels = [0, 1] * 5
    write(
        tmp_path / "train.parquet",
        {"image": (IMAGE, images), "label": (pa.int64(), labels)},
        features={
            "image": {"_type": "Image"},
            "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]},
        },
    )
    hub_file(tmp_path / "test.parquet", [0, 1], column="image", names=("cat", "dog", "emu"))
    data = load_images(str(tmp_path), resolution=8)
    assert len(data.train) == 7
    notes = " ".join(data.notes)
    for part in ("row 0 of train (not an", "row 1 of train (trunc", "row 3 of train (no image"):
        assert part in notes
    assert "class 'emu'" in notes


def test_rows_without_labels(tmp_path):
    hub_file(tmp_path / "train.parquet", [0, 1, None, -1, 0, 1])
    hub_file(tmp_path / "test.parquet", [-1, -1])
    hub_file(tmp_path / "validation.parquet", [0, 1, -1])
    data = load_images(str(tmp_path), resolution=8)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert "test has no labels and isn't used" in data.notes
    assert "2 rows of train have no label" in data.notes
    assert "1 rows of validation have no label" in data.notes


def refused(spec, sentence):
    with pytest.raises(PolypatchError, match=sentence):
        load_images(str(spec), resolution=8)


def test_columns_are_chosen_or_asked_for(tmp_path):
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    two = write(
        tmp_path / "two.parquet",
        {
            "img": (IMAGE, pictures(8)),
            "fine": (pa.int64(), [0, 1] * 4),
            "coarse": (pa.int64(), [0, 0, 1, 1] * 2),
        },
        features={"img": {"_type": "Image"}, "fine": names, "coarse": names},
    )
    refused(two, r"several columns that could be the label \(fine, coarse\).*\?label=fine")
    assert load_images(f"{two}?label=coarse", resolution=8).classes == ("a", "b")
    refused(f"{two}?label=corse", "no column 'corse'; did you mean coarse")
    refused(f"{two}?label=fine&imag=img", "unknown option 'imag'; did you mean image")
    none = write(tmp_path / "none.parquet", {"a": (pa.int64(), [1]), "b": (pa.float64(), [1.0])})
    refused(none, r"no image column: its columns are a \(int64\), b \(float64\)")
    bare = write(tmp_path / "bare.parquet", {"img": (IMAGE, pictures(1)), "w": (pa.float32(), [1])})
    refused(bare, r"no label column: its columns are img .*w \(float32\)")
    pair = write(
        tmp_path / "pair.parquet",
        {"l": (IMAGE, pictures(4)), "r": (IMAGE, pictures(4)), "label": (pa.int64(), [0, 1] * 2)},
    )
    refused(pair, r"could be the image \(l, r\)")
    assert len(load_images(f"{pair}?image=r", resolution=8).train) == 2
    # The column that is called "label" is the label.
    both = write(
        tmp_path / "both.parquet",
        {
            "img": (IMAGE, pictures(4)),
            "label": (pa.int64(), [0, 1] * 2),
            "target": (pa.int64(), [5, 6] * 2),
        },
    )
    assert load_images(str(both), resolution=8).classes == ("0", "1")


def test_refusals(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    refused(tmp_path / "bad.parquet", r"bad\.parquet can't be read as parquet")
    refused(hub_file(tmp_path / "one.parquet", [0] * 5), "two classes.*found 'cat'")
    refused(hub_file(tmp_path / "zero.parquet", []), r"zero\.parquet has no rows")
    hub_file(tmp_path / "set" / "train.parquet", [0, 1, 0], names=("cat", "dog", "emu"))
    hub_file(tmp_path / "set" / "test.parquet", [0, 2], names=("cat", "dog", "emu"))
    refused(tmp_path / "set", "test has rows of class 'emu' but train has none")
    for split, kinds in (("train", ["x", "y"]), ("test", ["x", "z"])):
        write(
            tmp_path / "words" / f"{split}.parquet",
            {"img": (IMAGE, pictures(2)), "label": (pa.string(), kinds)},
        )
    refused(tmp_path / "words", "class 'z' but train has none")


def test_hub_ids_and_configurations(monkeypatch):
    import datasets

    splits = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict(
                {"img": pictures(6), "label": [0, 1] * 3},
                features=datasets.Features(
                    {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
                ),
            )
        }
    )
    asked = []

    def load_dataset(path, configuration=None):
        asked.append((path, configuration))
        if path == "cifar10/plain":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'cifar10/plain' doesn't exist")
        if path == "down/server":
            raise ConnectionError("Couldn't reach the Hub\nsecond line")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec in ("hub:mnist", "hub:owner/name", "hub:owner/name/part", "hub:cifar10/plain"):
        data = load_images(spec, resolution=8)
        assert data.name == spec
        assert (len(data.train), len(data.test)) == (4, 2)
    assert asked == [
        ("mnist", None),
        ("owner/name", None),
        ("owner/name", "part"),
        ("cifar10/plain", None),
        ("cifar10", "plain"),
    ]
    refused("hub:down/server", r"can't be loaded \(ConnectionError: Couldn't reach the Hub\)$")
    refused("hub:a/b/c/d", "names no dataset")
    refused("hub:", "names no dataset")


def test_hub_takes_a_local_dataset_folder(tmp_path):
    from datasets.utils import logging

    hub_file(tmp_path / "set" / "data" / "train.parquet", [0, 1, 0, 1])
    hub_file(tmp_path / "set" / "data" / "test.parquet", [0, 1], start=5)
    shown = logging.is_progress_bar_enabled()
    data = load_images(f"hub:{tmp_path / 'set'}", resolution=8)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert logging.is_progress_bar_enabled() == shown


def test_unlabelled_mistakes_name_the_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.zip").touch()
    refused("bundled:photo", "no bundled sample 'photo'; did you mean photos")
    refused("bundled:stars", "no bundled sample 'stars'; known samples: digits, photos")
    refused("cifar10", r"did you mean hub:cifar10\?; known forms: bundled:photos")
    refused("s3://bucket/x", "'s3://bucket/x' is no file, folder or known source; known forms")
    refused("", "known forms")
    refused("x.zip", r"a file but not a \.parquet file; known forms")
    refused("a" * 5000 + "/x", "can't be looked up")


def test_cifar10_by_its_test_part(cifar10, tmp_path):
    """The real file, quick: its first row group only."""
    table = pq.ParquetFile(cifar10 / "test.parquet").read_row_group(0)
    pq.write_table(table.slice(0, 400), tmp_path / "test.parquet")
    data = load_images(str(tmp_path))
    assert data.resolution == 32
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert len(data.train) + len(data.test) == 400


@pytest.mark.slow
def test_cifar10(cifar10):
    data = load_images(str(cifar10))
    assert (len(data.train), len(data.test)) == (50000, 10000)
    assert data.classes == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    assert not data.notes
    _, labels = data.train.read(torch.arange(50000))
    assert (torch.bincount(labels) == 5000).all()
    # The well-known channel means of CIFAR-10's training images.
    images, _ = data.train.read(torch.arange(0, len(data.train), 50))
    means = images.mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.02)
