"""Processes that begin together: a thread for each, and a store as torchrun's."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from bitnet.config import Config, to_dict
from bitnet.schema import UserError
from bitnet.training.start import agree, facts_of, name_start, source_hash


def on_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned or raised, by rank."""
    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(work, rank) for rank in range(n)]
        return [future.exception() or future.result() for future in futures]


def test_each_start_has_a_name_of_its_own() -> None:
    """The store keeps what earlier starts left in it, and processes come in any order."""
    store, names = HashStore(), list[str]()
    for late in range(3):

        def work(rank: int, late: int = late) -> str:
            time.sleep(0.15 * (rank == late))
            return name_start(store, rank, 3, limit=20)

        (name,) = set(on_threads(3, work))
        names.append(name)
    assert len(set(names)) == 3


@pytest.mark.parametrize(("absent", "named"), [({1, 2}, "1, 2"), ({2}, "2"), ({0}, "0")])
def test_a_process_that_does_not_start_is_named(absent: set[int], named: str) -> None:
    store = HashStore()

    def work(rank: int) -> str:
        if rank in absent:
            return ""
        name = name_start(store, rank, 3, limit=0.5)
        agree(PrefixStore(name, store), rank, 3, {}, limit=0.5)
        return name

    found = on_threads(3, work)
    speaker = 1 if 0 in absent else 0
    assert isinstance(found[speaker], UserError)
    assert str(found[speaker]) == f"rank {named} of 3 has not started after 0.5 s"
    for rank in {0, 1, 2} - absent:
        assert isinstance(found[rank], UserError), "none goes on alone"


def test_processes_with_the_same_facts_agree() -> None:
    store, facts = HashStore(), facts_of(to_dict(Config()), torch.device("cpu"))
    assert on_threads(3, lambda rank: agree(store, rank, 3, facts, limit=20)) == [None] * 3


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"optim.lr": "0.01"}, "optim.lr = 0.01, rank 0 with 0.003"),
        ({"source code": "b"}, "source code = b, rank 0 with a"),
        ({"new.key": "1"}, "new.key = 1, rank 0 with None"),
        (
            {"optim.lr": "0.01", "source code": "b"},
            "optim.lr = 0.01, rank 0 with 0.003; with source code = b, rank 0 with a",
        ),
    ],
)
def test_all_processes_hear_which_one_differs(facts: dict[str, str], said: str) -> None:
    store, common = HashStore(), {"optim.lr": "0.003", "source code": "a"}

    def work(rank: int) -> None:
        agree(store, rank, 4, common | (facts if rank >= 2 else {}), limit=20)

    for error in on_threads(4, work):
        assert isinstance(error, UserError)
        assert str(error) == (
            f"rank 2 was started with {said}: start all processes with the same config, code and "
            "torch"
        )


def test_facts_are_every_key_the_kind_of_device_and_the_code() -> None:
    config = to_dict(Config())
    facts = facts_of(config, torch.device("cuda:1"))
    assert facts == facts_of(config, torch.device("cuda:0")), "each process has its own GPU"
    keys = {f"{section}.{key}" for section, keys in config.items() for key in keys}
    assert facts.keys() == keys | {"device", "torch", "source code"}
    assert facts["optim.lr"] == repr(config["optim"]["lr"])


def test_another_byte_or_name_of_a_source_is_other_code(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text("y = 2\n")
    hashes = [source_hash([tmp_path])]
    (tmp_path / "notes.txt").write_text("no source")
    assert source_hash([tmp_path]) == hashes[0]
    (tmp_path / "two.py").write_text("y = 3\n")
    hashes.append(source_hash([tmp_path]))
    (tmp_path / "two.py").rename(tmp_path / "three.py")
    hashes.append(source_hash([tmp_path]))
    (tmp_path / "three.py").rename(tmp_path / "a" / "three.py")
    hashes.append(source_hash([tmp_path]))
    assert len(set(hashes)) == 4
