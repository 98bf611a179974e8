"""Files that are there whole or not at all, weights in them, and directories with one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new name beside `path` for a file to write; it replaces the file at `path` in one step at the end.

    Who reads it sees the old content or the new, also if the process dies. What is left after an error is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write's error names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: str | bytes, *, durable: bool = False) -> None:
    """Replace the file at `path` in one step, see `replaced`.

    content: bytes, or text (UTF-8).
    durable: flush to the disk first, so that a power cut too leaves one of the two; a full disk is then an OSError.
    """
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())


LOCK = ".lock"


def is_scratch(name: str) -> bool:
    """Whether a file of this name is a lock, or what a process that died in `write_atomically` left."""
    return name == LOCK or re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


@contextlib.contextmanager
def locked(who: str, directory: str | os.PathLike) -> Iterator[None]:
    """Make the directory if need be, and keep all others that ask by this function from writing into it.

    The lock is the system's and ends with its process, so none is ever stale; the file names its owner. Raises
    ValueError, as `who`, with that name where another process or thread writes there.
    """
    file = Path(directory) / LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(open(file, "a+", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read() or "another process"
                raise ValueError(f"{who}: {directory} is being written by {owner}; wait for it or stop it") from None
            if file.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                break  # else its owner before took it away meanwhile
        lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"process {os.getpid()} of {getpass.getuser()} on {socket.gethostname()} since {since}")
        lock.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace the safetensors file at `path` in one step. Equal contents are equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = to_safetensors(tensors, metadata)  # a length of 8 bytes, a header in JSON with the metadata in any order
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    write_atomically(path, data[:8] + header.encode().ljust(end - 8) + data[end:])


def read_pickle(who: str, path: str | os.PathLike) -> Any:
    """What `torch.save` wrote of tensors and plain types, on the CPU. Raises ValueError, as `who`, for another file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, where the file is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0]  # torch goes on to recommend to trust the file
        raise ValueError(f"{who}: {path} must be a checkpoint, it can't be read: {why}") from error


def is_state_dict(value: Any) -> bool:
    """Whether these are tensors by name."""
    return isinstance(value, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())


def read_tensors(who: str, path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file. Raises ValueError, as `who`, for another file."""
    try:
        with safe_open(Path(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who}: {path} must be a safetensors file: {error}") from error
