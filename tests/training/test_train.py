"""train.py whole: it learns, is exact, goes on, and refuses what would change a begun run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet.model
from bitnet.build import build_model
from bitnet.config import load_config
from bitnet.export.folder import load
from bitnet.schema import UserError
from bitnet.training.step import StepResult
from tests.helpers.double import rotary64
from tests.helpers.fast_paths import counting
from tests.helpers.training_script import Run, exact, train


def test_measuring_a_busy_machine_changes_no_loss(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two threads, with a CPU that seems to be taken away all the time."""
    threads, measured = torch.get_num_threads(), []

    class Busy(train.CoreWatch):  # type: ignore[name-defined, misc]
        WINDOW, GAIN, COST = 1e-9, 1e-9, 0

        def __init__(self) -> None:
            super().__init__(cpu_clock=lambda: 0.0)

        def end(self, forward: Callable[[], object]) -> str:
            measured.append(super().end(forward))
            return measured[-1]

    short = ("train.threads=2", "train.steps=6", "model.int8_backward=both")
    try:
        plain = run("run.name=plain", *short)
        monkeypatch.setattr(train, "CoreWatch", Busy)
        watched = run("run.name=watched", *short)
    finally:
        torch.set_num_threads(threads)
    assert any("train.threads=1 would be" in hint for hint in measured)
    assert exact(watched) == exact(plain)


def test_every_step_takes_the_fast_paths(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers of 7 matrices with 4 inputs, 2 micro-batches; telemetry and evaluations between."""
    plain, counts = train.train_step, []

    def step(*arguments: Any) -> StepResult:
        with counting() as calls:
            result: StepResult = plain(*arguments)
        counts.append(dict(calls))
        return result

    monkeypatch.setattr(train, "train_step", step)
    run("train.steps=4", "eval.every=2", "log.telemetry_every=1")
    once = {"weights quantized": 14, "inputs quantized": 16, "losses without logits": 2}
    assert counts == [once] * 4


def test_a_run_learns_and_leaves_what_it_should(run: Run, tmp_path: Path) -> None:
    rows = run()
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert steps[0]["loss"] == pytest.approx(5.77, abs=0.1)  # ln 320
    assert steps[-1]["loss"] < 4.5
    evaluations = [row for row in rows if "val_bpb" in row]
    assert [row["step"] for row in evaluations] == [10, 20, 30, 40]
    assert evaluations[-1]["val_bpb"] < evaluations[0]["val_bpb"]
    readings = [row for row in rows if "ternary/zeros" in row]
    assert [row["step"] for row in readings] == [6, 12, 18, 24, 30, 36]
    assert all(0.2 < row["ternary/zeros"] < 0.45 for row in readings)
    assert steps[-1]["tokens"] == 40 * 256
    run_dir = tmp_path / "tiny"
    assert load_config([run_dir / "config.toml"]).train.steps == 40
    model, tokenizer = load(run_dir / "model")
    assert model.config.vocab_size == tokenizer.vocab_size == 320
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step_00000035", "step_00000040"]


def test_running_again_changes_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run()
    assert run() == rows
    assert "resumed at step 40" in capsys.readouterr().out


def test_micro_batches_do_not_change_the_maths(run: Run) -> None:
    whole = run("run.name=whole", "train.micro_batch=8", "train.steps=5")
    parts = run("run.name=parts", "train.micro_batch=2", "train.steps=5")
    for a, b in zip(whole, parts, strict=True):
        if "loss" in a:  # sums in another order, then 5 steps of AdamW
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.linear=fp"],
        ["optim.optimizer=muon"],
        ["train.dtype=bf16"],
        ["model.norm_placement=in_linear", "model.granularity=row", "optim.lr_schedule=two_stage"],
        ["model.tie_embeddings=false", "optim.lr_schedule=cosine", "optim.wd_schedule=constant"],
    ],
)
def test_variants_learn(run: Run, overrides: list[str]) -> None:
    rows = run(*overrides)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own tracing
@pytest.mark.parametrize("linear", ["ternary", "fp"])
def test_compiled_is_the_same_run(run: Run, linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and loss as one graph, compiled once, although each step has its own codes, and
    readings and evaluations come between. Fused code rounds in other places, so both runs train in
    fp64, which neither a sample nor a model folder takes; the losses themselves are fp32."""
    monkeypatch.setattr(bitnet.model, "rotary", rotary64)
    monkeypatch.setattr(train, "build_model", lambda *a, **k: build_model(*a, **k).double())
    monkeypatch.setattr(train, "save_model", lambda *_, **__: None)
    small = [f"model.linear={linear}", "train.steps=10", "eval.every=5"]
    eager = run(*small, "run.name=eager")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(*small, "run.name=compiled", "train.compile=true")
    assert [row.keys() for row in compiled] == [row.keys() for row in eager]
    for a, b in zip(compiled, eager, strict=True):
        for key in ("loss", "val_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=0), a["step"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_another_seed_is_another_run(run: Run) -> None:
    one = run("run.name=one", "train.steps=2")
    other = run("run.name=other", "train.steps=2", "run.seed=1")
    assert one[0]["loss"] != other[0]["loss"]


def test_init_from_starts_with_the_saved_weights(run: Run, tmp_path: Path) -> None:
    first = run()
    folder = tmp_path / "tiny" / "model"
    second = run("run.name=second", f"train.init_from={folder}", "train.steps=1")
    assert second[0]["loss"] < first[0]["loss"] - 1
    with pytest.raises(UserError, match=r"has model.d_ff = 64, this config 96"):
        run("run.name=third", f"train.init_from={folder}", "model.d_ff=96")


def test_a_begun_run_refuses_another_model_or_data(run: Run) -> None:
    run("train.steps=3")
    with pytest.raises(UserError, match=r"model.d_ff: 64 -> 96; model.qk_norm: False -> True"):
        run("train.steps=3", "model.d_ff=96", "model.qk_norm=true")
    with pytest.raises(UserError, match=r"data.seq_len: 32 -> 64"):
        run("train.steps=3", "data.seq_len=64")
    with pytest.raises(UserError, match=r"run.seed: 0 -> 1"):
        run("train.steps=3", "run.seed=1")
    rows = run("train.steps=6", "optim.grad_clip=0.5", "data.threads=1")  # these may change
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_keeps_its_record(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train.steps=5")
    config = (tmp_path / "tiny" / "config.toml").read_text()
    capsys.readouterr()
    run("train.steps=3", "optim.lr=1e-5")
    out = capsys.readouterr().out
    assert "resumed at step 5 of 3: nothing is left to train" in out
    assert "optim.lr: 0.003 -> 1e-05" in out
    assert (tmp_path / "tiny" / "config.toml").read_text() == config
    with pytest.raises(UserError, match=r"optim.beta2: 0.95 -> 0.5"):
        run("optim.beta2=0.5")
