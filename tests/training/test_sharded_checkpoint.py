"""Checkpoints of several processes: the same values in any sharding, whole or absent, only data."""

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.default_planner  # here, so that forked processes have it
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bitnet.schema import UserError
from bitnet.training import checkpoint
from bitnet.training.checkpoint import (
    CheckpointConfig,
    DamagedError,
    Saver,
    load,
    load_newest,
    resume,
    save,
)
from bitnet.training.distributed import World
from tests.helpers.checkpoints import names
from tests.helpers.sharded import (
    Odd,
    assert_same,
    build,
    restore,
    run_ranks,
    state,
    step,
    whole,
)

KEEP_ALL = CheckpointConfig(keep_last=9)


def sharded(model: Odd) -> None:
    """FSDP2."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh)


def save_all(saver: Saver, at: int, trained: Any, val_loss: float | None = None) -> None:
    groups, structures = state(trained)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    saver.save(at, groups, {"optimizers": structures}, {"rank": rank}, val_loss)


# The same values, whoever wrote them and whoever reads.


def one_to_two_to_one(world: World, root: Path, expected: dict[str, Any], seen: Path) -> None:
    saver = Saver(root, KEEP_ALL, world)
    fsdp = build(sharded)
    restore(fsdp, resume(root, world))  # type: ignore[arg-type]
    assert_same(whole(fsdp), expected)
    weight = fsdp[0].layers[1].weight
    assert isinstance(weight, dtensor.DTensor)
    assert weight.to_local().shape == ((1 - world.rank), 5), "rank 1 holds nothing of it"
    save_all(saver, 2, fsdp)

    copies = build()  # as under DDP: the whole model on each
    restore(copies, resume(root, world))  # type: ignore[arg-type]
    assert_same(whole(copies), expected)
    step(copies, seed=2)
    save_all(saver, 3, copies)

    fsdp = build(sharded)
    restore(fsdp, resume(root, world))  # type: ignore[arg-type]
    adamw = fsdp[1][0]
    for _ in range(2):  # AdamW alone: torch's Muon takes no shards
        tokens = torch.arange(12).reshape(2, 6) % 7
        fsdp[0](tokens, tokens).backward()
        adamw.step()
        adamw.zero_grad()
    save_all(saver, 4, fsdp, val_loss=0.5)
    values = whole(fsdp)
    if world.is_main:
        torch.save(values, seen)


def test_one_process_to_two_and_back(tmp_path: Path) -> None:
    """One process, FSDP2, DDP, FSDP2, one process: what is loaded is what was saved, to the bit."""
    root, trained = tmp_path / "checkpoints", build()
    step(trained, seed=1)
    save_all(Saver(root, KEEP_ALL, World(torch.device("cpu"))), 1, trained)
    expected = whole(trained)
    assert run_ranks(2, one_to_two_to_one, tmp_path, root, expected, tmp_path / "seen.pt") == [0, 0]

    alone = build()
    for at in (1, 2):
        restore(alone, load(root / f"step_{at:08d}"))
        assert_same(whole(alone), expected)
    step(alone, seed=2)  # goes on as the two copies did
    ddp = load(root / "step_00000003")
    moved = build()
    restore(moved, ddp)
    assert_same(whole(moved), whole(alone))
    newest = load_newest(root)
    assert newest is not None
    restore(alone, newest)
    assert_same(whole(alone), torch.load(tmp_path / "seen.pt"))
    assert newest.state["ranks"] == [{"rank": 0}, {"rank": 1}]
    assert checkpoint.best(root) == newest.path

    # Each part is written once, and the work is shared.
    files = names(newest.path)
    assert {"model.00000.safetensors", "model.00001.safetensors", "tensors.json"} <= files
    parts = [load_file(newest.path / name) for name in sorted(files) if "model." in name]
    assert parts[0]["layers.0.weight"].shape == (3, 3)
    assert parts[1]["layers.0.weight"].shape == (2, 3)
    joined = torch.cat([part["layers.0.weight"] for part in parts])
    assert torch.equal(joined, newest.tensors["model"]["layers.0.weight"])
    assert sum("steps" in part for part in parts) == 1
    assert not any("head.weight" in part for part in parts), "a tied weight is stored once"
    assert newest.tensors["model"]["head.weight"] is newest.tensors["model"]["embed.weight"]


def load_old(world: World, root: Path, expected: dict[str, Any]) -> None:
    fsdp = build(sharded)
    restore(fsdp, load(root / "step_00000002", checkpoint._Ranks(world)))
    assert_same(whole(fsdp), expected)


def test_a_checkpoint_from_before_goes_on_in_one_process_and_in_two(tmp_path: Path) -> None:
    """Version 1 of the format: no list of parts, and numbers for the optimizer's parameters."""
    root = tmp_path / "checkpoints"
    shutil.copytree(Path(__file__).parent / "checkpoint_v1", root)
    folder, trained = root / "step_00000002", build()
    restore(trained, load(folder))
    model, (adamw, muon) = trained
    expected = load_file(folder / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    numbers = load_file(folder / "optimizer_0.safetensors")
    for number, parameter in enumerate((model.norm, model.embed.weight, model.layers[0].bias)):
        for key, value in adamw.state[parameter].items():
            assert torch.equal(value, numbers[f"optimizer.state.{number}.{key}"])
    momentum = load_file(folder / "optimizer_1.safetensors")["optimizer.state.0.momentum_buffer"]
    assert torch.equal(muon.state[model.layers[0].weight]["momentum_buffer"], momentum)
    assert run_ranks(2, load_old, tmp_path, root, whole(trained)) == [0, 0]


SHAPES = [(8, 4), (5, 3), (1, 3), (3, 0), (2, 3, 5), (7,)]


def mesh_placements() -> list[tuple[Any, ...]]:
    shard, replicate = dtensor.Shard, dtensor.Replicate()
    return [
        (replicate, shard(0)),  # HSDP
        (shard(0), replicate),
        (shard(0), shard(0)),
        (shard(0), shard(1)),  # FSDP2 of a row-parallel layer
        (replicate, replicate),
    ]


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(max(1, torch.Size(shape).numel())).float()[: torch.Size(shape).numel()]


def four_ranks(world: World, root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {
        f"{shape} {i}": dtensor.distribute_tensor(numbers(shape).reshape(shape), mesh, placements)
        for shape in SHAPES
        for i, placements in enumerate(mesh_placements())
        if len(shape) > 1 or i != 3
    }
    saver = Saver(root, KEEP_ALL, world)
    saver.save(1, {"model": tensors}, {}, {})
    loaded = load(root / "step_00000001", checkpoint._Ranks(world))
    for turn in range(5):  # each into the placements of another
        targets = {}
        for name, tensor in tensors.items():
            placements = mesh_placements()[(int(name[-1]) + turn) % 5]
            if tensor.ndim == 1 and placements == mesh_placements()[3]:
                placements = mesh_placements()[0]
            targets[name] = dtensor.distribute_tensor(
                torch.zeros_like(tensor.full_tensor()), mesh, placements
            )
        loaded.read_into("model", targets)
        for name, tensor in targets.items():
            assert torch.equal(tensor.full_tensor(), tensors[name].full_tensor()), name


def test_every_sharding_on_a_2_by_2_mesh_into_every_other(tmp_path: Path) -> None:
    assert run_ranks(4, four_ranks, tmp_path, tmp_path / "root") == [0] * 4
    found = load(tmp_path / "root" / "step_00000001").tensors["model"]
    for name, tensor in found.items():
        assert torch.equal(tensor.flatten(), numbers(tuple(tensor.shape))), name


# Whole or absent.


def write_two(world: World, root: Path) -> None:
    """Checkpoints 1 and 2 of a sharded model."""
    saver, trained = Saver(root, KEEP_ALL, world), build(sharded)
    save_all(saver, 1, trained)
    save_all(saver, 2, trained)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    assert run_ranks(2, write_two, folder, folder / "root") == [0, 0]
    return folder / "root"


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "root"))


