"""A prepared set loads whole or not at all; batches are a pure function of (seed, step)."""

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.data.loader import DataConfig, Loader, TokenDataset, permute, sequential_windows
from bitnet.schema import UserError
from tests.helpers.prepared_sets import windows_of, write_set


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("shard_tokens", "dtype"), [(10**9, "uint16"), (7, "uint16"), (100, "uint32")]
)
def test_tokens_span_shards(tmp_path: Path, shard_tokens: int, dtype: str) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 1003, shard_tokens, dtype), "train")
    everything = np.arange(1003)
    rng = random.Random(0)
    for _ in range(300):
        start, stop = sorted(rng.choices(range(1004), k=2))
        tokens = dataset.tokens(start, stop)
        assert tokens.dtype == np.int64
        assert np.array_equal(tokens, everything[start:stop])
    assert np.array_equal(dataset.tokens(0, 1003), everything)
    for start, stop in [(-1, 3), (0, 1004), (5, 4)]:
        with pytest.raises(ValueError, match="the split has 1003"):
            dataset.tokens(start, stop)


def test_ids_are_little_endian_and_unsigned(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 65536)
    assert (folder / "train_00000.bin").read_bytes()[:6] == b"\0\0\1\0\2\0"
    assert TokenDataset(folder, "train").tokens(65535, 65536).tolist() == [65535]
    folder = write_set(tmp_path / "wide", 70_000, dtype="uint32")
    assert TokenDataset(folder, "train").tokens(69_999, 70_000).tolist() == [69_999]


def test_a_dataset_knows_its_counts_and_split(tmp_path: Path) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 50), "val")
    assert (dataset.n_tokens, dataset.n_bytes, dataset.n_documents) == (10, 7, 1)
    assert (dataset.vocab_size, dataset.eos_id, dataset.held_out) == (300, 2, "documents")
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        TokenDataset(dataset.path, "test")  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("bit", [0, 7, -1])
def test_a_flipped_bit_is_detected(tmp_path: Path, shard: int, bit: int) -> None:
    folder = write_set(tmp_path / "set", 250, 100)
    path = folder / f"train_{shard:05d}.bin"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train_0000{shard}\.bin: damaged: its checksum"):
        TokenDataset(folder, "train")
    TokenDataset(folder, "train", verify=False)
    TokenDataset(folder, "val")


def test_wrong_sizes_and_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 250, 100)
    path = folder / "train_00002.bin"
    whole = path.read_bytes()
    for content in [b"", whole[:-1], whole[:-2], whole + b"\0\0"]:
        path.write_bytes(content)
        for verify in (True, False):
            with pytest.raises(UserError, match=r"train_00002\.bin: damaged: has \d+ bytes"):
                TokenDataset(folder, "train", verify=verify)
    path.unlink()
    with pytest.raises(UserError, match=r"train_00002\.bin: missing"):
        TokenDataset(folder, "train")


def test_a_shard_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    """A mapping would end the process with SIGBUS."""
    folder = write_set(tmp_path / "set", 250, 100)
    dataset = TokenDataset(folder, "train")
    before = dataset.tokens(0, dataset.n_tokens)
    shard = folder / "train_00000.bin"
    os.truncate(shard, shard.stat().st_size - 1)
    assert (dataset.tokens(0, 1) == before[:1]).all()
    with pytest.raises(UserError, match=r"train_00000.bin: damaged: it became shorter"):
        dataset.tokens(0, dataset.n_tokens)


def test_folders_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; make one with `bitnet prepare`"):
        TokenDataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"is not a prepared set \(it has no index\.json\)"):
        TokenDataset(tmp_path, "train")


