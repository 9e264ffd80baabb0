"""Tables of kernel configurations: the choices from them, and the effect of damaged ones."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnet_kernels import dispatch, tune
from bitnet_kernels.dispatch import (
    ARCHITECTURES,
    FORMULATIONS,
    Entry,
    Table,
    TileConfig,
    allowed,
    bucket,
    choose,
    shipped,
    table_from_json,
    table_to_json,
)

NAME = "NVIDIA H100 80GB HBM3"
SOURCE = f"measured here, kernels {dispatch.fingerprint()}"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


@pytest.mark.parametrize(
    ("m", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (4096, 4096), (9999, 4096)]
)
def test_m_falls_into_its_bucket(m: int, expected: int) -> None:
    assert bucket(m) == expected


def test_a_family_allows_its_formulations() -> None:
    assert allowed("addsub", False) == ("sad",)
    assert set(allowed("addsub", True)) == {"sad", "popcount"}
    assert set(allowed("dot", True)) == {"dp4a", "gemm", "unpacked"}
    assert set(allowed("auto", True)) == set(FORMULATIONS)
    assert "popcount" not in allowed("auto", False)
    assert allowed("gemm", False) == ("gemm",)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_shipped_tables_can_be_launched(sm: int) -> None:
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


def test_unknown_gpus_take_a_table_that_fits() -> None:
    assert shipped(87) == shipped(80)
    assert shipped(103) == shipped(100)
    for capability in (86, 120, 121):  # 99 KiB of shared memory
        assert shipped(capability) == shipped(89)


def entry(us: float, formulation: str = "dp4a", n: int = 64, k: int = 64, m: int = 1) -> Entry:
    return Entry(m, n, k, formulation, TileConfig(1, 4, 2048), us)


def write_cache(text: str) -> Path:
    path = dispatch.cache_file(NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    dispatch.forget()
    return path


def test_own_measurements_come_first_for_their_shape() -> None:
    own = Table(SOURCE, (entry(3.0), entry(2.0, "sad"), entry(1.0, m=16)))
    write_cache(table_to_json(own))
    assert choose("auto", 1, 64, 64, False, 90, NAME) == ("sad", TileConfig(1, 4, 2048))
    assert choose("dot", 1, 64, 64, False, 90, NAME)[0] == "dp4a"
    assert choose("auto", 9, 64, 64, False, 90, NAME) == ("dp4a", TileConfig(1, 4, 2048))
    # another M: nothing that was tuned for few tokens runs many
    assert choose("auto", 512, 64, 64, False, 90, NAME)[0] == "gemm"
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
            {"formulation": ["sad"]},
            {"formulation": None},
            {"config": [1, 256, 16, 1, 1, 1]},
            {"config": [1, 4, 2048, 10**6, 1, 1]},
            {"formulation": "gemm", "config": [8192, 128, 256, 1, 8, 3]},
            {"formulation": "gemm", "config": [128, 8192, 256, 1, 8, 3]},
            {"formulation": "gemm", "config": [128, 128, 256, 1, 1024, 3]},
            {"formulation": "gemm", "config": [128, 128, 256, 1, 8, 99]},
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
def test_damaged_tables_are_named_or_ignored(text: str) -> None:
    """Said where a table is read; a user's damaged cache is as good as none."""
    with pytest.raises(ValueError, match=r"not a (table of )?kernel configuration"):
        table_from_json(text)
    write_cache(text)
    assert choose("auto", 1, 64, 64, False, 90, NAME)[0] == "dp4a"


def test_measurements_of_other_kernels_are_forgotten() -> None:
    write_cache(table_to_json(Table("measured here, kernels 0123456789ab", (entry(3.0, "sad"),))))
    assert choose("auto", 1, 64, 64, False, 90, NAME)[0] == "dp4a"


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_what_is_chosen_fits_shared_memory(sm: int) -> None:
    """Also where an architecture takes the table of one that has more."""
    limit = {80: 163, 90: 227, 100: 227}.get(sm, 99) * 1024
    for m in tune.TOKENS:
        for kernel in ("auto", "gemm", "unpacked"):
            formulation, config = choose(kernel, m, 4096, 4096, False, sm, "")
            assert dispatch.shared_bytes(formulation, config) <= limit


