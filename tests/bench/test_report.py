"""Rows in files, and the tables and plots that are drawn from them."""

import csv
import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bitnet_kernels.bench import report, rows
from bitnet_kernels.bench.rows import Row

ROOT = Path(__file__).parents[2]


def row(**changes: Any) -> Row:
    plain: dict[str, Any] = {
        "device": "NVIDIA H100 80GB HBM3",
        "what": "linear",
        "contender": "bitnet",
        "family": "addsub",
        "formulation": "sad",
        "m": 1,
        "n": 4096,
        "k": 4096,
        "dtype": "bf16",
        "cache": "cold",
        "source": "measured",
        "median_us": 2.0,
        "p10_us": 1.5,
        "p90_us": 2.5,
        "ratio_to_16bit": 4.0,
        "gb_s": 2000.0,
        "exact": "yes",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "driver": "",
        "commit": "abc1234",
        "code": "0123",
        "date": "2026-01-02",
        "command": "bitnet bench kernels",
    }
    return Row(**(plain | changes))


def estimated(**changes: Any) -> Row:
    blank = dict.fromkeys(("median_us", "p10_us", "p90_us", "ratio_to_16bit", "gb_s"))
    given = {"source": "estimate", "what": "matmul", "estimate_us": 1.0, "estimate_ratio": 7.77}
    return row(**(blank | given | {"device": "H100 (sm_90)", "exact": ""} | changes))


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "kernels_x.csv"
    kept = [
        row(command='bitnet bench "a, b"', device='AMD "EPYC", 2'),
        row(m=2, threads=4, sm_clock_mhz=1980, energy_uj_token=12.5, roofline_share=0.87),
        row(m=3, median_us=None, p10_us=None, p90_us=None, ratio_to_16bit=None, gb_s=None,
            exact="", skipped="needs a GPU"),
        estimated(),
    ]  # fmt: skip
    assert rows.read(path) == []
    rows.write(path, kept)
    assert rows.read(path) == kept
    assert [p.name for p in path.parent.iterdir()] == ["kernels_x.csv"]
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == rows.COLUMNS
    newer = row(m=2, median_us=1.0)
    merged = rows.merge(kept, [newer, row(m=9)])
    assert [one.m for one in merged] == [1, 2, 3, 1, 9]
    assert merged[1] == newer