def test_every_truncation_of_the_index_is_detected(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 50)
    whole = (folder / "index.json").read_bytes()
    for cut in range(len(whole)):
        (folder / "index.json").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            TokenDataset(folder, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2, this program reads 1"),
        ({"dtype": "float32"}, "damaged: dtype"),
        ({"vocab_size": "300"}, "damaged: vocab_size"),
        ({"more": 1}, "damaged: more"),
        ({"splits": {}}, "damaged: the shards of train"),
        (
            {"splits": {"train": {"n_tokens": 9, "n_bytes": 7, "n_documents": 1, "shards": []}}},
            "damaged: the shards of train do not add up",
        ),
    ],
)
def test_damaged_indexes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_set(tmp_path / "set", 50)
    change_index(folder, **changes)
    with pytest.raises(UserError, match=rf"index\.json: {message}"):
        TokenDataset(folder, "train")


def test_an_index_that_is_no_utf8_or_no_object(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 50)
    for content in [b"\xff\xfe", b"[]", b"3", b"null"]:
        (folder / "index.json").write_bytes(content)
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            TokenDataset(folder, "train")


def test_targets_are_the_inputs_one_token_later(tmp_path: Path) -> None:
    loader = Loader(TokenDataset(write_set(tmp_path / "set", 1000, 64), "train"), 16, 5, seed=1)
    for step in range(40):
        inputs, targets = loader.batch(step)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (5, 16)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
        assert all(int(first) % 16 == 0 for first in inputs[:, 0])
        assert inputs.is_contiguous()
        assert targets.is_contiguous()


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "batch"), [(1001, 10, 7), (101, 10, 32), (33, 1, 5)]
)
def test_an_epoch_visits_every_window_once(
    tmp_path: Path, n_tokens: int, seq_len: int, batch: int
) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", n_tokens), "train")
    loader = Loader(dataset, seq_len, batch, seed=3)
    count = (n_tokens - 1) // seq_len
    steps = -(-3 * count // batch)
    seen = [window for step in range(steps) for window in windows_of(loader.batch(step)[0])]
    epochs = [seen[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 5000), "train")
    loader = Loader(dataset, 8, 6, seed=5)
    first = {step: loader.batch(step) for step in range(60)}
    order = list(range(60))
    random.Random(0).shuffle(order)
    np.random.seed(0)
    torch.manual_seed(0)
    again = Loader(dataset, 8, 6, seed=5)
    for step in order:
        assert torch.equal(first[step][0], again.batch(step)[0])
        assert torch.equal(first[step][1], again.batch(step)[1])
    other = Loader(dataset, 8, 6, seed=6)
    assert any(not torch.equal(first[step][0], other.batch(step)[0]) for step in range(3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_divides_the_same_batch(tmp_path: Path, world_size: int) -> None:
    loader = Loader(TokenDataset(write_set(tmp_path / "set", 1000), "train"), 7, 12, seed=0)
    for step in (0, 1, 10, 11, 12, 10**9):  # 142 windows: 11 and others span epochs
        whole = loader.batch(step)
        parts = [loader.batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole[0])
        assert torch.equal(torch.cat([targets for _, targets in parts]), whole[1])


def test_batches_that_cannot_be(tmp_path: Path) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 100), "train")
    with pytest.raises(
        UserError, match="batch of 12 sequences cannot be divided among 5 processes"
    ):
        Loader(dataset, 7, 12, seed=0).batch(0, 0, 5)
    for step, rank in [(0, 2), (0, -1), (-1, 0)]:
        with pytest.raises(ValueError, match="out of range"):
            Loader(dataset, 7, 12, seed=0).batch(step, rank, 2)
    for seq_len, batch in [(0, 1), (1, 0)]:
        with pytest.raises(ValueError, match="expected 1 or more"):
            Loader(dataset, seq_len, batch, seed=0)


def test_fewer_tokens_than_a_window_are_refused(tmp_path: Path) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 100), "train")
    assert Loader(dataset, 99, 4, seed=0).epochs(3) == [12]
    with pytest.raises(UserError, match=r"has 100 tokens, .* data\.seq_len = 100 needs 101"):
        Loader(dataset, 100, 4, seed=0)


