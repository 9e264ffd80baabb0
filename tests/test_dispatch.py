"""Tables of kernel configurations: what is chosen from them, and what damaged ones do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnet_kernels import dispatch, tune
from bitnet_kernels.dispatch import (
    ARCHITECTURES,
    FORMULATIONS,
    Config,
    Entry,
    Table,
    allowed,
    bucket,
    choose,
    shipped,
    table_from_json,
    table_to_json,
)

NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


@pytest.mark.parametrize(
    ("m", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (4096, 4096), (9999, 4096)]
)
def test_bucket(m: int, expected: int) -> None:
    assert bucket(m) == expected


def test_allowed() -> None:
    assert allowed("addsub", False) == ("sad",)
    assert set(allowed("addsub", True)) == {"sad", "popcount"}
    assert set(allowed("dot", True)) == {"dp4a", "gemm", "unpacked"}
    assert set(allowed("auto", True)) == set(FORMULATIONS)
    assert "popcount" not in allowed("auto", False)
    assert allowed("gemm", False) == ("gemm",)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_shipped_tables(sm: int) -> None:
    """Every formulation has configurations that its kernel can be launched with, and nothing that
    was not measured says that it was."""
    table = shipped(sm)
    assert table.source.startswith(
        ("measured on", "static model of the compiled code, not measured")
    )
    assert {entry.formulation for entry in table.entries} == set(FORMULATIONS)
    assert {(entry.n, entry.k) for entry in table.entries} == set(tune.SHAPES)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(("n", "k"), tune.SHAPES)
def test_the_fastest_entry_is_chosen(sm: int, n: int, k: int) -> None:
    table = shipped(sm)
    for m in (1, 4, 64, 1024):
        here = {e.formulation: e.us for e in table.entries if (e.m, e.n, e.k) == (m, n, k)}
        for kernel in ("auto", "dot", "addsub"):
            names = [name for name in allowed(kernel, True) if name in here]
            if names:
                chosen, _ = choose(kernel, m, n, k, True, sm, NAME)
                assert here[chosen] == min(here[name] for name in names)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_any_shape_finds_an_entry(sm: int) -> None:
    for n, k in ((1, 1), (777, 1234), (2560, 6913), (10**6, 3)):
        assert choose("auto", 512, n, k, False, sm, NAME)[0] in ("gemm", "unpacked")
        for kernel in ("addsub", "sad"):
            assert choose(kernel, 1, n, k, False, sm, NAME)[0] == "sad"
        for kernel in FORMULATIONS:
            assert choose(kernel, 5000, n, k, True, sm, NAME)[0] == kernel


def test_unknown_gpus_take_the_table_below() -> None:
    assert shipped(86) == shipped(80)
    assert shipped(120) == shipped(100)
    assert shipped(75) == shipped(80)


def entry(us: float, formulation: str = "dp4a", n: int = 64, k: int = 64, m: int = 1) -> Entry:
    return Entry(m, n, k, formulation, Config(1, 4, 2048), us)


def write_cache(text: str) -> Path:
    path = dispatch.cache_file(NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    dispatch.forget()
    return path


def test_own_measurements_come_first_for_their_shape() -> None:
    own = Table("measured here", (entry(3.0), entry(2.0, "sad"), entry(1.0, m=16)))
    write_cache(table_to_json(own))
    assert choose("auto", 1, 64, 64, False, 90, NAME) == ("sad", Config(1, 4, 2048))
    assert choose("dot", 1, 64, 64, False, 90, NAME)[0] == "dp4a"
    assert choose("sad", 16, 64, 64, False, 90, NAME) == ("sad", Config(1, 4, 2048))
    # another shape, another GPU, a formulation that was not measured: the shipped table
    assert choose("auto", 1, 64, 128, False, 90, NAME)[0] == "dp4a"
    assert choose("auto", 1, 64, 64, False, 90, "another")[0] == "dp4a"
    assert choose("unpacked", 1, 64, 64, False, 90, NAME)[0] == "unpacked"


GOOD = entry(1.0)._asdict() | {"config": [1, 4, 2048, 1, 1, 1]}
BAD = [
    "",
    "{",
    "[]",
    "{}",
    '{"source": "x", "entries": 5}',
    '{"source": "x", "entries": [5]}',
    *(
        json.dumps({"source": "x", "entries": [GOOD | wrong]})
        for wrong in (
            {"formulation": "swar"},
            {"formulation": "reference"},
            {"config": [1, 4, 2048]},
            {"config": [1, 4, 4096, 1, 1, 1]},
            {"config": [1, 1, 1024, 1, 1, 1]},
            {"config": [1, 4, 2048, 1, 4, 1]},
            {"formulation": "gemm"},
            {"formulation": "gemm", "config": [4, 128, 256, 1, 4, 3]},
            {"config": [1, 3, 2048, 1, 1, 1]},
            {"config": [0, 4, 2048, 1, 1, 1]},
            {"config": [1, 4, 2048, 0, 1, 1]},
            {"config": [1, 4, 2048, 1, 1, -1]},
            {"config": [1, 4, 2048, 1, 1, 1.0]},
            {"config": [1, 4, "2048", 1, 1, 1]},
            {"m": 0},
            {"n": None},
            {"us": "fast"},
            {"us": float("nan")},
            {"more": 1},
        )
    ),
]


@pytest.mark.parametrize("text", BAD)
def test_damaged_tables(text: str) -> None:
    """Said where a table is read; a user's damaged cache is as good as none."""
    with pytest.raises(ValueError, match=r"not a (table of )?kernel configuration"):
        table_from_json(text)
    write_cache(text)
    assert choose("auto", 1, 64, 64, False, 90, NAME)[0] == "dp4a"