def test_shared_bytes_bound_what_was_compiled() -> None:
    """AOT for sm_90 took 311,296 and 114,688 bytes (Triton 3.9)."""
    assert 311_296 <= dispatch.shared_bytes("gemm", TileConfig(128, 128, 512, 1, 8, 4)) <= 330_000
    assert 114_688 <= dispatch.shared_bytes("gemm", TileConfig(128, 128, 256, 1, 8, 3)) <= 123_000
    assert 65_536 <= dispatch.shared_bytes("unpacked", TileConfig(128, 128, 64, 1, 8, 4)) <= 66_000
    assert dispatch.shared_bytes("sad", TileConfig(1, 8, 2048)) == 0


def test_tables_round_trip() -> None:
    table = Table('a "quoted" source', (entry(1.25), entry(2.5, "sad", m=8)))
    assert table_from_json(table_to_json(table)) == table
    assert table_from_json(json.dumps({"source": "x", "entries": [GOOD]})).entries == (entry(1.0),)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (2560, 6912)])
def test_candidates_are_distinct_valid_and_fit_shared_memory(
    formulation: str, n: int, k: int
) -> None:
    for m in (1, 3, 16, 64, 512, 4096):
        found = tune.candidates(formulation, m, n, k, 101_376)
        assert len(found) == len(set(found))
        for config in found:
            table_from_json(table_to_json(Table("", (Entry(m, n, k, formulation, config, 1.0),))))
            assert config.split_k == 1 or config.split_k * config.block_k <= k
            assert dispatch.shared_bytes(formulation, config) <= 101_376
    assert tune.candidates("dp4a", 512, n, k, 10**6) == []
    assert tune.candidates("unpacked", 16, n, k, 10**6) == []


def test_tuning_keeps_the_best_and_other_shapes() -> None:
    """With a stand-in for the timer: what is kept, where, and what survives."""

    def cost(formulation: str, tried: list[TileConfig], m: int, n: int, k: int) -> list[float]:
        return [abs(c.block_n - 4) + c.split_k + (5 if formulation == "dp4a" else 0) for c in tried]

    path = tune.tune([(256, 8192)], [1, 3], NAME, 90, cost)
    assert path == dispatch.cache_file(NAME)
    formulation, config = choose("auto", 1, 256, 8192, False, 90, NAME)
    assert (formulation, config.block_n, config.split_k) == ("sad", 4, 1)
    assert choose("dot", 4, 256, 8192, False, 90, NAME)[0] == "dp4a"
    tune.tune([(512, 8192)], [1], NAME, 90, cost)
    tune.tune([(256, 8192)], [2], NAME, 90, cost)
    table = table_from_json(path.read_text())
    assert table.source == f"measured on {NAME}, kernels {dispatch.fingerprint()}"
    shapes = {(one.m, one.n, one.k) for one in table.entries}
    assert shapes == {(1, 256, 8192), (2, 256, 8192), (4, 256, 8192), (1, 512, 8192)}
    assert len(shapes) * len({one.formulation for one in table.entries}) == len(table.entries)


def test_tuning_that_is_interrupted_keeps_whole_shapes() -> None:
    def cost(formulation: str, tried: list[TileConfig], m: int, n: int, k: int) -> list[float]:
        if n == 512:
            raise RuntimeError("sad is not exact")
        return [1.0 if c.num_stages == 1 else math.inf for c in tried]  # gemm fits nowhere

    with pytest.raises(RuntimeError, match="not exact"):
        tune.tune([(256, 8192), (512, 8192)], [1], NAME, 90, cost)
    path = dispatch.cache_file(NAME)
    entries = table_from_json(path.read_text()).entries
    assert {(one.m, one.n, one.k) for one in entries} == {(1, 256, 8192)}
    assert {one.formulation for one in entries} == {"sad", "popcount", "dp4a"}
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_cache_that_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is not followed, and what is too large to be a table is not read."""
    write_cache(table_to_json(Table(SOURCE, (entry(3.0, "sad"),))) + " " * (1 << 20))
    assert choose("auto", 1, 64, 64, False, 90, NAME)[0] == "dp4a"
    for name in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        assert dispatch.cache_file(NAME).parent == Path.home() / ".cache" / "bitnet"
