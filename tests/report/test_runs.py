"""Reading a run: whatever stands in metrics.jsonl, and what is no run at all."""

import json
import os
from pathlib import Path

import pytest

from bitnet.report.runs import Curve, read_run, read_runs
from bitnet.schema import UserError
from tests.helpers.run_folders import LAYERS, loss_rows, ternary_row, write_run


def test_a_run_is_read(tmp_path: Path) -> None:
    rows = [*loss_rows(range(10, 60, 10), 2.0), ternary_row(50, 0.25, 0.125)]
    run = read_run(write_run(tmp_path / "one", rows))
    assert run.name == "one"
    assert (run.step, run.tokens(run.step), run.finished) == (50, 3200, False)
    assert run.points("val_bpb") == [(s, 2.0 + (50 - s) / 50) for s in range(10, 60, 10)]
    assert run.last("val_bpb") == 2.0
    assert run.points("mfu") == []
    assert run.last("mfu") is None
    assert list(run.layers["flip_rate"]) == LAYERS
    assert run.layers["zeros"][LAYERS[0]].points() == [(50, 0.25)]
    assert run.samples[-1] == (50, "sample of step 50")
    assert (run.unread, run.stored) == (0, {})


def test_weights_on_the_disk_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", loss_rows(range(100, 101), 2.0))
    for name, size in (("model", 1000), ("model-packed", 100)):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(bytes(size))
    run = read_run(folder)
    assert run.stored == {"model": 1000, "model-packed": 100}
    assert run.finished


def test_damaged_lines_are_counted_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.report.runs.LONGEST_LINE", 300_000)
    damaged = [
        *(b'{"step": 3, "loss"', b"[]", b"\xff\xfe", b'{"step": true}', b'{"step": 1.5}', b""),
        *(b'{"loss": 1.0}', b'{"step": -1}', b'{"step": 9007199254740993}', b"null", b"7" * 9999),
        *(b"[" * 100_000, b'{"step": 4, "loss": 7.0, "sample": "' + b"x" * 700_000 + b'"}'),
    ]
    first, last = b'{"step": 5, "loss": 1.0}', b'{"step": 6, "loss": 2.0}'
    early = b'{"step": 4, "loss": 9.0}'
    written = b'{"step": 7, "lo'  # by a run in progress: not damage
    folder = write_run(tmp_path / "one", [])
    (folder / "metrics.jsonl").write_bytes(b"\n".join([first, *damaged, early, last, written]))
    run = read_run(folder)
    assert run.points("loss") == [(5, 1.0), (6, 2.0)]
    assert run.unread == len(damaged) + 1


def test_values_that_are_no_finite_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [
        f'{{"step": {step}, "loss": {value}, "sample": {value}, "ternary/layers": {value}}}'
        for step, value in enumerate(
            ["NaN", "Infinity", "null", "true", "[1]", "{}", "1" + 400 * "0", '{"a": 1}', "1e999"]
        )
    ]
    layers = {"x": {"zeros": None, "flip_rate": "0.5"}, "y": 3, "z": {"zeros": 0.5}}
    lines.append(json.dumps({"step": 50, "loss": 2, "ternary/layers": layers, "sample": 3}))
    folder = write_run(tmp_path / "one", [])
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert run.points("loss") == [(50, 2.0)]
    assert {name: list(curves) for name, curves in run.layers.items()} == {"zeros": ["z"]} | {
        name: [] for name in run.layers if name != "zeros"
    }
    assert run.samples == []
    assert run.unread == 0


def test_memory_is_bounded_by_lines_layers_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.report.runs.MOST_LAYERS", 50)
    rows = [
        {
            "step": step,
            "loss": 1.0,
            "sample": "x" * 2500 if step % 99 == 0 else "",
            "ternary/layers": {f"{step}": {"zeros": 0.3}, "first": {"zeros": 0.3}},
            f"new{step}": 1.0,
        }
        for step in range(5050)
    ]
    run = read_run(write_run(tmp_path / "one", rows))
    assert len(run.points("loss")) < 4100
    assert len(run.layers["zeros"]) == 50
    assert len(run.layers["zeros"]["first"].points()) < 70
    assert set(run.curves) == {"loss"}
    assert len(run.samples) <= 12
    assert (run.samples[0][0], run.samples[-1][0]) == (0, 5049)
    assert {len(text) for _, text in run.samples} == {2000}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 9, 10, 17, 100, 1001])
def test_a_long_curve_is_the_means_of_neighbours(count: int) -> None:
    """Of the values 1, 2, 3, ... the mean of a group is that of its ends."""
    curve = Curve(limit=4)
    for step in range(1, count + 1):
        curve.add(step, float(step))
    points = curve.points()
    assert len(points) <= 5 + 1
    assert points[-1][0] == count
    if count <= 4:
        assert points == [(step, step) for step in range(1, count + 1)]
    before = 0
    for last, mean in points[:-1]:
        assert mean == pytest.approx((before + 1 + last) / 2)
        before = last


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = loss_rows(range(10, 20, 10), 2.0)
    folders = [write_run(tmp_path / parent / "same", rows) for parent in "ab"]
    runs = read_runs([*folders, folders[0]])
    assert [run.name for run in runs] == [str(folder) for folder in folders]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    good = write_run(tmp_path / "quickstart", loss_rows(range(10, 20, 10), 2.0))
    with pytest.raises(UserError, match=r"quikstart: is no folder of a run.* nearest .*quickstart"):
        read_run(tmp_path / "quikstart")
    with pytest.raises(UserError, match=r"it has no config\.toml"):
        read_run(good / "config.toml")
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(UserError, match="holds no line of metrics yet"):
        read_run(empty)
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"it has no metrics\.jsonl"):
        read_run(empty)
    os.mkfifo(empty / "metrics.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_run(empty)
    (good / "config.toml").write_text("[model]\ndepth = 3\n")
    with pytest.raises(UserError, match="is not the resolved config"):
        read_run(good)
    (good / "config.toml").write_text("[model\n")
    with pytest.raises(UserError, match="not valid TOML"):
        read_run(good)
