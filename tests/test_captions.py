"""Captioned images in the forms that people have them, and every kind of row that can't be used."""

import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import toy_clip
from PIL import Image

import fastprob.cli as cli
from fastprob.data.captions import open_dataset
from fastprob.data.store import EmbeddingStore

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def picture(path, colour=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures in photos/, beside which caption files are written."""
    for name, colour in (("a.png", RED), ("b.png", GREEN), ("c.png", BLUE)):
        picture(tmp_path / "photos" / name, colour)
    return tmp_path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def pixels(data):
    return [data[i][0].getpixel((4, 4)) for i in range(len(data))]


def message(spec, **options):
    with pytest.raises(ValueError) as caught:
        open_dataset(str(spec), progress=False, **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------------- tables

TABLE = 'image,caption\nb.png,A green one\na.png,"Red, and small"\nb.png,Grass\n'


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("captions.csv", TABLE, {}),
        ("captions.csv", "\ufeff" + TABLE.replace("\n", "\r\n") + "\r\n \r\n", {}),  # as Excel writes it
        ("captions.txt", TABLE, {}),  # Kaggle's Flickr8k
        ("train.csv", 'x\tfilepath\ttitle\n\tb.png\tA green one\n\ta.png\tRed, and small\n\tb.png\tGrass\n', {}),
        ("train.tsv", "path\twords\nb.png\tA green one\na.png\tRed, and small\nb.png\tGrass\n",
         {"image_key": "path", "caption_key": "words"}),
        ("train.csv", "image:caption\nb.png:A green one\na.png:Red, and small\nb.png:Grass\n", {"separator": ":"}),
        ("a.tsv", "image\tcaption\nb.png\tA green one\na.png\tRed, and small\nb.png\tGrass\n", {"separator": "\\t"}),
    ],
)  # fmt: skip
def test_tables(folder, name, content, options):
    data = open_dataset(write(folder / name, content), **options)
    assert data.captions == [["A green one", "Grass"], ["Red, and small"]]
    assert pixels(data) == [GREEN, RED]
    assert data.ids == ["b.png", "a.png"] and data.labels is None and data.skipped == []
    assert data.name == name.split(".")[0]


def test_paths_of_a_table_are_of_its_folder_or_one_beside(folder):
    inside = write(folder / "captions.csv", "image,caption\nphotos/a.png,A\n")
    beside = write(folder / "photos" / "captions.csv", "image,caption\na.png,A\n")
    (folder / "tables").mkdir()
    elsewhere = write(folder / "tables" / "captions.csv", "image,caption\na.png,A\n")
    for spec in (inside, beside, f"{elsewhere}@{folder / 'photos'}"):
        assert pixels(open_dataset(spec)) == [RED]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("a.png,A red one\n", {}, "expected a column 'image' or 'filepath' or 'file_name' or 'image_path' in the "
         "header (or name it: image_key), got ['a.png', 'A red one']"),
        ("", {}, "expected a column 'image' or"),
        ("image,words\na.png,A\n", {}, "expected a column 'caption' or 'title' or 'text' in the header"),
        (TABLE, {"image_key": "photo"}, "expected one column 'photo' in the header, got ['image', 'caption']"),
        ("image,caption,caption\na.png,A,B\n", {}, "expected one column 'caption' in the header"),
        (TABLE, {"separator": "ab"}, "the separator of a table must be a character, got 'ab'"),
        (TABLE, {"split": "train"}, "captions.csv has no split"),
        ("image,caption\n", {}, "expected images with captions, found none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table(folder, content, options, expected):
    assert expected in message(write(folder / "captions.csv", content), **options)


# ------------------------------------------------------------------------------------ published files


def karpathy(*rows):
    return json.dumps({"images": rows, "dataset": "coco"})


def sentences(*texts):
    return [{"raw": text, "tokens": text.split(), "imgid": 0, "sentid": 0} for text in texts]


def test_karpathy(folder):
    rows = (
        {"filepath": "photos", "filename": "b.png", "imgid": 0, "split": "test", "sentences": sentences("G", "Grass")},
        {"filepath": "photos", "filename": "a.png", "imgid": 1, "split": "restval", "sentences": sentences("R ")},
        {"filepath": "photos", "filename": "c.png", "imgid": 2, "split": "train", "sentences": sentences("B")},
    )
    spec = write(folder / "dataset_coco.json", karpathy(*rows))
    data = open_dataset(spec)
    assert data.captions == [["G", "Grass"], ["R"], ["B"]] and pixels(data) == [GREEN, RED, BLUE]
    assert data.ids == ["photos/b.png", "photos/a.png", "photos/c.png"]
    data = open_dataset(spec, split="train+restval")
    assert data.captions == [["R"], ["B"]] and data.name == "dataset_coco:train+restval"
    assert "expected a split among ['restval', 'test', 'train'], got 'dev'" in message(spec, split="dev")
    without = [{key: value for key, value in row.items() if key != "filepath"} for row in rows]
    assert pixels(open_dataset(write(folder / "dataset_flickr30k.json", karpathy(*without)))) == [GREEN, RED, BLUE]


def test_flickr8k(folder):
    lines = "a.png#0\tA child in a pink dress .\na.png#1\tA girl .\nb.png#0\tA dog #1 .\n"
    data = open_dataset(write(folder / "Flickr8k.token.txt", lines))
    assert data.captions == [["A child in a pink dress .", "A girl ."], ["A dog #1 ."]] and pixels(data) == [RED, GREEN]
    bad = write(folder / "Flickr8k.token.txt", lines + "\nb.png#1 no tab\n")
    assert "line 5: expected 'image#number<tab>caption', got 'b.png#1 no tab'" in message(bad)


# ------------------------------------------------------------------------------------------- folders


def test_folders_of_classes(tmp_path):
    for name, colour in (("tabby_cat/1.png", RED), ("tabby_cat/2.JPG", RED), ("dog/1.png", BLUE)):
        picture(tmp_path / "pets" / name, colour)
    write(tmp_path / "pets" / "dog" / "notes.txt", "no image")
    data = open_dataset(str(tmp_path / "pets"))
    assert data.captions == [["a photo of a dog."], ["a photo of a tabby cat."], ["a photo of a tabby cat."]]
    assert data.labels.tolist() == [0, 1, 1] and data.ids == ["dog/1.png", "tabby_cat/1.png", "tabby_cat/2.JPG"]
    assert (data.name, data[0][0].getpixel((4, 4))) == ("pets", BLUE)
    assert open_dataset(str(tmp_path / "pets"), template="{}?").captions[0] == ["dog?"]
    assert "template must have one {} in it, for the class, got 'x'" in message(tmp_path / "pets", template="x")
    assert "pets: expected images of a class in it, got the folders ['dog', 'tabby_cat']: one too high?" in message(
        tmp_path
    )
    (tmp_path / "pets" / "bird").mkdir()
    assert "bird: expected images of a class in it, got none" in message(tmp_path / "pets")


def test_folder_of_pictures_with_texts(folder):
    photos = folder / "photos"
    write(photos / "a.txt", "Red\n\nA square \n")
    write(photos / "b.txt", "Green")
    assert "c.png: expected its captions in c.txt, found no such file" in message(photos)
    write(photos / "c.txt", "\n")
    assert "c.png: expected a caption, got none" in message(photos)
    data = open_dataset(str(photos), skip_bad=True)
    assert data.captions == [["Red", "A square"], ["Green"]] and pixels(data) == [RED, GREEN]


# ------------------------------------------------------------------------------------------- shards


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, **members):
    """A tar as img2dataset writes it, of members k<key>_<suffix>."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.removeprefix("k").replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


ABOUT = {"url": "https://example.org", "caption": "Blue", "key": "000010000", "status": "success"}


def test_tars(tmp_path):
    shard(
        tmp_path / "cc" / "00000.tar",
        k000000000_png=png(RED),
        k000000000_json=json.dumps({**ABOUT, "caption": "other"}).encode(),
        k000000000_txt=b"A red one\n",
        k000000002_txt="A green one, très vert".encode(),
        k000000002_png=png(GREEN),
    )
    shard(tmp_path / "cc" / "00001.tar", k000010000_png=png(BLUE), k000010000_json=json.dumps(ABOUT).encode())
    write(tmp_path / "cc" / "00000_stats.json", "{}")
    data = open_dataset(str(tmp_path / "cc"))
    assert data.captions == [["A red one"], ["A green one, très vert"], ["Blue"]]
    assert pixels(data) == [RED, GREEN, BLUE] and data.name == "cc"
    assert data.ids == ["000000000", "000000002", "000010000"]
    assert pixels(open_dataset(str(tmp_path / "cc" / "00001.tar"))) == [BLUE]


def test_bad_tars(tmp_path):
    tar = tmp_path / "0.tar"
    shard(tar, k1_png=png(RED), k1_txt=b"A", k2_txt=b"no image", k3_png=png(RED)[:-30], k3_txt=b"torn", k4_png=png(RED),
          k5_png=b"no image", k5_txt=b"B", k6_png=png(BLUE), k6_json=b'{"caption": null}', k7_png=png(RED),
          k7_txt=b"caf\xe9")  # fmt: skip
    data = open_dataset(str(tar), skip_bad=True, progress=False)
    assert data.captions == [["A"]]
    assert [(row["row"].split(", ")[1], row["reason"].split(": ")[-1].split("(")[0]) for row in data.skipped] == [
        ("sample 2", "expected an image, got ['txt']"),
        ("sample 6", "expected a caption, got None"),
        ("sample 7", "expected UTF-8, got 'caf\\udce9'"),
        ("sample 4", "expected a caption, got none"),
        ("sample 3", "image file is truncated"),
        ("sample 5", "not an image that Pillow can read"),
    ]
    assert f"{tar}, sample 2: expected an image, got ['txt']; 2 more bad rows (skip_bad leaves them out)" in message(
        tar
    )
    whole = tar.read_bytes()
    for content in (whole[: len(whole) // 2 - 300], b"no tar" * 200, b""):
        assert f"{tar}: expected an uncompressed tar that is whole, got " in message(write(tar, content))
    with tarfile.open(tar, "w:gz"):
        pass
    assert "expected an uncompressed tar that is whole, got truncated header" in message(tar)


def parquet(path, **columns):
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_of_clip_retrieval(folder):
    spec = parquet(
        folder / "metadata_0.parquet",
        image_path=["photos/b.png", "photos/a.png"],
        caption=[["G", "Grass"], ["R"]],
        similarity=[0.3, 0.2],
    )
    data = open_dataset(spec)
    assert data.captions == [["G", "Grass"], ["R"]] and pixels(data) == [GREEN, RED]
    spec = parquet(folder / "bad.parquet", image_path=["photos/b.png", None], caption=["G", "R"])
    assert "bad.parquet, row 1: expected the name of an image file, got None" in message(spec)
    spec = parquet(folder / "bad.parquet", image_path=["photos/b.png", "photos/a.png"], caption=[None, "R"])
    assert "bad.parquet, row 0: expected a caption, got None" in message(spec)
    spec = parquet(folder / "bad.parquet", image_path=["photos/b.png"], caption=[7])
    assert "bad.parquet, row 0: expected a caption, got 7" in message(spec)
    spec = parquet(folder / "bad.parquet", image=[{"bytes": png(RED), "path": "a.png"}], caption=["R"])
    assert "expected paths in 'image', images in the table itself are for hf:, got struct<" in message(spec)
    assert "expected a column 'image' or" in message(parquet(folder / "bad.parquet", caption=["G"], url=["x"]))
    assert "bad.parquet: expected a parquet table, got: " in message(write(folder / "bad.parquet", "no table"))


def test_parquet_of_img2dataset(tmp_path):
    for shard, key, colour in (
        ("00000", "000000000", RED),
        ("00000", "000000002", GREEN),
        ("00001", "000010000", BLUE),
    ):
        picture(tmp_path / "files" / shard / f"{key}.png", colour)
    status = ["success", "failed_to_download", "success"]
    keys = ["000000000", "000000001", "000000002"]
    parquet(tmp_path / "files" / "00000.parquet", url=["u"] * 3, key=keys, status=status, caption=["R", None, "G"])
    parquet(tmp_path / "files" / "00001.parquet", url=["u"], key=["000010000"], status=["success"], caption=["B"])
    data = open_dataset(str(tmp_path / "files"))
    assert data.captions == [["R"], ["G"], ["B"]] and pixels(data) == [RED, GREEN, BLUE]


def test_without_pyarrow_parquet_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet: parquet needs pyarrow: pip install 'fastprob\[parquet\]'"):
        open_dataset(write(tmp_path / "a.parquet", "x"))


def test_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(colour), "path": None} for colour in (RED, GREEN, BLUE)],
               "caption": [["R", "Red"], ["G"], ["B"]]}  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))})
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "splits")
    for spec in (f"hf:{tmp_path / 'whole'}", f"hf:{tmp_path / 'splits'}:test"):
        data = open_dataset(spec)
        assert (
            data.captions == columns["caption"] and pixels(data) == [RED, GREEN, BLUE] and data.ids == ["0", "1", "2"]
        )
        assert data.digests() == open_dataset(spec).digests()
    assert "expected one of its splits ['test'] after it, got ''" in message(f"hf:{tmp_path / 'splits'}")
    columns["image"].reverse()
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "other")
    assert open_dataset(f"hf:{tmp_path / 'other'}").digests() != data.digests()
    columns["image"][1]["bytes"], columns["caption"][2] = b"none", [None]
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "bad")
    spec = f"hf:{tmp_path / 'bad'}"
    assert f"{spec}, row 2: expected a caption, got None" in message(spec)
    assert open_dataset(spec, skip_bad=True).captions == [["R", "Red"]]
    assert f"hf:{tmp_path}: " in message(f"hf:{tmp_path}")


