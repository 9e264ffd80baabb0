"""bitnet bench exact: every operator is checked, and what is wrong, hangs or crashes is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet_kernels
from bitnet.bench import exact as checking
from bitnet.bench import gpu
from bitnet.bench.exact import COLUMNS
from bitnet_kernels.bench import contenders as contending
from bitnet_kernels.bench import exact as cases
from bitnet_kernels.bench.verify import Inexact

ROOT = Path(__file__).parents[2]
SINGLE = [case for case in cases.small_cases() if case.m == 1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "operator", sorted({case.operator for case in SINGLE}), ids=lambda name: name.replace(" ", "_")
)
def test_operators_are_exact(operator: str) -> None:
    mine = [case for case in SINGLE if case.operator == operator]
    if any(case.kernel for case in mine):  # one of Triton's, in its interpreter
        mine = [case for case in mine if case.kernel in ("auto", "gemm")]
    for case in mine:
        verdict, why = checking.verdict(case, CPU)
        assert verdict == "yes" or verdict.startswith("rel "), why


def test_every_operator_and_kernel_is_checked() -> None:
    operators = {case.operator.partition(" ")[0] for case in cases.small_cases()}
    named = {
        "packing": {name for name in bitnet_kernels.__all__ if "pack" in name or "bit" in name}
    }
    covered = set().union(*(named.get(name, {name}) for name in operators))
    assert covered >= set(bitnet_kernels.__all__) - {"KERNELS"}
    of_products = {case.kernel for case in cases.small_cases()} - {""}
    families = {"addsub", "dot", "reference"}
    assert of_products == set(bitnet_kernels.KERNELS) - families
    timed = cases.timed_cases([(64, 256)], [1, 4096])
    assert {case.kernel for case in timed if case.m == 1} == of_products
    assert {"auto", "gemm"} <= {case.kernel for case in timed if case.m == 4096}


SPOILED: dict[str, Callable[[Any], Any]] = {
    "ternary_matmul": lambda y: y + (y == y.flatten()[0]),
    "quantized_linear": lambda y: y.nan_to_num(0.0).neg(),
    "ternary_linear": lambda y: y.float(),
    "quant": lambda out: (out[0], out[1] * (1 + 2**-23), out[2]),
    "rmsnorm_quant": lambda out: (out[0].flip(-1), *out[1:]),
    "add_rmsnorm_quant": lambda out: (*out[:3], out[3] + 1),
    "relu2_mul_rmsnorm_quant": lambda out: (out[0], out[1], out[2] + 1),
    "int8_linear": lambda y: y[:-1],
    "int8_matmul": lambda y: y ^ 1,
    "rope_append": lambda q: q.roll(1, -1),
    "decode_attention": lambda y: y * 1.05,
    "bit_planes": lambda planes: planes ^ 1,
    "pack_base3": lambda packed: packed.flip(-1),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator in turn gives something else than it should, on "the device" alone."""
    right, spoil = getattr(cases, name), SPOILED[name]
    operator = "packing" if name in ("bit_planes", "pack_base3") else name
    case = next(
        c for c in cases.small_cases() if c.operator == operator and c.kernel in ("", "auto")
    )
    calls = 0

    def wrong(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = right(*args, **options)
        return result if operator == "packing" and calls == 1 else spoil(result)

    monkeypatch.setattr(cases, name, wrong)
    if operator.endswith("_quant") or operator == "quant":
        inputs, norm = (2 if name.split("_")[0] in ("add", "relu2") else 1), name != "quant"
        check = cases._quantizer(wrong, getattr(cases.reference, name), inputs, norm)
        monkeypatch.setitem(cases._CHECKS, name, check)
    with pytest.raises(Inexact):
        cases.check(case, CPU)


def test_what_is_timed_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each kernel is a contender."""

    def contenders(device: Any, kernels: Any, dtypes: Any, whats: Any, m: int) -> Any:
        (kernel,), (dtype,) = kernels, dtypes
        return [
            contending.Contender(
                "bitnet", "dot", kernel, what, dtype, 2, None, contending._ours(kernel, what, dtype)
            )
            for what in whats
        ]

    monkeypatch.setattr(cases, "contenders", contenders)
    (case,) = (one for one in cases.timed_cases([(33, 300)], [3]) if one.kernel == "gemm")
    assert checking.verdict(case, CPU) == ("yes", "")
    right = contending.ternary_matmul
    monkeypatch.setattr(contending, "ternary_matmul", lambda *args: right(*args) + 1)
    verdict, why = checking.verdict(case, CPU)
    assert verdict == "no"
    assert "99 of 99 outputs are wrong" in why


PRETENDER = """
import os, sys, time
from bitnet_minutes_stand_in import serve

def check(operator, *rest):
    if operator == "crashes":
        os.kill(os.getpid(), 11)
    if operator == "hangs":
        time.sleep(60)
    return ["no" if operator == "spoils" else "yes", str(os.getpid()), operator != "spoils"]

time.sleep(0.4)  # what starting takes is not the case's
serve(lambda: {"check": check, "ready": lambda: True})
"""


def test_a_crash_and_a_hang_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that import no torch; each case has a row, and a fresh process follows a bad one."""
    worker = (ROOT / "bitnet" / "bench" / "worker.py").read_text()
    (tmp_path / "bitnet_minutes_stand_in.py").write_text(worker)
    (tmp_path / "pretender.py").write_text(PRETENDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(name: str, device: str, folder: Path) -> Any:
        return checking.Worker(name, "pretender", [device], folder, "--jobs")

    monkeypatch.setattr(checking, "_start", start)
    names = ["a", "crashes", "b", "spoils", "c", "d"]
    todo = [cases.Case(name, "sad", 1, 2, 3, "bf16") for name in names]
    rows = list(checking.check_all(todo, "cpu", 1, 60))
    assert [row["operator"] for row in rows] == names
    assert [row["exact"] for row in rows] == ["yes", "no", "yes", "no", "yes", "yes"]
    assert "signal 11" in rows[1]["why"]
    pids = {row["operator"]: row["why"] for row in rows}
    assert pids["b"] == pids["spoils"]
    assert pids["c"] == pids["d"]
    assert len({pids[name] for name in "abc"}) == 3  # a fresh one behind each that went wrong
    assert set(COLUMNS[:9]) == set(rows[0])
    (row,) = checking.check_all([todo[0]._replace(operator="hangs")], "cpu", 2, 0.3)
    assert (row["exact"], row["why"]) == ("no", "not done after 0 s")
    rows = list(checking.check_all(todo, "cpu", 3, 60))  # side by side
    assert sorted(row["operator"] for row in rows) == sorted(names)


def test_the_command_writes_each_row(
    bitnet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is had; exit code 1 where something is not exact."""
    path = tmp_path / "rows.csv"
    seen: list[int] = []

    def check_all(todo: Any, device: str, jobs: int, limit: float) -> Any:
        assert {case.m for case in todo} == {1}
        for index, (case, verdict) in enumerate(zip(todo, ["yes", "no", ""], strict=False)):
            seen.append(len(gpu.read(path)) if index else 0)
            yield dict(zip(COLUMNS, [*map(str, case), verdict, "why", "1.00"], strict=False))

    monkeypatch.setattr("bitnet.cli.bench_exact.check_all", check_all)
    code, out, _ = bitnet("bench", "exact", "--quick", "--device", "cpu", "--out", path)
    assert (code, seen) == (1, [0, 1, 2])
    assert "1 of 3 cases are exact, 1 are not, 1 are not for this device" in out
    assert [row["exact"] for row in gpu.read(path)] == ["yes", "no", ""]
