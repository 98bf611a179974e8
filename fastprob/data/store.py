"""The embedding store: a data set encoded once by a frozen encoder, then memory-mapped by everything else.

`embed` writes a store, `EmbeddingStore` opens one; `fastprob.data.store_format` describes the files. A
shard of images is appended at a time and then recorded, and the next call cuts off what is not recorded,
so an interrupted run (Ctrl-C, a kill, a full disk) costs at most one shard, and a resumed store is byte for
byte an uninterrupted one. Rows are appended with write(), not through a writable memory map: on a full disk
that would be a SIGBUS.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastprob._files import is_scratch, locked
from fastprob.data import store_format as on_disk
from fastprob.data.images import described
from fastprob.data.store_format import AMBIGUITY, CAPTIONS, DATA_FILES, IMAGE, LOST, TEXT
from fastprob.data.tokens import Lost, lost


class EmbeddingStore:
    """A complete store, opened without reading it: rows come from the disk when they are used.

    `image` [N, D] and `text` [M, D] are float32 tensors over a private memory map (writing to them does not
    reach the files). Raises FileNotFoundError when there is no store at `path`, ValueError when it is
    incomplete or a file is missing, truncated or of another shape, naming the file, what was expected and
    what was got.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        metadata = on_disk.read_metadata(self.path)
        if metadata is None:
            raise FileNotFoundError(errno.ENOENT, "no embedding store here", str(self.path))
        if not metadata["complete"]:
            done = f"{metadata['images']} of {metadata['source']['images']} images"
            raise ValueError(f"{self.path}: incomplete store ({done}); embed again to resume")
        on_disk.check_sizes(self.path, metadata)
        self.metadata = metadata
        self.dim: int = metadata["source"]["dim"]
        self.image = self._map(IMAGE, metadata["images"])  # [N, D]
        self.text = self._map(TEXT, metadata["texts"])  # [M, D]

    def __repr__(self) -> str:
        source, counts = self.metadata["source"], f"{len(self.image)} images, {len(self.text)} captions"
        described = f"{source['dataset']}, {source['model'] or 'unnamed encoder'}, {counts}, dim {self.dim}"
        return f"EmbeddingStore({self.path}: {described})"

    def _map(self, name: str, rows: int) -> Tensor:
        file = self.path / name
        try:
            array = np.load(file, mmap_mode="c", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{file}: expected an .npy array, got: {error}") from error
        if array.shape != (rows, self.dim) or array.dtype != np.float32:
            got = f"{array.dtype} {array.shape}"
            raise ValueError(f"{file}: expected float32 {(rows, self.dim)}, got {got}")
        return torch.from_numpy(array)

    @cached_property
    def _samples(self) -> list[dict[str, Any]]:
        return on_disk.read_samples(self.path, self.metadata)

    @cached_property
    def captions(self) -> list[str]:
        """M captions, in the order of `text`."""
        return [caption for sample in self._samples for caption in sample["captions"]]

    @cached_property
    def caption_image(self) -> Tensor:
        """[M] int64: the row of `image` that each caption was written for."""
        counts = torch.tensor([len(sample["captions"]) for sample in self._samples])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    @cached_property
    def labels(self) -> Tensor | None:
        """[N] int64 class labels, or None when the data set has none."""
        labels = [sample["label"] for sample in self._samples]
        return None if None in labels else torch.tensor(labels)

    @cached_property
    def ids(self) -> list[str] | None:
        """[N] what each image is called in its source, or None when the data set does not say."""
        ids = [sample.get("id") for sample in self._samples]
        return None if None in ids else ids

    @cached_property
    def ambiguity(self) -> Tensor | None:
        """[M] int64: how many of the images each caption fits.

        None when the data set does not know it, and in a store from before this column: `embed` adds it there.
        """
        return torch.from_numpy(np.load(self.path / AMBIGUITY)) if AMBIGUITY in self.metadata else None

    @property
    def encoder(self) -> dict[str, Any]:
        """The encoder of these embeddings: model, pretrained, dim and fingerprint."""
        return {key: self.metadata["source"][key] for key in ("model", "pretrained", "dim", "fingerprint")}

    @property
    def lost(self) -> Lost | None:
        """What the encoder's tokenizer loses of the captions, or None where that is not known."""
        return Lost(**self.metadata[LOST]) if LOST in self.metadata else None

    def verify(self) -> None:
        """Read every byte; raises ValueError naming the first file and shard whose checksum differs."""
        on_disk.verify(self.path, self.metadata)


def embed(
    dataset: Any,
    encoder: Any,
    path: str | Path,
    *,
    batch_size: int = 256,
    shard_size: int = 4096,
    num_workers: int = 0,
    max_lost: float = 0.1,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingStore:
    """Encode `dataset` with `encoder` into a store at `path`, once; return the opened store.

    `dataset` has `len()`, `name`, `[i] -> (PIL image, list of captions)` and optionally `labels` [N], `ids` [N], the
    images' names, `captions`, all of them, `ambiguity() -> [M]`, how many of the images each caption fits,
    `digests() -> {name: str}` of what may change under its name, captions and image files, and `skipped`, a dict for
    each row of it that was left out; `encoder` is what `fastprob.encoders.load_encoder` returns. A complete store from
    the same source, by names and digests, is returned as it is, but for an ambiguity that it lacks, a partial one is
    checked and resumed, `overwrite` starts a store afresh. `shard_size` images are secured at a time; with equal
    `batch_size`, `shard_size` and thread count, an interrupted run ends in the same bytes as an uninterrupted one.

    Raises ValueError when `path` holds anything but a store, when the store there came from another data set or
    encoder (naming the difference), is damaged, or is being written by another process, when the tokenizer cuts off
    more than the share `max_lost` of the `captions` or does not know more than that of their tokens, and when the
    encoder's output is malformed; OSError (ENOSPC) when the disk is full or would become so, leaving a store that the
    same call resumes.
    """
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"embed: batch_size and shard_size must be >= 1, got {batch_size} and {shard_size}")
    if len(dataset) == 0:
        raise ValueError(f"embed: data set {dataset.name!r} is empty")
    content = _Encoded(dataset, encoder, batch_size, shard_size, num_workers, max_lost)
    return write_store(path, content, overwrite=overwrite, progress=progress)


def check_same_encoder(encoder: dict[str, Any], owner: str, store: EmbeddingStore) -> None:
    """Raise ValueError where the encoder of `owner`, its name in the message, is known not to be the store's.

    Equal widths are not enough: adapters do not transfer between encoders. Arrays may have no more than a name, or not
    even that: what one of the two does not know can't be compared.
    """
    for key in ("fingerprint", "model"):
        if encoder[key] is not None and store.encoder[key] is not None:
            if encoder[key] != store.encoder[key]:
                raise ValueError(f"{owner} and {store.path} are of different encoders: {encoder} and {store.encoder}")
            return


def pictures_of(store: EmbeddingStore, dataset: Any) -> Callable[[int], Image]:
    """What opens the picture of a row of `store.image`, which the data set has that the store was made from.

    Raises ValueError, with what differs, unless name, number of images and digests are those of the store.
    """
    what = _differences(store.metadata["source"], _of_dataset(dataset))
    if what:
        raise ValueError(f"pictures_of: {store.path} was made from another data set: {what}")
    return lambda row: dataset[row][0]


Block = dict[str, tuple[int, bytes]]
"""Rows and bytes that some images add to each data file."""


class Content(Protocol):
    """What a store is filled with."""

    source: dict[str, Any]
    """dataset, images (their number), dim, the encoder's model, pretrained and fingerprint, and digests of all that
    the store's numbers depend on."""
    skipped: Sequence[dict[str, str]]
    """Rows of the source that were left out."""
    ambiguity: Callable[[], Any] | None
    """Returns how many of the images each caption fits, [M]."""

    def describe(self) -> dict[str, Any]:
        """What else a new store's metadata say. Raises ValueError where it should not be made."""

    def shards(self, done: int) -> Iterator[Iterable[Block]]:
        """What follows the first `done` images, in shards, each of which is secured."""

    def bytes_left(self, done: int) -> int:
        """About how many bytes those take."""


def write_store(path: str | Path, content: Content, *, overwrite: bool, progress: bool) -> EmbeddingStore:
    """Write what the store at `path` lacks of `content`, and open it. Raises as `embed`."""
    path = Path(path)
    _check_place(path)
    if overwrite or not _is_whole(path, content):
        with locked("embed", path):
            stored = None if overwrite else on_disk.read_metadata(path)
            metadata = on_disk.new_metadata(content.source) if stored is None else stored
            _check_source(path, metadata["source"], content.source)
            with _explain_full_disk(path, metadata):
                _write(path, metadata, content, progress)
    return EmbeddingStore(path)


def _is_whole(path: Path, content: Content) -> bool:
    """Whether nothing is left to do. Raises ValueError for a store of another source."""
    metadata = on_disk.read_metadata(path)
    if metadata is None:
        return False
    _check_source(path, metadata["source"], content.source)
    return metadata["complete"] and (AMBIGUITY in metadata or content.ambiguity is None)


def _write(path: Path, metadata: dict[str, Any], content: Content, progress: bool) -> None:
    """Write what the store lacks."""
    if not metadata["complete"]:
        if not metadata["shards"]:
            metadata |= content.describe()
        _prepare(path, metadata, content.skipped)
        _check_space(path, content.bytes_left(metadata["images"]))
        done, total = metadata["images"], metadata["source"]["images"]
        with tqdm(total=total, initial=done, unit="image", disable=not progress) as bar:
            for shard in content.shards(done):
                _append_shard(path, metadata, shard, bar)
        _finish(path, metadata)
    if content.ambiguity is not None and AMBIGUITY not in metadata:
        on_disk.write_ambiguity(path, metadata, np.asarray(content.ambiguity()))


def _append_shard(path: Path, metadata: dict[str, Any], shard: Iterable[Block], bar: tqdm) -> None:
    """Append blocks to the data files, then record rows, bytes and sha256 of each file."""
    record: dict[str, dict[str, Any]] = {
        name: {"rows": 0, "bytes": 0, "sha256": hashlib.sha256()} for name in DATA_FILES
    }
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path / name, "ab")) for name in DATA_FILES}
        for block in shard:
            for name, (rows, data) in block.items():
                files[name].write(data)
                record[name]["rows"] += rows
                record[name]["bytes"] += len(data)
                record[name]["sha256"].update(data)
            bar.update(block[IMAGE][0])
        for name, file in files.items():
            on_disk.sync(file)
            record[name]["sha256"] = record[name]["sha256"].hexdigest()
    metadata["shards"].append(record)
    metadata["images"] += record[IMAGE]["rows"]
    metadata["texts"] += record[TEXT]["rows"]
    on_disk.write_metadata(path, metadata)