@pytest.mark.parametrize("n", [*range(1, 70), 1000, 4096, 4097])
def test_permute_is_a_permutation(n: int) -> None:
    for key in (b"", b"a", b"0/1"):
        image = permute(np.arange(n, dtype=np.uint64), n, key)
        assert sorted(image.tolist()) == list(range(n))


def test_permute_reaches_every_place_equally_often() -> None:
    n, keys = 7, 7000
    counts = np.zeros((n, n))
    for key in range(keys):
        image = permute(np.arange(n, dtype=np.uint64), n, str(key).encode())
        counts[np.arange(n), image.astype(np.int64)] += 1
    expected = keys / n
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)  # 6 degrees of freedom
    assert chi_square.max() < 30  # p = 4e-5 each


def test_permute_of_more_than_memory_holds() -> None:
    n = 2**40 + 3
    positions = np.concatenate([np.arange(1000), np.arange(n - 1000, n)]).astype(np.uint64)
    image = permute(positions, n, b"key")
    assert len(set(image.tolist())) == 2000
    assert (image < n).all()
    assert abs(image.astype(np.float64).mean() / n - 0.5) < 0.05
    for position in (0, 1999):  # one alone goes where it goes among others
        assert permute(positions[position : position + 1], n, b"key")[0] == image[position]


def test_the_order_never_changes() -> None:
    """A run resumed by a later version must see the same data; these windows are the first's."""
    assert permute(np.arange(10, dtype=np.uint64), 10, b"0/0").tolist() == [
        5,
        2,
        0,
        3,
        1,
        8,
        4,
        6,
        7,
        9,
    ]


@pytest.mark.parametrize(
    ("n_tokens", "seq_len"), [(100, 7), (100, 10), (100, 100), (100, 500), (1, 3)]
)
def test_sequential_windows_predict_every_token_once(
    tmp_path: Path, n_tokens: int, seq_len: int
) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", n_tokens, 33), "train")
    windows = list(sequential_windows(dataset, seq_len))
    assert torch.cat([window[1:] for window in windows]).tolist() == list(range(n_tokens))
    assert torch.cat([window[:-1] for window in windows]).tolist() == [2, *range(n_tokens - 1)]
    assert all(len(window) == seq_len + 1 for window in windows[:-1])
    assert all(window.dtype == torch.int64 for window in windows)
    assert len(windows) == -(-n_tokens // seq_len)


def test_fewer_windows_are_spread_over_the_split(tmp_path: Path) -> None:
    dataset = TokenDataset(write_set(tmp_path / "set", 100, 33), "train")
    some = list(sequential_windows(dataset, 10, max_tokens=40))
    assert [window[1].item() for window in some] == [0, 20, 50, 70]
    whole = {tuple(window.tolist()) for window in sequential_windows(dataset, 10)}
    assert all(tuple(window.tolist()) in whole for window in some)
    assert len(list(sequential_windows(dataset, 10, max_tokens=3))) == 1
    assert len(list(sequential_windows(dataset, 10, max_tokens=1000))) == 10


def test_config_values_out_of_range_are_refused() -> None:
    assert DataConfig().sources == ["python-stdlib"]
    for values in [
        {"vocab_size": 259},
        {"vocab_size": "8192"},
        {"val_fraction": 0.0},
        {"val_fraction": 0.6},
        {"sources": []},
        {"sources": "python-stdlib"},
        {"path": ""},
        {"seq_len": 0},
        {"threads": -1},
        {"unknown": 1},
    ]:
        with pytest.raises(ValueError, match=next(iter(values))):
            DataConfig(**values)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_an_epoch_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    folder = write_set(tmp_path / "set", 16_000_000, dtype="uint32")  # 64 MB
    gc.collect()
    before = resident()
    loader = Loader(TokenDataset(folder, "train"), 512, 250, seed=0)
    for step in range(125):
        loader.batch(step)
    assert loader.epochs(125)[0] > 0.99
    assert resident() - before < 16e6