def test_without_datasets_hugging_face_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf:x:train needs datasets: pip install 'fastprob\[hf\]'"):
        open_dataset("hf:x:train")


# ----------------------------------------------------------------------------------------- bad rows


def coco(images=None, annotations=None):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}] if images is None else images
    notes = [{"image_id": row["id"], "caption": "A"} for row in images] if annotations is None else annotations
    return json.dumps({"images": images, "annotations": notes})


def rows(*more, first="a.png,A"):
    return "\n".join(["image,caption", first, *more]) + "\n"


BAD = {
    # name of the file, its content, what the error says behind "open_dataset: "
    "no caption": ("c.json", coco(annotations=[{"image_id": 1, "caption": "A"}]),
                   "{file}, images[1]: {photos}/b.png: expected a caption, got none"),
    "null caption": ("c.json", coco(annotations=[{"image_id": 1, "caption": "A"}, {"image_id": 1, "caption": None}]),
                     "{file}, annotations[1]: expected a caption, got None"),
    "numeric caption": ("c.json", coco(annotations=[{"image_id": 1, "caption": 7}]),
                        "{file}, annotations[0]: expected a caption, got 7"),
    "a long row": ("c.json", coco(images=["x" * 1000], annotations=[]),
                   "{file}, images[0]: expected id and file_name, got '" + "x" * 468 + " ... ("),
    "blank caption": ("c.csv", rows("b.png, "), "{file}, line 3: expected a caption, got ' '"),
    "lone surrogate": ("c.json", coco(annotations=[{"image_id": 1, "caption": "\ud800"}]),
                       "{file}, annotations[0]: expected UTF-8, got '\\ud800'"),
    "two of one id": ("c.json", coco(images=[{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]),
                      "{file}, images[1]: expected an id of its own, got 1, that of 'a.png'"),
    "id is a list": ("c.json", coco(images=[{"id": [1], "file_name": "a.png"}], annotations=[]),
                     "{file}, images[0]: expected id to be a number or text, got [1]"),
    "image_id is a list": ("c.json", coco(annotations=[{"image_id": [1], "caption": "A"}]),
                           "{file}, annotations[0]: expected image_id to be a number or text, got [1]"),
    "unknown image_id": ("c.json", coco(annotations=[{"image_id": 9, "caption": "A"}]),
                         "{file}, annotations[0]: expected an image_id of 'images', got 9"),
    "row is no object": ("c.json", coco(images=[7], annotations=[]),
                         "{file}, images[0]: expected id and file_name, got 7"),
    "name is a number": ("c.json", coco(images=[{"id": 1, "file_name": 7}]),
                         "{file}, images[0]: expected the name of an image file, got 7"),
    "missing file": ("c.csv", rows("none.png,B"), "{file}, line 3: {photos}/none.png: No such file or directory"),
    "image is a folder": ("c.csv", rows(".,B"), "{file}, line 3: {photos}: Is a directory"),
    "no image": ("c.csv", rows("text.png,B"), "{file}, line 3: {photos}/text.png: not an image that Pillow can read"),
    "empty image": ("c.csv", rows("empty.png,B"),
                    "{file}, line 3: {photos}/empty.png: not an image that Pillow can read"),
    "32 bits": ("c.csv", rows("float.tif,B"),
                "{file}, line 3: {photos}/float.tif: expected 8 or 16 bits a channel, got mode 'F'"),
    "no name": ("c.csv", rows(",B"), "{file}, line 3: expected the name of an image file, got ''"),
    "name with NUL": ("c.json", coco(images=[{"id": 1, "file_name": "a\0.png"}]),
                      "{file}, images[0]: expected the name of an image file, got 'a\\x00.png'"),
    "outside": ("c.csv", rows("../secret.png,B"),
                "{file}, line 3: expected an image in {photos}, got '../secret.png' (allow_outside takes it)"),
    "absolute": ("c.json", coco(images=[{"id": 1, "file_name": "/etc/x.png"}]),
                 "{file}, images[0]: expected an image in {photos}, got '/etc/x.png' (allow_outside takes it)"),
    "a field too many": ("c.csv", rows("b.png,red, and small"), "{file}, line 3: expected 2 fields as in the header, "
                         "got 3: ['b.png', 'red', ' and small']; a caption with the separator in it needs quotes"),
    "a field too few": ("c.csv", rows("b.png"), "{file}, line 3: expected 2 fields as in the header, got 1: ['b.png']"),
    "a lone quote": ("c.csv", rows('b.png,"B', "c.png,C"),
                     "{file}, line 3 to 4: unexpected end of data; a lone quote?"),
    "text behind a quote": ("c.csv", rows('b.png,"B" said'), "{file}, line 3: ',' expected after '\"'; a lone quote?"),
    "latin-1 in CSV": ("c.csv", rows().encode() + "b.png,café\n".encode("latin-1"),
                       "{file}, line 3: expected UTF-8, got 'caf\\udce9'"),
    "latin-1 in JSON": ("c.json", coco().replace('"A"', '"é"').encode("latin-1"),
                        "{file}, annotations[0]: expected UTF-8, got '\\udce9'"),
    "latin-1 in Flickr8k": ("c.txt", b"a.png#0\tA\nb.png#0\tcaf\xe9\n",
                            "{file}, line 2: expected UTF-8, got 'caf\\udce9'"),
    "no row of Flickr30k": ("c.csv", "image| number| caption\na.png| 0| A\nb.png, 1, commas\n",
                            "{file}, line 3: expected 'image| number| caption', got 'b.png, 1, commas'"),
    "no sentences": ("c.json", karpathy({"filename": "a.png", "sentences": sentences("A")},
                                        {"filename": "b.png", "sentences": []}),
                     "{file}, images[1]: expected 'sentences' with captions, got []"),
    "a sentence without text": ("c.json", karpathy({"filename": "a.png", "sentences": [{"tokens": ["a"]}]}),
                                "{file}, images[0].sentences[0]: expected a caption, got None"),
    "not a row of Karpathy's": ("c.json", karpathy({"filename": "a.png", "sentences": sentences("A")}, {"file": "b"}),
                                "{file}, images[1]: expected filename and sentences, got {{'file': 'b'}}"),
}  # fmt: skip


@pytest.fixture
def photos(folder):
    photos = folder / "photos"
    write(photos / "text.png", "no image")
    write(photos / "empty.png", "")
    Image.fromarray(np.ones((4, 4), np.float32)).save(photos / "float.tif")
    picture(folder / "secret.png")
    return photos


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    toy_clip.register(directory, "toy-captions")
    return (
        "--model",
        "toy-captions",
        "--pretrained",
        toy_clip.weights(directory, "toy-captions", 0),
        "--device",
        "cpu",
    )


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named_before_anything_is_encoded(photos, capsys, model, name):
    file_name, content, expected = BAD[name]
    file = photos.parent / file_name
    spec = f"{write(file, content)}@{photos}"
    expected = f"open_dataset: {expected.format(file=file, photos=photos)}"
    got = message(spec)
    assert got.startswith(expected) and got.endswith(" (skip_bad leaves them out)")
    out = photos.parent / "store"
    assert cli.main(["embed", "--data", spec, "--out", str(out), *model]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error == f"fastprob embed: error: {' '.join(got.split())}\n" and not out.exists()


def test_what_is_no_json_is_named(folder):
    for content in ('{"images"', "[" * 100_000, "[]", "7", '{"images": []}', '{"images": {}, "annotations": []}'):
        assert "c.json: expected " in message(write(folder / "c.json", content))
    assert "COCO's captions have no splits" in message(write(folder / "c.json", coco()), split="train")


def test_bad_rows_are_left_out_counted_and_listed(photos, capsys, model):
    torn = photos / "torn.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(torn)
    os.truncate(torn, torn.stat().st_size - 500)
    lines = ["b.png,", "b.png,Green", "../secret.png,S", "none.png,N", "torn.png,T", "text.png,X", "c.png,Blue"]
    spec, out = write(photos / "captions.csv", rows(*lines)), photos.parent / "store"
    assert cli.main(["embed", "--data", spec, "--out", str(out), *model, "--skip-bad"]) == 0
    expected = [
        (3, "expected a caption, got ''"),
        (5, f"expected an image in {photos}, got '../secret.png' (allow_outside takes it)"),
        (6, f"{photos}/none.png: No such file or directory"),
        (7, f"{torn}: image file is truncated"),
        (8, f"{photos}/text.png: not an image that Pillow can read"),
    ]
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == [f"{spec}, line {line}" for line, _ in expected]
    assert all(row["reason"].startswith(reason) for row, (_, reason) in zip(listed, expected))
    summary = f"fastprob embed: left out 5 bad rows, listed in {out}/skipped.jsonl; first {spec}, line 3: expected a ca"
    assert summary in capsys.readouterr().err
    store = EmbeddingStore(out)
    assert store.captions == ["A", "Green", "Blue"] and store.ids == ["a.png", "b.png", "c.png"]
    write(photos / "captions.csv", rows("c.png,Blue"))
    assert cli.main(["embed", "--data", spec, "--out", str(out), *model, "--overwrite"]) == 0
    assert not (out / "skipped.jsonl").exists() and EmbeddingStore(out).captions == ["A", "Blue"]


def test_torn_image_is_named_with_its_row_when_it_is_read(photos, capsys, model):
    torn = photos / "torn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(torn)
    os.truncate(torn, torn.stat().st_size - 500)
    spec = write(photos / "captions.csv", rows("torn.png,T"))
    for workers in ("0", "1"):
        arguments = ["embed", "--data", spec, "--out", str(photos.parent / "store"), *model, "--workers", workers]
        assert cli.main(arguments) == 2
        assert f"{spec}, line 3: open_rgb: {torn}: image file is truncated" in capsys.readouterr().err.splitlines()[-1]


def test_every_image_that_is_left_out_is_listed(photos):
    """Also where one of its captions was bad before."""
    spec = write(photos / "c.csv", rows("none.png,", "none.png,N", "b.png,"))
    data = open_dataset(spec, skip_bad=True)
    assert data.captions == [["A"]]
    assert [(row["row"], row["reason"]) for row in data.skipped] == [
        (f"{spec}, line 3", "expected a caption, got ''"),
        (f"{spec}, line 5", "expected a caption, got ''"),
        (f"{spec}, line 3", f"{photos}/none.png: No such file or directory"),
    ]


def test_nothing_is_left(photos):
    got = message(write(photos / "c.csv", rows(first="none.png,A")), skip_bad=True)
    assert "found none beside 1 bad rows, first " in got and got.endswith("c.csv, line 2: "
        f"{photos}/none.png: No such file or directory")  # fmt: skip


def test_outside_is_taken_where_it_is_allowed(photos):
    absolute = str(photos.parent / "secret.png")
    spec = write(photos / "c.csv", rows("../secret.png,B", f"{absolute},C"))
    assert pixels(open_dataset(spec, allow_outside=True)) == [RED, RED, RED]
    inside = write(photos / "c.csv", rows(f"{photos}/b.png,B", "../photos/c.png,C"))
    assert pixels(open_dataset(inside)) == [RED, GREEN, BLUE]
    (photos / "linked").symlink_to(photos.parent)  # links are the user's own
    assert pixels(open_dataset(write(photos / "c.csv", rows("linked/secret.png,B")))) == [RED, RED]


# ------------------------------------------------------------------------------------------- digests


def test_digests_see_what_changes_in_a_tar(tmp_path):
    tar, data = tmp_path / "0.tar", {"k1_png": png(RED), "k1_txt": b"A", "k2_png": png(BLUE), "k2_txt": b"B"}
    spec = str(shard(tar, **data))
    before = open_dataset(spec).digests()
    assert open_dataset(spec).digests() == before
    shard(tar, **{**data, "k2_txt": b"C"})
    assert open_dataset(spec).digests()["captions"] != before["captions"]
    shard(tar, **{**data, "k2_png": png(GREEN)})
    after = open_dataset(spec).digests()
    assert after["captions"] == before["captions"] and after["files"] != before["files"]