def sample_line(captions: list[str], label: int | None, id: str | None) -> bytes:
    """An image's line of captions.jsonl."""
    about = {"captions": captions, "label": label, **({} if id is None else {"id": id})}
    return (json.dumps(about, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------- encoding


class _Encoded:
    """The `Content` that an encoder makes of a data set."""

    def __init__(self, dataset: Any, encoder: Any, batch_size: int, shard_size: int, num_workers: int, max_lost: float):
        self.dataset, self.encoder, self.max_lost = dataset, encoder, max_lost
        self.batch_size, self.shard_size, self.num_workers = batch_size, shard_size, num_workers
        self.source = _source(dataset, encoder)
        self.skipped = getattr(dataset, "skipped", ())
        self.ambiguity = getattr(dataset, "ambiguity", None)

    def describe(self) -> dict[str, Any]:
        """What the tokenizer loses of the captions."""
        captions = getattr(self.dataset, "captions", None)  # M, or a list of every image's
        if captions is None:
            return {}
        texts = [text for each in captions for text in ([each] if isinstance(each, str) else each)]
        of_tokenizer = lost(self.encoder.tokenizer, texts)
        if max(of_tokenizer.cut, of_tokenizer.unknown) > self.max_lost:
            limit = f"expected at most {self.max_lost:.1%} (max_lost)"
            raise ValueError(f"embed: {self.encoder.name} does not read these captions: {of_tokenizer}; {limit}")
        return {LOST: asdict(of_tokenizer)}

    def shards(self, done: int) -> Iterator[Iterable[Block]]:
        """No batch crosses a shard."""
        total, size = len(self.dataset), self.batch_size
        shards = [range(start, min(start + self.shard_size, total)) for start in range(done, total, self.shard_size)]
        batches = [[list(shard[i : i + size]) for i in range(0, len(shard), size)] for shard in shards]
        indices = [batch for shard in batches for batch in shard]
        samples = _Samples(self.dataset, self.encoder.preprocess)
        options = {"batch_sampler": indices, "num_workers": self.num_workers, "collate_fn": list}
        loader = iter(DataLoader(samples, **options))
        for shard in batches:
            yield (_encode(self.encoder, next(loader), size) for _ in shard)

    def bytes_left(self, done: int) -> int:
        """Supposing captions as in the next sample."""
        left = len(self.dataset) - done
        if left == 0:
            return 0
        _, captions = self.dataset[done]
        return left * (4 * self.source["dim"] * (1 + len(captions)) + len(sample_line(captions, None, None)))


class _Samples(Dataset):
    """(preprocessed image [C, H, W], captions, line of captions.jsonl) of a sample: the part of worker processes."""

    def __init__(self, dataset: Any, preprocess: Any):
        self.dataset, self.preprocess = dataset, preprocess
        self.labels, self.ids = getattr(dataset, "labels", None), getattr(dataset, "ids", None)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str], bytes]:
        image, captions = self.dataset[index]
        label = None if self.labels is None else int(self.labels[index])
        line = sample_line(list(captions), label, None if self.ids is None else self.ids[index])
        return self.preprocess(image), list(captions), line


