"""bitnet bench decode --profile: where the time of a step goes."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitnet.bench import decode_profile as profiling
from bitnet.bench.decode_worker import Case
from bitnet_kernels.cpu import native
from tests.helpers.decode_bench import TINY, Bitnet, bench, job, read, tiny

__all__ = ["bench"]  # a fixture


def event(name: str, ts: float, dur: float, *shapes: list[int], **fields: Any) -> dict[str, Any]:
    kinds = fields.pop("kinds", ["float"] * len(shapes))
    args = {"Input Dims": list(shapes), "Input type": kinds}
    return {"ph": "X", "cat": "cpu_op", "tid": 1, "name": name, "ts": ts, "dur": dur} | {
        "args": args,
        **fields,
    }


def test_lists_of_tensors_have_no_bytes() -> None:
    """Their shapes are in the trace, but not their dtypes."""
    lists: Any = event("aten::stack", 0, 1, [[2, 3], [2, 3]], [], kinds=["TensorList", "Scalar"])  # type: ignore[list-item]
    assert profiling.own_work(lists) == (None, None)


def test_operations_by_hand() -> None:
    events = [
        # linear calls t (moves nothing) and addmm, whose copy_ is part of its own work
        event("aten::linear", 0, 100, [2, 8], [3, 8], [3]),
        event("aten::t", 5, 10, [3, 8]),
        event("aten::addmm", 20, 70, [3], [2, 8], [8, 3], [], kinds=["float"] * 3 + ["Scalar"]),
        event("aten::copy_", 25, 15, [2, 3], [3]),
        # into an output of int32
        event(
            "aten::_int_mm", 200, 50, [2, 8], [8, 3], [2, 3], kinds=["signed char"] * 2 + ["int"]
        ),
        event(
            "aten::_int_mm", 300, 30, [2, 8], [8, 3], [2, 3], kinds=["signed char"] * 2 + ["int"]
        ),
        event("aten::embedding", 400, 20, [61, 24], [2, 1], kinds=["float", "long int"]),
        event("aten::mm", 405, 1, [2, 2], [2, 2], tid=2),  # another thread's: not inside
        event("a_kernel", 0, 999, cat="kernel"),
    ]
    found = {one.name: one for one in profiling.operations(events, 2, 1000.0, 1e6, cuda=False)}
    assert {name: one.us for name, one in found.items()} == {
        "aten::linear": (100 - 10 - 70) / 2,
        "aten::t": 5,
        "aten::addmm": (70 - 15) / 2,
        "aten::copy_": 7.5,
        "aten::_int_mm": 40,
        "aten::embedding": 10,
        "aten::mm": 0.5,
        profiling.REST: (1000 - 100 - 80 - 20 - 1) / 2,
    }
    assert sum(one.share for one in found.values()) == pytest.approx(1)
    moved = {name: one.bytes for name, one in found.items() if one.bytes is not None}
    assert moved == {
        "aten::addmm": 4 * (3 + 16 + 24) / 2,
        "aten::_int_mm": 16 + 24 + 4 * 6,
        "aten::mm": 16.0,
    }
    int_mm = found["aten::_int_mm"]
    assert (int_mm.count, int_mm.flops) == (1, 2 * 2 * 8 * 3)
    assert int_mm.roofline_us == pytest.approx(64)  # 64 bytes at 1 MB/s
    assert int_mm.roofline_share == pytest.approx(64 / 40)
    kernels = profiling.operations(events, 1, 2000.0, 1e6, cuda=True)
    assert [(one.name, one.us) for one in kernels] == [(profiling.REST, 1001), ("a_kernel", 999)]


def test_bytes_of_a_step() -> None:
    memory = {"weights": 1000, "head": 0, "embedding": 500, "cache": 9}
    cached = 2 * 2 * 12 * 4  # k and v of 2 layers, one head of 12, fp32
    case = Case(3, 10, 2)
    assert profiling.step_bytes(memory, tiny(), job("baseline-fp32"), case) == 1500 + 30 * cached
    untied = memory | {"head": 70}
    found = profiling.step_bytes(untied, tiny(), job("baseline-bf16"), case)
    assert found == 1070 + 30 * cached // 2


@pytest.mark.parametrize("contender", ["ours-auto", "baseline-fp32"])
def test_a_profile_is_kept_and_adds_up(
    bench: Bitnet, tmp_path: Path, contender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step by modules."""
    monkeypatch.setattr(native, "library", lambda: None)
    asked = ("--profile", "--size", "tiny", "--contender", contender, "--prompt", "6")
    code, said, err = bench(*asked, "--batch", "2")
    assert code == 0, err
    assert "a step takes" in said
    rows = read(tmp_path / "decode.csv")
    assert tuple(rows[0]) == profiling.COLUMNS
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    assert sum(float(row["us"]) for row in rows) > float(rows[0]["us"]) > 0
    products = [row for row in rows if row["flops"]]
    assert products
    assert all(float(row["bytes"]) > 0 for row in products)
    assert bench(*asked, "--batch", "1")[0] == 0
    assert bench(*asked, "--batch", "2")[0] == 0
    kept = read(tmp_path / "decode.csv")
    assert {row["batch"] for row in kept} == {"1", "2"}
    assert len({(row["batch"], row["name"]) for row in kept}) == len(kept)


