"""Checkpoints: exact, whole or absent, believed only after they are checked."""

import json
import os
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitnet.schema import UserError
from bitnet.training.checkpoint import (
    CheckpointConfig,
    DamagedError,
    best,
    load,
    load_newest,
    prune,
    resume,
    save,
)
from tests.helpers.checkpoints import is_whole, names, write

# What is saved comes back.


def test_config_is_strict() -> None:
    for wrong in ({"every": 0}, {"keep_last": 0}, {"keep_best": 1}, {"evry": 5}):
        with pytest.raises(ValidationError):
            CheckpointConfig(**wrong)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = torch.randn(5, 4)
    groups: dict[str, dict[str, Tensor]] = {
        "model": {"embed.weight": tied, "head.weight": tied, "t": tied.t(), "z": torch.tensor(1)},
        "ema": {"w": torch.randn(3).bfloat16()},
        "none": {},
    }
    state = {
        "loss": [0.1, 1 / 3, 5e-324, float("inf")],
        "big": 2**70,
        "text": "ü \ud800 \n",
        "nothing": None,
        "nested": {"a": [True, {}]},
    }
    path = save(tmp_path / "run" / "checkpoints", 100, groups, state, val_loss=1 / 3)
    assert path.name == "step_00000100"
    assert names(path.parent) == {path.name}
    expected = {"manifest.json", "state.json", "tensors.json"} | {
        f"{group}.safetensors" for group in groups
    }
    assert names(path) == expected

    loaded = load_newest(path.parent)
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.val_loss) == (100, path, 1 / 3)
    assert loaded.damaged == []
    assert loaded.state == state
    assert loaded.tensors.keys() == groups.keys()
    for group, named in groups.items():
        assert loaded.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(loaded.tensors[group][name], tensor)
            assert loaded.tensors[group][name].dtype == tensor.dtype
    assert loaded.tensors["model"]["head.weight"] is loaded.tensors["model"]["embed.weight"]


def test_nothing_to_load(tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path):
        assert load_newest(root) is None
        assert resume(root) is None
    (tmp_path / "step_1").mkdir()  # not a name that save gives
    (tmp_path / "step_000000001").mkdir()
    assert load_newest(tmp_path) is None


def test_group_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    for group in ("../model", "a.b", ""):
        with pytest.raises(ValueError, match="tensors"):
            save(tmp_path / "root", 1, {group: {}}, {})
    assert names(tmp_path) == set()


def test_steps_order_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        write(tmp_path, step)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 100_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5, 3.0)
    save(tmp_path, 5, {"model": {"w": torch.zeros(2)}}, {"second": True})
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.state == {"second": True}
    assert newest.tensors.keys() == {"model"}
    assert names(tmp_path) == {"step_00000005"}


# Which are kept.


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (1, False, {6}),
        (1, True, {2, 6}),
        (2, True, {2, 5, 6}),
        (5, True, {2, 3, 4, 5, 6}),
        (9, 0, range(1, 7)),
    ],
)
def test_prune(tmp_path: Path, keep_last: int, keep_best: bool, kept: set[int]) -> None:
    losses = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: float("nan"), 6: float("-inf")}
    for step, loss in losses.items():
        write(tmp_path, step, loss)
    prune(tmp_path, keep_last, keep_best)
    assert names(tmp_path) == {f"step_{step:08d}" for step in kept}


def test_best_survives_damage(tmp_path: Path) -> None:
    assert best(tmp_path) is None
    paths = {step: write(tmp_path, step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0))}
    write(tmp_path, 4)
    assert best(tmp_path) == paths[3], "the newest of equals"
    (paths[3] / "manifest.json").write_text("{}")
    assert best(tmp_path) == paths[2]
    (paths[2] / "manifest.json").unlink()
    assert best(tmp_path) == paths[1]
    prune(tmp_path, 1, keep_best=True)
    assert names(tmp_path) == {"step_00000001", "step_00000004"}


# What is damaged is found and named.


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2.5)
    checked = 0
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        stride = 1 if file.name == "manifest.json" else 7
        for i in range(0, len(data), stride):
            flipped = bytearray(data)
            flipped[i] ^= 1 << (i % 8)
            file.write_bytes(flipped)
            with pytest.raises(DamagedError, match="damaged"):
                load(path)
            checked += 1
        file.write_bytes(data)
    assert checked > 500
    assert is_whole(load(path))


def test_every_case_flip_in_the_manifest_is_found(tmp_path: Path) -> None:
    """Bit 5 turns `a` into `A` and a space into NUL: where JSON might look the other way."""
    manifest = write(tmp_path, 1, 2.5) / "manifest.json"
    data = manifest.read_bytes()
    for i in range(len(data)):
        manifest.write_bytes(data[:i] + bytes([data[i] ^ 32]) + data[i + 1 :])
        with pytest.raises(DamagedError, match="damaged"):
            load(manifest.parent)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for length in {0, 1, 7, 8, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:length])
            with pytest.raises(DamagedError, match=file.name):
                load(path)
        file.write_bytes(data + b"\0")
        with pytest.raises(DamagedError, match=file.name):
            load(path)
        file.write_bytes(data)