def test_tables_round_trip() -> None:
    table = Table('a "quoted" source', (entry(1.25), entry(2.5, "sad", m=8)))
    assert table_from_json(table_to_json(table)) == table
    assert table_from_json(json.dumps({"source": "x", "entries": [GOOD]})).entries == (entry(1.0),)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (2560, 6912)])
def test_candidates(formulation: str, n: int, k: int) -> None:
    for m in (1, 3, 16, 64, 512, 4096):
        found = tune.candidates(formulation, m, n, k)
        assert len(found) == len(set(found))
        for config in found:
            table_from_json(table_to_json(Table("", (Entry(m, n, k, formulation, config, 1.0),))))
            assert config.split_k == 1 or config.split_k * config.block_k <= k
    assert tune.candidates("dp4a", 512, n, k) == []
    assert tune.candidates("unpacked", 16, n, k) == []


def test_tuning_keeps_the_best_and_other_shapes() -> None:
    """With a stand-in for the timer: what is kept, where, and what survives."""

    def cost(formulation: str, tried: list[Config], m: int, n: int, k: int) -> list[float]:
        return [abs(c.block_n - 4) + c.split_k + (5 if formulation == "dp4a" else 0) for c in tried]

    path = tune.tune([(256, 8192)], [1, 4], NAME, cost)
    assert path == dispatch.cache_file(NAME)
    formulation, config = choose("auto", 1, 256, 8192, False, 90, NAME)
    assert (formulation, config.block_n, config.split_k) == ("sad", 4, 1)
    assert choose("dot", 1, 256, 8192, False, 90, NAME)[0] == "dp4a"
    tune.tune([(512, 8192)], [1], NAME, cost)
    table = table_from_json(path.read_text())
    assert table.source == f"measured on {NAME}"
    assert {(one.n, one.k) for one in table.entries} == {(256, 8192), (512, 8192)}
    before = path.read_text()

    def inexact(*_: object) -> list[float]:
        raise RuntimeError("not exact")

    with pytest.raises(RuntimeError, match="not exact"):
        tune.tune([(256, 8192)], [1], NAME, inexact)
    assert path.read_text() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]