def test_flipped_bits_and_truncations_are_found_in_every_file(root: Path) -> None:
    path, checked = root / "step_00000002", 0
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for i in range(0, len(data), 1 if len(data) < 300 else 23):
            file.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
            with pytest.raises(DamagedError, match="damaged"):
                load(path)
            checked += 1
        for length in (0, 7, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(DamagedError, match=file.name):
                load(path)
        file.unlink()
        with pytest.raises(DamagedError, match=f"{file.name}: it is missing"):
            load(path)
        file.write_bytes(data)
    assert checked > 200
    assert load(path).step == 2


def agree_on_damage(world: World, root: Path) -> None:
    path = root / "step_00000002"
    for file in sorted(names(path)):
        for damage in ("flip", "truncate", "remove"):
            data = (path / file).read_bytes()
            torch.distributed.barrier()
            if world.is_main:
                at = len(data) // 2
                if damage == "remove":
                    (path / file).unlink()
                else:
                    rest = bytes([data[at] ^ 4]) + data[at + 1 :] if damage == "flip" else b""
                    (path / file).write_bytes(data[:at] + rest)
            torch.distributed.barrier()
            found = resume(root, world)
            assert found is not None
            assert found.step == 1
            (message,) = found.damaged
            told = [""] * world.size
            torch.distributed.all_gather_object(told, message)
            assert told[0] == told[1]
            assert f"step_00000002: damaged: {'' if file == 'manifest.json' else file}" in message
            torch.distributed.barrier()
            aside = root / "damaged-step_00000002"
            if world.is_main:
                aside.rename(path)
                (path / file).write_bytes(data)
            torch.distributed.barrier()
    assert resume(root, world).step == 2  # type: ignore[union-attr]


def test_processes_agree_on_what_is_damaged(root: Path, tmp_path: Path) -> None:
    """Whoever finds it, all of them use the one before."""
    assert run_ranks(2, agree_on_damage, tmp_path, root) == [0, 0]


def die_inside(world: World, root: Path, rank: int, where: str) -> None:
    """Process ``rank`` gets a SIGKILL when it calls the function ``where`` in a save of step 3."""
    saver, trained = Saver(root, KEEP_ALL, world), build(sharded)

    def deadly(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == rank:
        setattr(checkpoint, where, deadly)
    save_all(saver, 3, trained)


@pytest.mark.parametrize(
    ("rank", "where"),
    [(1, "save_tensors"), (1, "fsync"), (0, "new_folder"), (0, "save_tensors"), (0, "_write_rest")],
)
def test_a_process_killed_inside_a_save_loses_nothing_older(
    root: Path, tmp_path: Path, rank: int, where: str
) -> None:
    codes = run_ranks(2, die_inside, tmp_path, root, rank, where)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1, "the other ends by itself"
    newest = resume(root)
    assert newest is not None
    assert (newest.step, newest.damaged) == (2, [])
    assert names(root) == {"step_00000001", "step_00000002"}


def full_disk(world: World, root: Path, background: bool) -> None:
    saver, trained = Saver(root, KEEP_ALL, world, background), build(sharded)
    save_tensors = checkpoint.save_tensors
    if world.rank == 1:

        def full(path: Path, _: Any) -> dict[str, str]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        checkpoint.save_tensors = full  # type: ignore[attr-defined]
    expected = (OSError, r"\[Errno 28\]") if world.rank else (UserError, "rank 1: .*No space left")
    if background:
        save_all(saver, 3, trained)
        with pytest.raises(expected[0], match=expected[1]):
            saver.wait()
    else:
        with pytest.raises(expected[0], match=expected[1]):
            save_all(saver, 3, trained)
    checkpoint.save_tensors = save_tensors  # type: ignore[attr-defined]
    torch.distributed.barrier()  # the main process has deleted what there was of it
    assert names(root) == {"step_00000001", "step_00000002"}
    torch.distributed.barrier()
    with saver:
        save_all(saver, 3, trained)  # there is room again


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_full_on_one_process(root: Path, tmp_path: Path, background: bool) -> None:
    assert run_ranks(2, full_disk, tmp_path, root, background) == [0, 0]
    assert load(root / "step_00000003").step == 3


# Written while training goes on.


def in_background(world: World, root: Path, expected: list[dict[str, Any]]) -> None:
    trained, keep = build(sharded), CheckpointConfig(keep_last=2)
    weights = list(trained[0].parameters())
    with Saver(root, keep, world, background=True) as saver:
        for at in range(1, 5):
            with torch.no_grad():
                for weight in weights:
                    weight.fill_(at)
            save_all(saver, at, trained, val_loss=float(at))
            with torch.no_grad():
                for weight in weights:
                    weight.fill_(-1)
            saver.check()
    assert names(root) == {f"step_{at:08d}" for at in (1, 3, 4)}


def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    assert run_ranks(2, in_background, tmp_path, tmp_path / "root", []) == [0, 0]
    for at in (1, 3, 4):
        model = load(tmp_path / "root" / f"step_{at:08d}").tensors["model"]
        weights = [tensor for name, tensor in model.items() if name != "steps"]
        assert len(weights) == 6
        assert all((weight == at).all() for weight in weights)


def test_one_process_writes_in_the_background_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is raised by the next call, once; at the end of the block too."""
    world, trained = World(torch.device("cpu")), build()
    with Saver(tmp_path, CheckpointConfig(), world, background=True) as saver:
        save_all(saver, 1, trained)
        saver.wait()
        assert load(tmp_path / "step_00000001").tensors.keys() == state(trained)[0].keys()
        monkeypatch.setattr("bitnet.durable.save_file", lambda *_: os.open("/dev/full/x", 0))
        save_all(saver, 2, trained)
        with pytest.raises(NotADirectoryError):
            save_all(saver, 3, trained)
        saver.check()
        with pytest.raises(NotADirectoryError), saver:
            save_all(saver, 4, trained)
    assert names(tmp_path) == {"step_00000001"}


# Only data.


def sign(path: Path) -> None:
    """Make the manifest agree with the files, as someone who writes a checkpoint by hand would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {}
    for name in sorted(names(path) - {"manifest.json"}):
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


class Bomb:
    """Unpickling one creates the file named in BOMB."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return (os.open, (os.environ["BOMB"], os.O_CREAT))


def test_no_pickle_is_ever_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.metadata` and `__0_0.distcp` are what DCP itself would read, and unpickle."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    os.close(pickle.loads(bomb))
    (tmp_path / "exploded").unlink()  # it works
    path = root / "step_00000002"
    for name in (".metadata", "__0_0.distcp", "model.pt"):
        (path / name).write_bytes(bomb)
        with pytest.raises(DamagedError, match=f"{name}: it is not in the manifest"):
            load(path)
        sign(path)
        assert load(path).tensors, "a signed one is let lie"
        (path / name).unlink()
        sign(path)
    for name in sorted(names(path)):
        data = (path / name).read_bytes()
        (path / name).write_bytes(bomb)
        if name != "manifest.json":
            sign(path)
        with pytest.raises(DamagedError, match=f"damaged: {name}: "):
            load(path)
        (path / name).write_bytes(data)
        sign(path)
    assert not (tmp_path / "exploded").exists()


def header(size: int, text: str) -> bytes:
    return size.to_bytes(8, "little") + text.encode()


HUGE = '{"embed.weight":{"dtype":"F32","shape":[SHAPE],"data_offsets":[0,END]}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        header(2**63, "{}"),
        header(2**40, "{}"),
        header(90, HUGE.replace("SHAPE", "1000000000,1000000").replace("END", str(4 * 10**15))),
        header(80, HUGE.replace("SHAPE", "4611686018427387904,4").replace("END", "0")),
        header(71, HUGE.replace("SHAPE", "4").replace("END", "16")),
        header(100_000, "[" * 100_000),
    ],
)
def test_headers_that_lie_are_damage(root: Path, data: bytes) -> None:
    path = root / "step_00000002"
    (path / "model.00000.safetensors").write_bytes(data)
    sign(path)
    with pytest.raises(DamagedError, match=r"damaged: model\.00000\.safetensors: "):
        load(path)


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(contents: Any) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = value

    return change


WEIGHT = "contents", "model", "layers.0.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set(*WEIGHT, "chunks", 0, "file", value="../step_00000001/model.00000.safetensors"), ""),
        (_set(*WEIGHT, "chunks", 0, "file", value="/etc/passwd"), "is not in '/etc/passwd'"),
        (_set(*WEIGHT, "chunks", 0, "file", value=".metadata"), "is not in '.metadata'"),
        (_set(*WEIGHT, "chunks", 0, "file", value="optimizer_0.00000.safetensors"), "is not in"),
        (_set(*WEIGHT, "shape", value=[2**50, 3]), "15 of"),
        (_set(*WEIGHT, "shape", value=[2**80, 3]), "less than or equal"),
        (_set(*WEIGHT, "shape", value=[-5, -3]), "greater than or equal"),
        (_set(*WEIGHT, "shape", value=[15]), "lies outside"),
        (_set(*WEIGHT, "shape", value=["5", 3]), "valid integer"),
        (_set(*WEIGHT, "dtype", value="F64"), "is not in"),
        (_set(*WEIGHT, "dtype", value="load"), "unknown dtype"),
        (_set(*WEIGHT, "chunks", 1, "offsets", value=[4, 0]), "lies outside"),
        (_set(*WEIGHT, "chunks", 1, "sizes", value=[3, 3]), "is not in"),
        (_set(*WEIGHT, "chunks", value=[]), "0 of 15"),
        (_set(*WEIGHT, value={"__reduce__": "os.system"}), "missing|Missing|required"),
        (_set("contents", "model", value={}), "embed.weight"),
        (_set("contents", "other", value={}), "groups"),
        (_set("aliases", "model", "head.weight", value="weight"), "'weight'"),
        (lambda tensors: tensors["contents"]["model"][WEIGHT[2]]["chunks"].pop(), "9 of 15"),
    ],
)
def test_a_list_of_parts_that_lies_is_damage(
    root: Path, change: Callable[[Any], None], reason: str
) -> None:
    """Nothing outside the folder is read, nothing larger than the files is made, and no part is
    left as it was."""
    path = root / "step_00000002"
    contents = json.loads((path / "tensors.json").read_text())
    change(contents)
    (path / "tensors.json").write_text(json.dumps(contents))
    sign(path)
    with pytest.raises(DamagedError, match=rf"damaged: tensors\.json: .*({reason})"):
        load(path)


def test_a_list_of_parts_that_is_no_list_is_damage(root: Path) -> None:
    path = root / "step_00000002"
    for data in (b"", b"[" * 100_000, b"null", b'{"model": 1}', b"\xff\xfe"):
        (path / "tensors.json").write_bytes(data)
        sign(path)
        with pytest.raises(DamagedError, match=r"damaged: tensors\.json: "):
            load(path)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    saved = load(save(tmp_path, 1, {"model": {"a": torch.ones(2, 3), "b": torch.ones(1)}}, {}))
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    saved.read_into("model", good)
    assert (good["a"] == 1).all()
    for wrong, message in (
        ({"a": good["a"]}, "'b' is not in both"),
        (good | {"c": good["b"]}, "'c' is not in both"),
        (good | {"a": torch.zeros(3, 2)}, r"'a' is F32 \[2, 3\] there"),
        (good | {"a": torch.zeros(2, 3).double()}, r"'a' is F32 .* torch.float64"),
    ):
        with pytest.raises(UserError, match=message):
            saved.read_into("model", wrong)