def _rename_to_other_step(path: Path) -> None:
    path.rename(path.with_name("step_00000009"))


def _rewrite_manifest(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest))


def _missing_tensors(path: Path) -> None:
    (path / "optim.safetensors").unlink()


def _missing_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _added_file(path: Path) -> None:
    (path / "notes.txt").write_text("hello")


def _added_folder(path: Path) -> None:
    (path / "model").mkdir()


def _file_became_folder(path: Path) -> None:
    (path / "state.json").unlink()
    (path / "state.json").mkdir()


def _not_a_folder(path: Path) -> None:
    _missing_tensors(path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("")


def _deep_json(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_rename_to_other_step, "manifest.json: it is the manifest of step 5"),
        (_rewrite_manifest, "manifest.json: it is not spelled as it was written"),
        (_missing_tensors, "optim.safetensors: it is missing"),
        (_missing_manifest, "manifest.json: it is missing"),
        (_added_file, "notes.txt: it is not in the manifest"),
        (_added_folder, "model: it is not in the manifest"),
        (_file_became_folder, "state.json: "),
        (_not_a_folder, "manifest.json: "),
        (_deep_json, "manifest.json: "),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path, 3)
    write(tmp_path, 4)
    damage(write(tmp_path, 5))
    before = names(tmp_path)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 4
    assert is_whole(newest)
    (message,) = newest.damaged
    assert reason in message
    assert "step_0000000" in message
    assert "\n" not in message
    assert names(tmp_path) == before, "a reader changes nothing"


def sign(path: Path) -> None:
    """Make the manifest agree with the files, as someone who writes a checkpoint by hand would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in names(path) - {"manifest.json"}:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b""),
        ("state.json", b'{"step": 1'),
        ("state.json", b"\xff\xfe"),
        ("state.json", b"[" * 100_000),
    ],
)
def test_signed_garbage_is_damage_too(tmp_path: Path, file: str, data: bytes) -> None:
    path = write(tmp_path, 1)
    sign(path)
    assert is_whole(load(path))
    (path / file).write_bytes(data)
    sign(path)
    with pytest.raises(DamagedError, match=f"damaged: {file}: "):
        load(path)


def test_sparse_manifests_and_fifos_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    sparse, fifo = write(tmp_path, 4) / "manifest.json", write(tmp_path, 5) / "state.json"
    with sparse.open("r+b") as file:
        file.truncate(20 * 2**30)
    fifo.unlink()
    os.mkfifo(fifo)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert "not a regular file" in newest.damaged[0]
    assert "21,474,836,480 bytes" in newest.damaged[1]


def test_a_group_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    path, outside = write(tmp_path, 1), write(tmp_path / "outside", 2)
    for group in (f"../outside/{outside.name}/model", str(outside / "model"), "", "other"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {"aliases": {group: {}}, "version": 1}
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
        with pytest.raises(DamagedError, match=r"safetensors: it is not in the manifest"):
            load(path)
        manifest["version"] = 2
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
        with pytest.raises(DamagedError, match=r"manifest\.json: it has aliases"):
            load(path)


def test_a_state_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    os.truncate(path / "state.json", 20 * 2**30)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"]["bytes"] = 20 * 2**30
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with pytest.raises(DamagedError, match="21,474,836,480 bytes; at most"):
        load(path)


def test_none_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        _missing_tensors(write(tmp_path, step))
    before = names(tmp_path)
    for start in (load_newest, resume):
        with pytest.raises(UserError, match=r"no checkpoint is whole.*00002: .*00001: ") as caught:
            start(tmp_path)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_resume_sets_damaged_ones_aside(tmp_path: Path) -> None:
    """Else they would count as kept, and pruning would delete the whole ones."""
    write(tmp_path, 1)
    for _ in range(2):  # damaged twice over: the first one set aside makes room
        for step in (2, 3):
            _missing_tensors(write(tmp_path, step))
        resumed = resume(tmp_path)
        assert resumed is not None
        assert resumed.step == 1
        assert len(resumed.damaged) == 2
    aside = {"damaged-step_00000002", "damaged-step_00000003"}
    assert names(tmp_path) == {"step_00000001"} | aside
    write(tmp_path, 2)
    prune(tmp_path, 1, keep_best=False)
    assert names(tmp_path) == {"step_00000002"} | aside


class Bomb:
    """Unpickling one creates the file named in BOMB."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return (os.open, (os.environ["BOMB"], os.O_CREAT))


def test_no_pickle_is_ever_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    os.close(pickle.loads(bomb))
    (tmp_path / "exploded").unlink()  # it works
    root = tmp_path / "checkpoints"
    for name in ("model.safetensors", "state.json", "manifest.json", "model.pt", "data.pkl"):
        (write(root, 1) / name).write_bytes(bomb)
        with pytest.raises(UserError, match="no checkpoint is whole"):
            load_newest(root)
    assert not (tmp_path / "exploded").exists()