def _encode(encoder: Any, samples: list[Any], batch_size: int) -> Block:
    images = torch.stack([image for image, _, _ in samples])  # [B, C, H, W]
    texts = [caption for _, captions, _ in samples for caption in captions]
    lines = [line for _, _, line in samples]
    return {
        IMAGE: (len(samples), _encode_images(encoder, images).tobytes()),
        TEXT: (len(texts), _encode_texts(encoder, texts, batch_size).tobytes()),
        CAPTIONS: (len(lines), b"".join(lines)),
    }


@torch.inference_mode()
def _encode_images(encoder: Any, images: Tensor) -> np.ndarray:
    """[B, C, H, W] -> [B, D] float32."""
    return _rows(encoder, encoder.encode_image(images), len(images))


@torch.inference_mode()
def _encode_texts(encoder: Any, texts: list[str], batch_size: int) -> np.ndarray:
    """K captions -> [K, D] float32. A caption that occurs several times is encoded once."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = list(row_of)
    blocks = [np.empty((0, encoder.dim), np.float32)]
    for start in range(0, len(unique), batch_size):
        chunk = unique[start : start + batch_size]
        blocks.append(_rows(encoder, encoder.encode_text(encoder.tokenizer(chunk)), len(chunk)))
    return np.concatenate(blocks)[np.array([row_of[text] for text in texts], dtype=int)]


def _rows(encoder: Any, embedding: Tensor, count: int) -> np.ndarray:
    """[count, D] in any dtype, on any device -> float32. Raises ValueError for another shape, NaN or inf."""
    if embedding.shape != (count, encoder.dim):
        got = list(embedding.shape)
        raise ValueError(f"embed: {encoder.name} must return [{count}, {encoder.dim}], got {got}")
    rows = embedding.float().cpu().numpy()
    bad = (~np.isfinite(rows)).any(axis=1).sum()
    if bad:
        raise ValueError(f"embed: {encoder.name} returned NaN or infinity in {bad} of {count} rows")
    return rows


# ------------------------------------------------------------------------- before and after encoding


def _source(dataset: Any, encoder: Any) -> dict[str, Any]:
    """What the stored numbers depend on, and where the weights came from."""
    return {
        **_of_dataset(dataset),
        "model": encoder.name,
        "pretrained": None if encoder.pretrained is None else str(encoder.pretrained),
        "fingerprint": encoder.fingerprint(),
        "transform": described(encoder.preprocess),
        "dim": int(encoder.dim),
    }


def _of_dataset(dataset: Any) -> dict[str, Any]:
    digests = dataset.digests() if hasattr(dataset, "digests") else {}
    return {"dataset": dataset.name, "images": len(dataset), **digests}


def _check_place(path: Path) -> None:
    """Raises ValueError where there is something else than a store, which is somebody's own."""
    if path.exists() and on_disk.read_metadata(path) is None:
        found = sorted(entry.name for entry in path.iterdir() if not is_scratch(entry.name))
        if found:
            got = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise ValueError(f"{path}: expected a new or empty directory or an embedding store, got one with {got}")


