"""The embedding store: what is written is what the encoder returned, and nothing that goes wrong loses or fakes it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy_clip
from toy_clip import Digits

from fastprob.data import store_format
from fastprob.data.captions import ImageCaptions
from fastprob.data.store import EmbeddingStore, embed, pictures_of
from fastprob.encoders import load_encoder

FILES = (*store_format.DATA_FILES, store_format.METADATA)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two encoders that differ in nothing but their weights."""
    directory = tmp_path_factory.mktemp("toy")
    toy_clip.register(directory, "toy-store")
    return [load_encoder("toy-store", pretrained=toy_clip.weights(directory, "toy-store", seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def encoder(encoders):
    return encoders[0]


def write(path, encoder, dataset=None, **options):
    options = {"batch_size": 3, "shard_size": 8, "progress": False} | options
    return embed(Digits() if dataset is None else dataset, encoder, path, **options)


@pytest.fixture(scope="module")
def complete(tmp_path_factory, encoder):
    """A complete store that no test changes: three shards, of 8, 8 and 7 images."""
    path = tmp_path_factory.mktemp("complete") / "store"
    write(path, encoder)
    return path


@pytest.fixture
def copy(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "copy")


def assert_same_files(path, other):
    assert sorted(os.listdir(path)) == sorted(FILES)
    for name in FILES:
        assert (path / name).read_bytes() == (other / name).read_bytes(), name


def spoil(path, change):
    metadata = json.loads((path / store_format.METADATA).read_text())
    change(metadata)
    (path / store_format.METADATA).write_text(json.dumps(metadata))


# ------------------------------------------------------------------------------------------ contents


def test_rows_are_the_encoders(complete, encoder):
    dataset, store = Digits(), EmbeddingStore(complete)
    samples = [dataset[i] for i in range(len(dataset))]
    captions = [caption for _, own in samples for caption in own]
    with torch.inference_mode():
        image = torch.cat([encoder.encode_image(encoder.preprocess(picture)[None]) for picture, _ in samples])
        text = torch.cat([encoder.encode_text(encoder.tokenizer([caption])) for caption in captions])
    torch.testing.assert_close(store.image, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(store.text, text, atol=1e-6, rtol=0)
    assert store.captions == captions
    assert store.caption_image.tolist() == [i for i, (_, own) in enumerate(samples) for _ in own]
    assert store.labels.tolist() == dataset.labels.tolist()
    assert store.metadata["source"]["model"] == encoder.name
    assert store.metadata["source"]["fingerprint"] == encoder.fingerprint()
    assert store.metadata["captions_per_image"] == len(captions) / len(samples)
    assert [shard["image.npy"]["rows"] for shard in store.metadata["shards"]] == [8, 8, 7]
    store.verify()


def test_labels_are_none_without_labels(tmp_path, encoder):
    assert write(tmp_path / "store", encoder, Digits(5, labelled=False)).labels is None


def test_images_without_any_caption(tmp_path, encoder):
    dataset = Digits(1)  # the first digit has no caption
    store = write(tmp_path / "store", encoder, dataset)
    store.verify()
    assert store.image.shape == (1, encoder.dim) and store.text.shape == (0, encoder.dim)
    assert store.captions == [] and store.caption_image.tolist() == []


def test_files_are_plain_npy_and_writing_to_tensors_leaves_them(copy):
    store, before = EmbeddingStore(copy), (copy / "image.npy").read_bytes()
    assert np.array_equal(np.load(copy / "image.npy"), store.image.numpy())
    store.image.zero_()
    assert (copy / "image.npy").read_bytes() == before


def test_worker_processes_write_the_same_bytes(tmp_path, complete, encoder):
    write(tmp_path / "store", encoder, num_workers=2)
    assert_same_files(tmp_path / "store", complete)


def test_half_precision_is_stored_as_float32(tmp_path, encoder):
    half = Altered(encoder, encode_image=lambda x: encoder.encode_image(x).half())
    store = write(tmp_path / "store", half)
    assert torch.equal(store.image, store.image.half().float())


# ---------------------------------------------------------------------------------------- ambiguity


class Known(Digits):
    """Digits that know how many images each caption fits."""

    def ambiguity(self):
        captions = [caption for i in range(len(self)) for caption in self[i][1]]
        return torch.tensor([sum(caption in self[i][1] for i in range(len(self))) for caption in captions])


def test_ambiguity_is_a_column_of_the_store(tmp_path, encoder, complete):
    store = write(tmp_path / "store", encoder, Known())
    assert store.ambiguity.equal(Known().ambiguity()) and store.ambiguity.unique().tolist() == [1, 2, 5]
    store.verify()
    assert EmbeddingStore(complete).ambiguity is None
    write(tmp_path / "store", encoder, overwrite=True)
    assert_same_files(tmp_path / "store", complete)


def test_a_store_from_before_the_column_opens_and_gets_it_without_encoding(copy, encoder):
    assert EmbeddingStore(copy).ambiguity is None
    before, dataset = {name: (copy / name).read_bytes() for name in store_format.DATA_FILES}, Known()
    expected = dataset.ambiguity()
    never = Altered(encoder, encode_image=pytest.fail, encode_text=pytest.fail)
    store = write(copy, never, dataset)
    assert store.ambiguity.equal(expected)
    store.verify()
    assert {name: (copy / name).read_bytes() for name in before} == before
    dataset.ambiguity = pytest.fail  # written once
    write(copy, never, dataset)


def test_a_damaged_or_wrong_ambiguity_is_named(tmp_path, encoder):
    dataset, file = Known(), tmp_path / "store" / store_format.AMBIGUITY
    store, data = write(tmp_path / "store", encoder, dataset), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"ambiguity\.npy: shard 0: expected sha256"):
        store.verify()
    os.truncate(file, len(data) - 1)
    with pytest.raises(ValueError, match=rf"ambiguity\.npy: expected {len(data)} bytes, got {len(data) - 1} bytes"):
        EmbeddingStore(tmp_path / "store")
    dataset.ambiguity = lambda: torch.ones(3)
    with pytest.raises(ValueError, match=r"expected the ambiguity of 33 captions, got \(3,\)"):
        write(tmp_path / "other", encoder, dataset)


# ----------------------------------------------------------------------------- once, and interruption


def test_complete_store_is_not_written_again(copy, encoder):
    before = [(copy / name).stat().st_mtime_ns for name in FILES]
    dataset = Digits()
    write(copy, encoder, dataset)
    assert dataset.reads == []
    assert [(copy / name).stat().st_mtime_ns for name in FILES] == before


@pytest.mark.parametrize(("stop", "kept"), [(1, 0), (7, 0), (8, 8), (13, 8), (22, 16)])
def test_interrupted_store_resumes_to_the_same_bytes(tmp_path, complete, encoder, stop, kept):
    path, dataset = tmp_path / "store", Digits()
    dataset.fail_at = {stop: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        write(path, encoder, dataset)
    with pytest.raises(ValueError, match=rf"incomplete store \({kept} of 23 images\)"):
        EmbeddingStore(path)
    dataset = Digits()
    write(path, encoder, dataset)
    assert set(dataset.reads) == set(range(kept, 23))
    assert_same_files(path, complete)


@pytest.mark.parametrize("call", range(1, 6))
def test_death_before_any_metadata_write_is_harmless(tmp_path, complete, encoder, monkeypatch, call):
    path, calls, replace = tmp_path / "store", [], os.replace

    def dying_replace(source, target):
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", dying_replace)
        write(path, encoder)
    write(path, encoder)
    assert_same_files(path, complete)


def test_resuming_with_another_encoder_names_the_difference(tmp_path, encoders):
    (encoder, other), path, dataset = encoders, tmp_path / "store", Digits()
    dataset.fail_at = {9: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        write(path, encoder, dataset)
    before = {name: (path / name).read_bytes() for name in FILES}
    with pytest.raises(ValueError, match=f"fingerprint is '{encoder.fingerprint()}' there, '{other.fingerprint()}'"):
        write(path, other)
    with pytest.raises(ValueError, match="dataset is 'digits' there, 'figures' here"):
        write(path, encoder, Digits(name="figures"))
    with pytest.raises(ValueError, match="images is 23 there, 24 here"):
        write(path, encoder, Digits(24))
    assert {name: (path / name).read_bytes() for name in FILES} == before


def test_another_transform_is_another_source(copy, encoder):
    """By its own description, also where a fingerprint does not tell."""
    changed = Altered(encoder, preprocess=type(encoder.preprocess)(encoder.preprocess.transforms[:-1]))
    assert changed.fingerprint() == encoder.fingerprint()
    with pytest.raises(ValueError, match=r"another source: transform is 'Compose\(.*Normalize.* there, 'Compose\("):
        write(copy, changed)


def test_overwrite_replaces_a_store_of_another_source(copy, complete, encoders):
    encoder, other = encoders
    with pytest.raises(ValueError, match="another source: fingerprint"):
        write(copy, other)
    store = write(copy, other, overwrite=True)
    store.verify()
    assert store.metadata["source"]["fingerprint"] == other.fingerprint()
    write(copy, encoder, overwrite=True)
    assert_same_files(copy, complete)


def test_interrupted_overwrite_leaves_no_readable_mixture(copy, encoder):
    dataset = Digits()
    dataset.fail_at = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        write(copy, encoder, dataset, overwrite=True)
    with pytest.raises(ValueError, match="incomplete"):
        EmbeddingStore(copy)


# --------------------------------------------------------------------------- whose place, whose turn


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", [["image.npy", "text.npy"], ["notes.txt", "a", "b", "c"]])
def test_what_is_no_store_is_left_alone(tmp_path, encoder, names, overwrite):
    for name in names:
        (tmp_path / name).write_text("mine")
    got = f"got one with {', '.join(sorted(names)[:3])}" + (" and 1 more" if len(names) > 3 else "$")
    with pytest.raises(ValueError, match=f"expected a new or empty directory or an embedding store, {got}"):
        write(tmp_path, encoder, overwrite=overwrite)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


def test_metadata_of_something_else_is_not_overwritten(tmp_path, encoder):
    (tmp_path / store_format.METADATA).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="expected store format 1"):
        write(tmp_path, encoder, overwrite=True)


def test_an_empty_directory_will_do(tmp_path, complete, encoder):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".metadata.json.123.tmp").write_text("what a process that was killed left")
    write(tmp_path, encoder)
    (tmp_path / ".metadata.json.123.tmp").unlink()
    assert_same_files(tmp_path, complete)


def test_files_beside_a_store_are_left_alone(copy, encoders):
    (copy / "notes.txt").write_text("mine")
    write(copy, encoders[1], overwrite=True)
    assert (copy / "notes.txt").read_text() == "mine"


def test_one_writer_at_a_time(tmp_path, complete, encoder):
    path, refused = tmp_path / "store", []

    class Meeting(Digits):
        def __getitem__(self, i):
            if i == 5:
                with pytest.raises(ValueError, match="is being written by process") as caught:
                    write(path, encoder)
                refused.append(str(caught.value))
            return super().__getitem__(i)

    write(path, encoder, Meeting())
    assert f"embed: {path} is being written by process {os.getpid()} of " in refused[0]
    assert_same_files(path, complete)
    read_only = [name for name in FILES if (path / name).chmod(0o400) is None]
    path.chmod(0o500)
    write(path, encoder)  # whole, so nothing is written and nothing locked
    path.chmod(0o700)
    assert sorted(os.listdir(path)) == sorted(read_only)


HOLDER = """
import os, sys
from fastprob._files import locked
with locked("holder", sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path, complete, encoder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is being written by process {holder.pid} of "):
            write(tmp_path, encoder)
        holder.kill()
    write(tmp_path, encoder)
    assert_same_files(tmp_path, complete)


@pytest.mark.parametrize("stop", [None, 9])
@pytest.mark.parametrize(("change", "named"), [("caption", "captions"), ("pixel", "files"), ("label", "captions")])
def test_changed_data_are_another_source(tmp_path, encoder, change, named, stop):
    """After a complete store and between a stop and what resumes it."""
    path = tmp_path / "store"
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for i, file in enumerate(files):
        Digits()[i][0].save(file)
    captions, labels = [[f"number {i}"] for i in range(12)], [i % 3 for i in range(12)]
    data = ImageCaptions("own", files, captions, labels)
    if stop is None:
        write(path, encoder, data)
    else:
        data.images = [*files[:stop], tmp_path / "torn.png", *files[stop + 1 :]]
        data.digests = ImageCaptions("own", files, captions, labels).digests
        with pytest.raises(OSError):
            write(path, encoder, data)
    if change == "caption":
        captions[2] = ["another number"]
    if change == "label":
        labels[2] = 1
    if change == "pixel":
        Digits()[11][0].save(files[2])
    with pytest.raises(ValueError, match=f"another source: {named} is '[0-9a-f]{{64}}' there, '[0-9a-f]{{64}}' here;"):
        write(path, encoder, ImageCaptions("own", files, captions, labels))


def test_pictures_are_opened_from_the_stores_own_data_alone(tmp_path, encoder):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Digits()[i][0].save(file)
    captions = [[f"number {i}"] for i in range(4)]
    store = write(tmp_path / "store", encoder, ImageCaptions("own", files, captions))
    pictures = pictures_of(store, ImageCaptions("own", files, captions))
    assert [pictures(i).tobytes() for i in (2, 0)] == [Digits()[i][0].tobytes() for i in (2, 0)]
    for other, differs in (
        (ImageCaptions("others", files, captions), "dataset is 'own' there, 'others' here"),
        (ImageCaptions("own", files[:3], captions[:3]), "images is 4 there, 3 here; captions is '"),
        (ImageCaptions("own", files, captions[::-1]), "captions is '"),
        (ImageCaptions("own", files[::-1], captions), "files is '"),
    ):
        expected = f"pictures_of: {store.path} was made from another data set: {differs}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            pictures_of(store, other)


# ------------------------------------------------------------------------------------------ full disk


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_space_is_checked_before_encoding(tmp_path, complete, encoder, monkeypatch):
    path, dataset = tmp_path / "store", Digits()
    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"MiB needed.*0 of 23") as caught:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
        write(path, encoder, dataset)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert set(dataset.reads) == {0}
    write(path, encoder)
    assert_same_files(path, complete)


@pytest.mark.parametrize("call", range(1, 16))
def test_disk_that_fills_up_leaves_a_resumable_store(tmp_path, complete, encoder, monkeypatch, call):
    """A file system may report a full disk at write or at fsync; every fsync of the run is tried."""
    path, calls, fsync = tmp_path / "store", [], os.fsync

    def filling_fsync(descriptor):
        calls.append(descriptor)
        full_disk() if len(calls) == call else fsync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"disk full.*images are stored") as caught:
        patched.setattr(os, "fsync", filling_fsync)
        write(path, encoder)
    assert caught.value.errno == errno.ENOSPC
    write(path, encoder)
    assert_same_files(path, complete)


def test_other_system_errors_stay_as_they_are(tmp_path, encoder):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "store", encoder)


# --------------------------------------------------------------------------------------- bad input


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no embedding store here"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("name", store_format.DATA_FILES)
def test_missing_truncated_or_longer_file_is_named(copy, name):
    file, size = copy / name, (copy / name).stat().st_size
    for got in (size - 1, 0, size + 4):
        os.truncate(file, got)
        with pytest.raises(ValueError, match=f"{name}: expected {size} bytes, got {got} bytes"):
            EmbeddingStore(copy)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}: expected {size} bytes, got no file"):
        EmbeddingStore(copy)


@pytest.mark.parametrize("name", store_format.DATA_FILES)
@pytest.mark.parametrize("shard", [0, 2])
def test_changed_byte_fails_verification_of_its_shard(copy, name, shard):
    store, data = EmbeddingStore(copy), bytearray((copy / name).read_bytes())
    data[-1 if shard else 200] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: shard {shard}: expected sha256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}"):
        store.verify()


def test_array_of_another_shape_or_type_is_refused(copy):
    image = np.load(copy / "image.npy")
    for wrong in (image.reshape(24, 23), image.view(np.int32)):
        np.save(copy / "image.npy", wrong)
        with pytest.raises(ValueError, match=r"image.npy: expected float32 \(23, 24\), got (int32|float32 \(24, 23\))"):
            EmbeddingStore(copy)
    (copy / "image.npy").write_bytes(bytes((copy / "image.npy").stat().st_size))
    with pytest.raises(ValueError, match=r"image.npy: expected an .npy array"):
        EmbeddingStore(copy)


def test_unreadable_metadata_is_refused(copy):
    spoil(copy, lambda metadata: metadata.update(format=99))
    with pytest.raises(ValueError, match=r"expected store format 1 .*, got format 99"):
        EmbeddingStore(copy)
    spoil(copy, lambda metadata: (metadata.update(format=1), metadata.pop("shards")))
    with pytest.raises(ValueError, match=r"metadata.json: expected store format 1 with .*shards"):
        EmbeddingStore(copy)
    for text in ("[]", '{"form'):
        (copy / store_format.METADATA).write_text(text)
        with pytest.raises(ValueError, match=r"metadata.json: expected"):
            EmbeddingStore(copy)


def test_damaged_partial_store_is_not_resumed(tmp_path, encoder):
    path, dataset = tmp_path / "store", Digits()
    dataset.fail_at = {17: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        write(path, encoder, dataset)
    data = bytearray((path / "text.npy").read_bytes())
    data[150] ^= 1
    (path / "text.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"text.npy: shard 0: expected sha256"):
        write(path, encoder)
    os.truncate(path / "text.npy", 200)
    with pytest.raises(ValueError, match=r"text.npy: expected \d+ bytes, got 200 bytes"):
        write(path, encoder)


class Altered:
    """An encoder with one method replaced."""

    def __init__(self, encoder, **methods):
        self._encoder, self._methods = encoder, methods

    def __getattr__(self, name):
        return self._methods.get(name) or getattr(self._encoder, name)


def test_malformed_encoder_output_is_refused(tmp_path, encoder):
    for wrong, message in (
        (lambda x: encoder.encode_image(x)[:, :20], r"must return \[3, 24\], got \[3, 20\]"),
        (lambda x: encoder.encode_image(x).index_fill(0, torch.tensor([1]), torch.nan), "infinity in 1 of 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "store", Altered(encoder, encode_image=wrong))


def test_bad_arguments(tmp_path, encoder):
    with pytest.raises(ValueError, match="batch_size and shard_size must be >= 1, got 0 and 8"):
        write(tmp_path / "store", encoder, batch_size=0)
    with pytest.raises(ValueError, match="data set 'digits' is empty"):
        write(tmp_path / "store", encoder, Digits(0))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected JSON, got: "),
        ("[" * 100_000, "expected JSON, got: "),
        ("7", "expected captions and label, got 7"),
        ('{"captions": ["a"]}', "expected captions and label, got {"),
        ('{"captions": "a", "label": null}', "expected captions and label, got {"),
        ('{"captions": [7], "label": null}', "expected captions and label, got {"),
        ('{"captions": ["a"], "label": "b"}', "expected captions and label, got {"),
        ('{"captions": [], "label": null, "id": 7}', "expected captions and label, got {"),
    ],
)
@pytest.mark.parametrize("column", ["captions", "caption_image", "labels", "ids"])
def test_damaged_captions_are_named(copy, line, expected, column):
    """A file of the recorded size; `verify` would have seen it."""
    store, file = EmbeddingStore(copy), copy / "captions.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = line
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        getattr(store, column)
    assert str(caught.value).startswith(f"{file}, line 5: {expected}")


def test_lost_captions_are_counted(copy):
    store, file = EmbeddingStore(copy), copy / "captions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"captions\.jsonl: expected 23 lines with 33 captions, got 22 with 31"):
        assert store.captions