def test_a_native_step_is_one_row(bench: Bitnet, tmp_path: Path) -> None:
    if native.library() is None:
        pytest.skip("needs the native library")
    asked = ("--profile", "--size", "tiny", "--contender", "ours-auto", "--prompt", "6")
    code, said, err = bench(*asked)
    assert code == 0, err
    assert "a step takes" in said
    rows = read(tmp_path / "decode.csv")
    assert float(next(row["share"] for row in rows if row["name"] == profiling.REST)) > 0.5


def of_profile(step_us: float, profiled_us: float, bandwidth: float) -> profiling.Profile:
    found = [
        profiling.Operation("aten::mm", 2, 70.0, 0.7, 80.0, 9.0, 80.0, 80 / 70),
        profiling.Operation(profiling.REST, 0, 30.0, 0.3, None, None, None, None),
    ]
    return profiling.Profile(found, step_us, profiled_us, 1000, bandwidth, "by hand")


def test_what_a_profile_shows() -> None:
    """Blank where there is nothing to say, in eighty columns too; ~ above 100%."""
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(of_profile(100, 140, 1e7).table())
        assert isinstance(console.file, io.StringIO)
        head, second, product, rest = console.file.getvalue().splitlines()[:4]
        assert (head.split(), second.split()[-2:]) == (["roofline", "%", "of"], ["us", "roofline"])
        assert product.split()[:3] == ["aten::mm", "2", "70.0"]
        assert product.rstrip().endswith("~114%")
        assert rest.split()[-2:] == ["30.0", "30.0%"]  # no calls
        assert rest.strip().startswith("(between")
        assert len(product) <= width


def test_a_profile_that_is_not_the_steps_says_so() -> None:
    assert of_profile(100, 150, 1e7).warning() == ""
    assert "takes 1.6 times as long" in of_profile(100, 160, 1e7).warning()
    assert of_profile(100, 160, 1e7).summary().endswith("takes 100 us: 100%")
    assert of_profile(80, 160, 1e7).summary().endswith("takes 100 us: ~125%")


def test_a_profile_is_all_that_is_printed(tmp_path: Path) -> None:
    """No lines of the profiler's own, which it writes past Python's sys.stderr."""
    program = (
        "from bitnet import progress\n"
        "progress.EVERY = 3600  # a busy machine gets no line of progress\n"
        "from bitnet.bench.decode import SIZES\n"
        f"SIZES['tiny'] = {TINY}\n"
        "from bitnet.cli.main import main\nmain()"
    )
    asked = ["--profile", "--size", "tiny", "--prompt", "6", "--device", "cpu"]
    out = str(tmp_path / "profile.csv")
    python = [sys.executable, "-W", "ignore:the native CPU library", "-c", program]
    child = subprocess.run(
        [*python, "bench", "decode", *asked, "--out", out],
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.strip().endswith(".csv")


def test_the_step_of_a_static_cache_cannot_be_profiled(bench: Bitnet) -> None:
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    code, _, err = bench("--profile", "--size", "tiny", "--contender", "transformers-bf16-static")
    assert code == 2
    assert "nearest that can be profiled is transformers-bf16" in err