def _check_source(path: Path, stored: dict[str, Any], source: dict[str, Any]) -> None:
    """Raises ValueError unless both are the same; weights may have moved, their fingerprint says which they are."""
    what = _differences(stored, source)
    if what:
        raise ValueError(f"{path}: this store has another source: {what}; overwrite it or take a new path")


def _differences(stored: dict[str, Any], source: dict[str, Any]) -> str:
    keys = [key for key in source if key != "pretrained" and stored.get(key, source[key]) != source[key]]
    return "; ".join(f"{key} is {stored.get(key)!r} there, {source[key]!r} here" for key in keys)


def _prepare(path: Path, metadata: dict[str, Any], skipped: Sequence[dict[str, str]]) -> None:
    """Check what is stored and cut off what a stopped run wrote after it; or begin a new store's files."""
    resume = bool(metadata["shards"])
    if resume:
        on_disk.verify(path, metadata)
    else:
        on_disk.write_metadata(path, metadata)  # from here on, an old store here counts as overwritten
        (path / AMBIGUITY).unlink(missing_ok=True)
        on_disk.write_skipped(path, skipped)
    for name in DATA_FILES:
        with open(path / name, "r+b" if resume else "wb") as file:
            file.write(on_disk.header(metadata, name))
            file.truncate(on_disk.size(metadata, name))


def _finish(path: Path, metadata: dict[str, Any]) -> None:
    """Put the final row counts into the headers, then declare the store complete."""
    for name in (IMAGE, TEXT):
        with open(path / name, "r+b") as file:
            file.write(on_disk.header(metadata, name))
            on_disk.sync(file)
    metadata["captions_per_image"] = metadata["texts"] / metadata["images"]
    metadata["complete"] = True
    on_disk.write_metadata(path, metadata)


def _check_space(path: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) when the rest will not fit."""
    free = shutil.disk_usage(path).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"about {needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free")


@contextlib.contextmanager
def _explain_full_disk(path: Path, metadata: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        kept = f"{metadata['images']} of {metadata['source']['images']} images are stored"
        message = f"disk full ({error.strerror}): {kept}; free some space and embed again to resume"
        raise OSError(errno.ENOSPC, message, str(path)) from error
