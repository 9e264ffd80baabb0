"""train.py whole: killed and resumed, stopped, damaged, diverging, and started by mistake."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet.model
from bitnet.build import build_model
from bitnet.config import load_config
from bitnet.data.prepare import prepare
from bitnet.export.folder import load
from bitnet.schema import UserError
from bitnet.training import checkpoint
from tests.helpers.double import rotary64
from tests.helpers.training_script import TRAIN, train

ROOT = Path(__file__).parents[2]
WORDS = [*"aeiou", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "quietly"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of seeded word salad."""
    folder = tmp_path_factory.mktemp("texts")
    generator = random.Random(0)
    rows = []
    for _ in range(300):
        words = [generator.choice(WORDS) for _ in range(generator.randint(5, 60))]
        rows.append(json.dumps({"text": " ".join(words) + "."}))
    (folder / "texts.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def config_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand parameters whose data are prepared."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(
        f"""
[model]
d_model = 32
n_layers = 2
n_heads = 2
d_ff = 64
[data]
path = "{texts / "prepared"}"
sources = ["{texts / "texts.jsonl"}"]
vocab_size = 320
val_fraction = 0.1
seq_len = 32
[optim]
lr = 3e-3
[train]
device = "cpu"
batch_tokens = 256
micro_batch = 4
steps = 40
[eval]
every = 10
sample_tokens = 8
[checkpoint]
every = 7
[log]
every = 1
telemetry_every = 6
wandb = "disabled"
"""
    )
    prepare(load_config([path]).data, progress=False)
    return path


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Run:
    """Trains in this process, in a folder of the test's own; returns the lines of metrics."""

    def run(*overrides: str) -> list[dict[str, Any]]:
        config = load_config([config_file], [f"run.dir={tmp_path}", *overrides]).resolve()
        with train.locked(config.run_dir):
            train.train(config, "the command")
        return read_metrics(config.run_dir)

    return run


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


TIMED = ("tokens_per_second", "mfu", "peak_memory_bytes")


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is measured and not computed."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


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
    """Forward and loss as one graph, compiled once, although each step has codes of its own, and
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


# -- Killed ------------------------------------------------------------------------------------

KILLED_INSIDE_A_SAVE = """
import os, runpy, signal, sys
import bitnet.durable as durable
calls, fsync = 0, durable._fsync
def deadly(path):
    global calls
    calls += 1
    if calls == int(os.environ["FSYNCS"]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(path)
durable._fsync = deadly
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def spawn(args: list[str], wrapper: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [str(TRAIN), *args]
    if wrapper:
        command = ["-c", f"import sys; sys.argv = {command!r}\n{wrapper}"]
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def kill_at(process: subprocess.Popen[str], metrics: Path, step: int, delay: float) -> None:
    """SIGKILL once the metrics hold ``step`` and a moment has passed."""
    wanted = f'{{"step": {step},'
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and wanted in metrics.read_text():
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    process.communicate()


def test_killed_six_times_is_bit_identical(config_file: Path, tmp_path: Path) -> None:
    args = [str(config_file), "model.n_layers=6", "optim.optimizer=muon", "train.steps=45"]
    reference = spawn([*args, f"run.dir={tmp_path / 'whole'}"])
    assert reference.wait(120) == 0
    reference.communicate()
    expected = read_metrics(tmp_path / "whole" / "tiny")

    args.append(f"run.dir={tmp_path / 'killed'}")
    metrics = tmp_path / "killed" / "tiny" / "metrics.jsonl"
    generator = random.Random(1)
    moments = sorted(generator.sample(range(2, 40), 5))
    for i, step in enumerate(moments):
        kill_at(spawn(args), metrics, step, generator.random() * 0.05)
        if i == 2:  # the sixth kill: among the files of a checkpoint, before it has its name
            inside = spawn(args, KILLED_INSIDE_A_SAVE, FSYNCS="3")
            inside.communicate(timeout=120)
            assert inside.returncode == -signal.SIGKILL
            names = [p.name for p in (tmp_path / "killed/tiny/checkpoints").iterdir()]
            assert any(name.startswith(".tmp-step_") for name in names), names
    final = spawn(args)
    assert final.wait(120) == 0, final.communicate()
    final.communicate()
    found = read_metrics(tmp_path / "killed" / "tiny")
    steps = [row["step"] for row in found if "loss" in row]
    assert steps == list(range(1, 46))
    assert exact(found) == exact(expected)
    whole, _ = load(tmp_path / "whole/tiny/model")
    killed, _ = load(tmp_path / "killed/tiny/model")
    for (name, a), b in zip(whole.state_dict().items(), killed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(
    config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    args = [str(config_file), f"run.dir={tmp_path}", "train.steps=100000", "checkpoint.every=99999"]
    process = spawn([*args, "eval.every=99999"])
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and '{"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert not (tmp_path / "tiny" / "model").exists()  # what make quickstart would pack
    step = int(re.search(r"stopped at step (\d+) and saved; resume with", out)[1])  # type: ignore[index]
    assert f"{TRAIN} {config_file}" in out
    saved = checkpoint.load_newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert saved.step == step == read_metrics(tmp_path / "tiny")[-1]["step"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run("run.name=whole")
    run()
    newest = tmp_path / "tiny" / "checkpoints" / "step_00000040" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    assert exact(run()) == exact(expected)
    out = capsys.readouterr().out
    assert "step_00000040: damaged: model.safetensors" in out
    assert "resumed at step 35" in out


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


def test_steps_that_are_not_finite(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned gradients at steps 4, 5 and from 20 on: skipped, counted, and in the end an error
    that keeps the last good checkpoint."""
    clip = train.clip_gradients
    calls = 0

    def poisoned(parameters: Any, max_norm: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        parameters = list(parameters)
        if calls in (4, 5) or calls >= 20:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, max_norm)

    monkeypatch.setattr(train, "clip_gradients", poisoned)
    with pytest.raises(
        UserError, match=r"4 steps in a row were not finite.*good checkpoint is kept"
    ):
        run("train.max_bad_steps=4")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "tiny") if "loss" in row}
    assert max(rows) == 23
    assert [rows[step]["skipped"] for step in (3, 4, 5, 6, 19, 20, 23)] == [0, 1, 2, 2, 2, 3, 6]
    assert rows[4]["grad_norm"] is None
    saved = checkpoint.load_newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert saved.step == 14
    assert all(tensor.isfinite().all() for tensor in saved.tensors["model"].values())


def test_a_streak_of_bad_steps_never_replaces_a_good_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = train.clip_gradients
    calls = 0

    def poisoned(parameters: Any, max_norm: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return clip(parameters, max_norm) * (float("nan") if calls > 15 else 1)

    monkeypatch.setattr(train, "clip_gradients", poisoned)
    with pytest.raises(UserError, match="10 steps in a row"):
        run("checkpoint.every=3", "eval.every=100")
    kept = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert kept == ["step_00000012", "step_00000015"]
    monkeypatch.setattr(train, "clip_gradients", clip)
    rows = run("checkpoint.every=3", "eval.every=100", "optim.lr=1e-3")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))


def test_data_prepared_anew_from_other_text_is_refused(run: Run, tmp_path: Path) -> None:
    text, data = tmp_path / "text.txt", f"data.path={tmp_path / 'data'}"
    text.write_text("one two three four five\n\n" * 2000)
    options = (f"data.sources={text}", data, "data.vocab_size=300", "train.steps=2")
    run(*options)
    run(*options)
    shutil.rmtree(tmp_path / "data")
    text.write_text("six seven eight nine ten\n\n" * 2000)
    with pytest.raises(UserError, match="was prepared anew since this run began"):
        run(*options)


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


def test_two_processes_in_one_folder(config_file: Path, tmp_path: Path) -> None:
    config = load_config([config_file], [f"run.dir={tmp_path}", "train.steps=1"]).resolve()
    with train.locked(config.run_dir):
        process = spawn([str(config_file), f"run.dir={tmp_path}"])
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another process is training in this folder" in err


# -- Mistakes ----------------------------------------------------------------------------------

MISTAKES: list[tuple[str, list[str], str]] = [
    ("typo in a key", ["optim.lrr=1"], "unknown key optim.lrr; the nearest is optim.lr"),
    ("typo in a section", ["optm.lr=1"], "did you mean 'optim'"),
    ("wrong type", ["train.steps=many"], "train.steps = 'many': expected a valid integer"),
    ("out of range", ["optim.beta1=1.5"], "optim.beta1 = 1.5"),
    ("a seed beyond 64 bits", ["run.seed=99999999999999999999999"], "run.seed"),
    ("a width beyond reason", ["model.d_model=99999999999999"], "model.d_model"),
    ("wrong choice", ["model.activation=relu"], "the nearest is 'relu2'"),
    ("no value", ["optim.lr"], "expected section.key=value"),
    ("missing config", ["no/such.toml"], "no/such.toml: no such config file"),
    ("missing file", ["data.path={tmp}/p", "data.sources={tmp}/none.txt"], "none.txt"),
    ("empty file", ["data.path={tmp}/p", "data.sources={tmp}/empty.txt"], "empty"),
    ("empty folder", ["data.path={tmp}/p", "data.sources={tmp}/folder"], "folder"),
    ("tiny data", ["data.path={tmp}/p", "data.sources={tmp}/tiny.txt"], "18 bytes of text"),
    (
        "too large a vocabulary for the text",
        ["data.path={tmp}/p", "data.sources={tmp}/dull.txt", "data.vocab_size=5000"],
        "data.vocab_size",
    ),
    ("bad JSON", ["data.path={tmp}/p", "data.sources={tmp}/bad.jsonl"], "bad.jsonl"),
    ("another field", ["data.path={tmp}/p", "data.text_field=body"], "body"),
    ("unknown data set", ["data.path={tmp}/p", "data.sources=hf:no/such"], "no/such"),
    ("not a tokenizer", ["data.tokenizer={tmp}/tiny.txt"], "tiny.txt"),
    ("vocabulary mismatch", ["model.vocab_size=77"], "model.vocab_size = 77 differs"),
    ("data of other settings", ["data.vocab_size=300"], "vocab_size"),
    ("heads that do not divide", ["model.n_heads=5"], "the nearest that does is"),
    ("batch that does not divide", ["train.batch_tokens=100"], "train.batch_tokens = 100"),
    ("sequences longer than the data", ["data.seq_len=100000", "train.batch_tokens=0"], "tokens"),
    ("a prompt beyond the context", ["eval.sample_prompt=" + 200 * "x "], "eval.sample_prompt has"),
    ("a path for a name", ["run.name=../x"], "run.name = '../x'"),
    ("no such device", ["train.device=tpu"], "tpu"),
    ("no such model to start from", ["train.init_from={tmp}/none"], "none"),
    ("read-only run folder", ["run.dir=/proc"], "/proc"),
    ("run folder under a file", ["run.dir={tmp}/tiny.txt"], "tiny.txt"),
    ("damaged data", ["data.path={tmp}/damaged"], "damaged"),
]


@pytest.mark.parametrize(("case", "overrides", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(
    case: str,
    overrides: list[str],
    message: str,
    config_file: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.txt").write_text("three little words")
    (tmp_path / "dull.txt").write_text("all work and no play\n" * 1000)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (texts / "prepared").iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "train_00000.bin":
            data[100] ^= 4
        (damaged / file.name).write_bytes(data)
    if case == "missing config":
        args = overrides
    else:
        args = [str(config_file), f"run.dir={tmp_path}/runs"]
        args += [override.format(tmp=tmp_path) for override in overrides]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as caught:
        train.command()
    assert caught.value.code == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not any("error" in line or "Traceback" in line for line in notes), notes


def test_the_same_from_the_shell() -> None:
    process = spawn([str(ROOT / "configs" / "quickstart.toml"), "optim.lrr=1"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: command line: unknown key optim.lrr; the nearest is optim.lr\n"
    assert out == ""


def test_a_full_disk(config_file: Path, tmp_path: Path) -> None:
    """A file-size limit stands for the disk: the checkpoint does not fit, the error is one line,
    and the run folder holds no half of it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = subprocess.run(
        [sys.executable, str(TRAIN), str(config_file), f"run.dir={tmp_path}"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 2, process.stderr
    *_, error = process.stderr.splitlines()
    assert re.fullmatch(r"error: .*model.safetensors: (File too large|No space .*)", error), error
    assert "Traceback" not in process.stderr
    assert list((tmp_path / "tiny" / "checkpoints").iterdir()) == []


def test_help_teaches() -> None:
    process = spawn(["--help"])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [line.strip() for line in out.splitlines()]
    for line in (
        "[optim]",
        "lr = 0.0",
        'linear = "ternary"',
        "every = 10",
        "[data]",
        "[quant]",
        "start = 0.0",
    ):
        assert line in lines
    assert "CONFIG.toml" in out
    assert "resumes" in out