DAMAGE = [
    (lambda text: text.replace("measured", "guess", 1), "line 2: source: 'guess'"),
    (lambda text: text[: text.rindex(",") - 20], "line 3: has"),
    (lambda text: text.replace(",2,", ",nan,", 1), "line 2: median_us: 'nan'"),
    (lambda text: text.replace(",2,", ",-1,", 1), "line 2: median_us: '-1'"),
    (lambda text: text.replace(",2,", ",x,", 1), "line 2: median_us: 'x'"),
    (lambda text: text.replace(",4096,4096,", ",4096,,", 1), "line 2: k: ''"),
    (lambda text: text.replace("device,", "gadget,", 1), "line 1: is not a header"),
    (lambda text: "", "line 1: is not a header"),
    (lambda text: text + '"never closed', "line 4"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, damage: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "kernels_x.csv"
    rows.write(path, [row(), row(m=7)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        rows.read(path)


def test_a_row_is_measured_or_estimated_and_never_both(tmp_path: Path) -> None:
    path = tmp_path / "kernels_x.csv"
    rows.write(path, [row()])
    for bad in (
        row(estimate_us=1.0),
        row(estimate_ratio=2.0),
        estimated(median_us=1.0),
        estimated(ratio_to_16bit=2.0),
        estimated(roofline_share=0.5),
        row(median_us=None),
        row(skipped="both a figure and a reason for none"),
        estimated(estimate_us=None),
    ):
        with pytest.raises(ValueError, match="source:"):
            rows.write(path, [bad])
    assert rows.read(path) == [row()]


Bitnet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bitnet(bitnet: Bitnet) -> Bitnet:
    """Runs ``bitnet bench ...``; returns exit code, stdout and stderr."""
    return partial(bitnet, "bench")


def figures() -> list[Row]:
    """Two shapes on an H100 and what surrounds them."""
    shape = {"n": 8192, "k": 28672}
    sixteen = {"contender": "torch", "family": "16-bit", "formulation": "bf16", "exact": "rel 1e-3"}
    return [
        row(**sixteen, median_us=12345.6, ratio_to_16bit=1.0),
        row(median_us=4.0, ratio_to_16bit=2.5),
        row(formulation="popcount", median_us=2.0, ratio_to_16bit=5.0, roofline_share=0.813),
        row(family="dot", formulation="dp4a", median_us=1.9, ratio_to_16bit=5.25),
        row(family="auto", formulation="auto", median_us=1.95, ratio_to_16bit=5.12),
        row(family="auto", formulation="auto", median_us=0.1, ratio_to_16bit=99.0, cache="hot"),
        row(family="auto", formulation="auto", median_us=0.1, ratio_to_16bit=98.0, what="matmul"),
        row(**sixteen, **shape, m=4096, median_us=50.0, ratio_to_16bit=1.0),
        row(**shape, family="dot", formulation="gemm", m=4096, median_us=30.0, ratio_to_16bit=1.67),
        estimated(),
    ]


def test_a_table_by_hand() -> None:
    detailed = report.details(figures(), {"kernels_nvidia-h100-80gb-hbm3_speedup.png"})
    title, _, *table = detailed.split("\n\n![")[0].splitlines()
    assert title.startswith("**NVIDIA H100 80GB HBM3**, measured: torch 2.13.0, commit abc1234")
    assert table == [
        "| N x K | | M = 1 | M = 4096 |",
        "|---|---|---|---|",
        "| 4096 x 4096<br>llama3-8b o | 16-bit, µs | 12,345.6 |  |",
        "|  | addsub | 5.00 popcount, 81% |  |",
        "|  | dot | 5.25 dp4a |  |",
        "|  | auto | 5.12 |  |",
        "|  | goal: floor / stretch | 3 / 4.5 | 1.2 / 1.7 |",
        "| 8192 x 28672<br>llama3-70b down | 16-bit, µs |  | 50.0 |",
        "|  | dot |  | 1.67 gemm |",
        "|  | goal: floor / stretch | 5.5 / 7.5 | 1.4 / 1.75 |",
    ]
    assert "(../docs/results/kernels_nvidia-h100-80gb-hbm3_speedup.png)" in detailed
    assert "7.77" in detailed.split("estimate")[1]
    assert report.details([]) == report.NOTHING


def test_goals_are_shown_for_hopper_alone() -> None:
    rtx = [dataclasses.replace(one, device="NVIDIA GeForce RTX 4090") for one in figures()[:-1]]
    assert "goal" not in report.details(rtx)
    h200 = [dataclasses.replace(one, device="NVIDIA H200") for one in figures()[:-1]]
    assert "goal" in report.details(h200)


def test_a_figure_in_two_files_is_refused(tmp_path: Path) -> None:
    rows.write(tmp_path / "kernels_a.csv", [row()])
    rows.write(tmp_path / "kernels_b.csv", [row(median_us=3.0)])
    with pytest.raises(ValueError, match=r"kernels_b.csv: .* is in kernels_a.csv as well"):
        report.load(tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with figures, and a README of the kernels that does not show them yet."""
    marked = "head\n<!-- kernels:begin -->\nold\n<!-- kernels:end -->\ntail\n"
    counted = "<!-- machine-code:begin -->\n<!-- machine-code:end -->\n"
    path = tmp_path / "kernels" / "README.md"
    path.parent.mkdir()
    path.write_text(counted + marked, encoding="utf-8")
    rows.write(tmp_path / "docs" / "results" / "kernels_h100.csv", figures())
    return tmp_path


def test_report_writes_and_check_finds_what_is_stale(bitnet: Bitnet, checkout: Path) -> None:
    path = checkout / "kernels" / "README.md"
    before = path.read_text()
    code, out, _ = bitnet("report", "--check", "--root", checkout)
    assert code == 1
    assert "kernels/README.md: stale; run bitnet bench report" in out
    assert path.read_text() == before
    assert not list(checkout.glob("docs/results/*.png"))
    code, out, err = bitnet("report", "--root", checkout)
    assert code == 0, err
    assert "kernels/README.md: written" in out
    readme = path.read_text(encoding="utf-8")
    assert "\nhead\n<!-- kernels:begin -->\n**NVIDIA H100" in readme
    assert readme.endswith("\n<!-- kernels:end -->\ntail\n")
    assert bitnet("report", "--check", "--root", checkout)[0] == 0
    names = {path.name for path in checkout.glob("docs/results/*.png")}
    assert names == {
        "kernels_nvidia-h100-80gb-hbm3_speedup.png",
        "kernels_nvidia-h100-80gb-hbm3_roofline.png",
        "kernels_estimate_h100-sm-90_speedup.png",
    }
    for name in names:
        assert f"(../docs/results/{name})" in readme
        assert (checkout / "docs/results" / name).read_bytes().startswith(b"\x89PNG")
    changed = [dataclasses.replace(one, date="2026-01-03") for one in figures()]
    rows.write(checkout / "docs" / "results" / "kernels_h100.csv", changed)
    code, out, _ = bitnet("report", "--check", "--root", checkout)
    assert code == 1
    path.write_text(readme.replace("5.12", "9.99"), encoding="utf-8")  # by hand
    rows.write(checkout / "docs" / "results" / "kernels_h100.csv", figures())
    code, out, _ = bitnet("report", "--check", "--root", checkout)
    assert (code, out.splitlines()) == (1, ["kernels/README.md: stale; run bitnet bench report"])


def test_noisy_figures_are_marked() -> None:
    quiet = report.details([row(p10_us=3.0, median_us=4.0, p90_us=5.9)])
    noisy = report.details([row(p10_us=3.0, median_us=4.0, p90_us=6.1)])
    assert "~" not in quiet
    assert "~" in noisy
    assert "~: the 90th percentile is more than twice the 10th." in noisy


def test_the_table_of_machine_code_has_a_row_per_kernel(tmp_path: Path) -> None:
    """A row a kernel that has weights, a column a GPU; what is missing or damaged is said."""
    path = tmp_path / "machine_code.csv"
    assert report.machine_code(path) == report.NOTHING
    head = "gpu,name,sm,instructions_per_weight,registers,weights_per_clock,"
    head += "needed_weights_per_clock,multipliers_on_data\n"
    path.write_text(
        head
        + "A100,dp4a M=1,80,0.5566,127,230,50,IDP.4A.U8.S8 x128\n"
        + "H100,dp4a M=1,90,0.574,125,222,51,IDP.4A.U8.S8 x128\n"
        + "H100,sad M=1,90,1.44,72,40,50,0\n"
        + "H100,quant,90,,40,,51,FFMA x9\n"
    )
    table = report.machine_code(path).splitlines()
    assert table[-4:] == [
        "| | A100 (sm_80) | H100 (sm_90) |",
        "|---|---|---|",
        "| dp4a M=1 | 0.56; 127; 100%; IDP | 0.57; 125; 100%; IDP |",
        "| sad M=1 |  | 1.44; 72; 80%; nothing |",
    ]
    for damaged in ("x\n1\n", head + "A100,sad,80,1.4,72,fast,50,0\n", head + "A100,sad,80,1.4\n"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"machine_code.csv: not written by bitnet inspect"):
            report.machine_code(path)


def test_report_without_matplotlib(
    bitnet: Bitnet, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = bitnet("report", "--root", checkout)
    assert code == 0
    assert 'no plots: they need matplotlib (pip install -e ".[plots]")' in out
    assert not list(checkout.glob("docs/results/*.png"))
    assert "**NVIDIA H100" in (checkout / "kernels/README.md").read_text(encoding="utf-8")


def test_mistakes_of_a_report(bitnet: Bitnet, checkout: Path, tmp_path: Path) -> None:
    code, _, err = bitnet("report", "--root", tmp_path / "nowhere")
    assert (code, "--root" in err) == (2, True)
    (checkout / "kernels/README.md").write_text("no marks")
    code, _, err = bitnet("report", "--root", checkout)
    assert code == 2
    assert "kernels/README.md: expected one <!-- kernels:begin -->" in err
    (checkout / "docs/results/kernels_h100.csv").write_text("x\n")
    code, _, err = bitnet("report", "--check", "--root", checkout)
    assert code == 2
    assert "kernels_h100.csv: line 1" in err


def test_the_tables_of_this_project_are_those_of_its_figures(bitnet: Bitnet) -> None:
    code, out, err = bitnet("report", "--check", "--root", ROOT)
    assert code == 0, out + err
