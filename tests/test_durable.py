"""Files and folders that appear whole or not at all; tensors to safetensors and back."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError

from bitnet import durable
from bitnet.durable import (
    each_tensor,
    new_folder,
    recover,
    remove_folder,
    save_tensors,
    write_atomic,
)


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_atomic_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_atomic(tmp_path / "a", b"one")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == {"a"}


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "folder"
    with new_folder(path) as aside:
        (aside / "a").write_text("a")
        (aside / "a").chmod(0o600)
        assert not path.exists()
    assert names(path) == {"a"}
    assert names(path.parent) == {"folder"}
    assert (path / "a").stat().st_mode & 0o777 == path.stat().st_mode & 0o666


def test_new_folder_replaces_and_follows_links(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as aside:
        (aside / "a").write_text("old")
    (tmp_path / "link").symlink_to("folder")
    with new_folder(tmp_path / "link") as aside:
        (aside / "b").write_text("new")
    assert names(tmp_path / "folder") == {"b"}
    assert names(tmp_path) == {"folder", "link"}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_new_folder_undoes_itself(tmp_path: Path, existing: bool, error: BaseException) -> None:
    path = tmp_path / "folder"
    if existing:
        with new_folder(path) as aside:
            (aside / "a").write_text("old")

    def fail() -> None:
        with new_folder(path) as aside:
            (aside / "a").write_text("new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == ({"folder"} if existing else set())
    assert not existing or (path / "a").read_text() == "old"


def test_new_folder_whose_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as aside:
        (aside / "a").write_text("old")
    rename = Path.rename

    def fails_from_aside(self: Path, target: Path) -> Path:
        return full_disk() if self.name.startswith(".tmp-") else rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_from_aside)
    with pytest.raises(OSError, match="No space left"), new_folder(path) as aside:
        (aside / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == {"folder"}


def test_recover_keeps_whole_folders_and_drops_halves(tmp_path: Path) -> None:
    for name in (".old-lost", ".old-kept", "kept", ".tmp-half", "untouched"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    (tmp_path / ".tmp-file").write_text("half")
    recover(tmp_path)
    assert names(tmp_path) == {"lost", "kept", "untouched"}
    assert (tmp_path / "lost/was").read_text() == ".old-lost"
    assert (tmp_path / "kept/was").read_text() == "kept"
    recover(tmp_path / "nowhere")


def test_remove_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("folder", ".tmp-folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == set()


def test_tensors_of_every_kind_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    floats = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    ints = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
    tensors = {str(dtype): (base * 9).to(dtype) for dtype in floats + ints}
    tensors |= {
        "0-d": torch.tensor(3.0),
        "0-d int": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4),
        "special": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45]),
        "base": base,
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "slice": base[2:4],
        "bits": base.view(torch.int32),
        "parameter": torch.nn.Parameter(base + 1),
    }
    assert save_tensors(tmp_path / "a.safetensors", tensors) == {}
    loaded = dict(each_tensor(tmp_path / "a.safetensors"))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same = loaded[name]
        assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape), name
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = integer[tensor.element_size()]
        assert torch.equal(same.view(bits), tensor.detach().contiguous().view(bits)), name


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    tensors = {"embed": weight, "twin": weight.clone(), "head": torch.nn.Parameter(weight)}
    assert save_tensors(tmp_path / "a.safetensors", tensors) == {"head": "embed"}
    assert dict(each_tensor(tmp_path / "a.safetensors")).keys() == {"embed", "twin"}
    assert (tmp_path / "a.safetensors").stat().st_size < 2.1 * weight.nbytes


def test_a_file_of_no_tensors_loads(tmp_path: Path) -> None:
    assert save_tensors(tmp_path / "a.safetensors", {}) == {}
    assert dict(each_tensor(tmp_path / "a.safetensors")) == {}


def test_loaded_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.arange(5000.0), "b": torch.tensor(1, dtype=torch.int8)})
    loaded = dict(each_tensor(path))
    os.truncate(path, 0)  # a mapping of the file would now end the process with SIGBUS
    assert torch.equal(loaded["a"], torch.arange(5000.0))
    assert loaded["a"].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x80\x04.", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"\2" + bytes(7)],
)
def test_garbage_is_not_safetensors(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(garbage)
    with pytest.raises((SafetensorError, OSError)):
        dict(each_tensor(tmp_path / "a.safetensors"))


def test_a_real_write_error_is_an_oserror_with_its_errno(tmp_path: Path) -> None:
    """The kernel refuses the write (a file size limit), in safetensors' own code."""
    script = f"""
import errno, resource, torch
from pathlib import Path
from bitnet.durable import new_folder, save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with new_folder(Path({str(tmp_path)!r}) / "folder") as aside:
        save_tensors(aside / "a.safetensors", {{"a": torch.zeros(100_000)}})
except OSError as error:
    print(error.errno == errno.EFBIG)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert names(tmp_path) == set()


def test_the_order_that_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, then the folder of their names, then the rename, then the folder it is in."""
    events: list[str] = []
    fsync, rename = durable.fsync, Path.rename

    def recorded_fsync(path: Path) -> None:
        events.append(f"fsync {path.name}")
        fsync(path)

    def recorded_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name} {target.name}")
        return rename(self, target)

    monkeypatch.setattr(durable, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    with durable.new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert sorted(events[:2]) == ["fsync a", "fsync b"]
    assert events[2:] == ["fsync .tmp-new", "rename .tmp-new new", f"fsync {tmp_path.name}"]
