"""Files and folders that appear whole or not at all, whatever the moment of a crash.

The recipe for a folder: write everything under a name nobody reads (`.tmp-<name>`, in the same
parent, since a rename is atomic only within a filesystem), fsync each file and the folder, rename,
fsync the parent. The fsyncs come before the rename so that a power cut cannot leave the new name on
old contents, and after it so that the new name itself is on the disk. Removing goes the other way
round, rename first, so that half a folder never carries the name of a whole one.

Checkpoints (checkpoint.py) and model folders (export/folder.py) are written this way, and their
tensors by :func:`save_tensors`.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitnet.schema import check_file, user_input


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    """mkdir -p whose new entries survive a power cut."""
    missing = takewhile(lambda folder: not folder.is_dir(), (path, *path.parents))
    for folder in reversed(list(missing)):
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, replacing what was there. Raises as
    :func:`new_file`."""
    with new_file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write; when the block ends, it *is* ``path``, in place of what
    was there. Folders that are missing are made.

    Raises:
        UserError: ``path`` is a folder, or something else that is no file.
        OSError: the disk is full, the folder is read-only, ...; and whatever the block raises. What
            was there is untouched.
    """
    if os.path.lexists(path):
        check_file(path)
    _make_folder(path.parent)
    aside = path.with_name(f".tmp-{path.name}")
    try:
        yield aside
        fsync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def check_output(option: str, path: Path) -> None:
    """Raise UserError, naming the option, where a file cannot be written: before the work whose
    results it is to hold. Its folder is made."""
    with user_input(f"{option}: cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:64]}-"):
            pass
        if os.path.lexists(path):  # a circle of links does not "exist"
            check_file(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to write files into; when the block ends, it *is* ``path``.

    No filesystem call that Python has swaps two folders, so replacing an existing folder takes two
    renames: the old one to `.old-<name>`, the new one to its place. Killed between the two,
    ``path`` is missing and the old folder is whole under the other name; :func:`recover` renames
    it back.

    Raises:
        UserError: ``path`` cannot be a folder's.
        OSError: and whatever the block raises; what was at ``path`` is untouched then.
    """
    with user_input(str(path)):  # it may be a circle of links
        path = path.resolve()  # a link to a folder stays a link: what it points to is replaced
    aside, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".old-{path.name}")
    _make_folder(path.parent)
    if aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        yield aside
        mode = aside.stat().st_mode & 0o666  # safetensors creates files that only the owner reads
        for file in aside.iterdir():
            file.chmod(mode)
            fsync(file)
        fsync(aside)
        if path.exists():
            if old.exists():
                shutil.rmtree(old)
            path.rename(old)
        aside.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(parent: Path) -> None:
    """Tidy up after a crash: finish or undo what :func:`new_folder` and :func:`remove_folder` had
    begun in ``parent``. For the one process that writes there, never for a reader."""
    for old in sorted(parent.glob(".old-*")):
        path = parent / old.name.removeprefix(".old-")
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for aside in sorted(parent.glob(".tmp-*")):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder; a crash leaves it whole or gone (and a `.tmp-` for :func:`recover`)."""
    aside = path.with_name(f".tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> an earlier name of the same object or the same view of the same memory: a tied
    weight."""
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        key: object = id(tensor)
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():  # others hide their memory
            key = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if (earlier := first.setdefault(key, name)) != name:
            aliases[name] = earlier
    return aliases


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, str]:
    """Write a safetensors file, which can hold neither shared nor strided memory.

    A tensor that is the same view of the same memory as an earlier one (a tied weight) is stored
    once and returned as an alias; other views become contiguous copies.

    Arguments:
        tensors: any shapes (0-d and empty ones too), dtypes that safetensors has, any device.
        metadata: texts for the file's header.
    Returns:
        alias -> stored name.
    Raises:
        OSError: with the errno of a full disk, say, which safetensors hides in its own error.
    """
    stored: dict[str, Tensor] = {}
    aliases = find_aliases(tensors)
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        if name in aliases:
            continue
        contiguous = tensor.detach().contiguous()
        storage = (contiguous.device, contiguous.untyped_storage().data_ptr())
        stored[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    try:
        save_file(stored, path, metadata)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    return aliases


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name, each read when its turn comes.

    safetensors maps the file. Tensors inside a mapping are not aligned (the last bit of a BLAS
    result may depend on alignment), keep a deleted file's blocks on the disk, and end the process
    with SIGBUS where the file shrinks; so each is copied. The pages that were read count as the
    process's memory as long as the mapping lasts; so each tensor has its own.

    Raises:
        SafetensorError, OSError: not a safetensors file, unreadable.
    """
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name).clone()
        yield name, tensor
