"""The first minutes on a GPU: order, time, failures and summary, with a clock and
parts that are not real."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bitnet.bench import gpu
from bitnet.bench.exact import COLUMNS
from bitnet.bench.gpu import Ending, Part, Report, Result
from bitnet_kernels.bench.rows import COLUMNS as KERNEL_COLUMNS

ROOT = Path(__file__).parents[2]


class Play:
    """A clock, and parts that take a given time."""

    def __init__(self, **takes: float | Ending) -> None:
        self.time, self.takes = 100.0, takes
        self.ran: list[tuple[str, float | None]] = []
        self.words: dict[str, list[str]] = {}
        self.results: dict[str, Result] = {}

    def run(self, part: Part, words: Sequence[str], limit: float | None) -> Ending:
        self.ran.append((part.name, limit))
        self.words[part.name] = list(words)
        takes = self.takes.get(part.name, 1.0)
        if isinstance(takes, Ending):
            return takes
        self.time += takes if limit is None else min(takes, limit)
        return Ending(0 if limit is None or takes <= limit else None, "")

    def go(
        self,
        parts: Sequence[Part],
        seconds: float | None,
        absent: Sequence[str] = (),
        rows: Any = (),
    ) -> dict[str, str]:
        def each(result: Result) -> None:
            self.results[result.name] = result

        gpu.carry_out(parts, seconds, self.run, absent, lambda: list(rows), each, lambda: self.time)
        return {name: result.state for name, result in self.results.items()}


def test_the_most_telling_comes_first() -> None:
    """Operators, the three matrices, decoding at 2b, a step at 350m, then the rest."""
    parts = gpu.parts(Path("/results"), "gpu")
    names = [part.name for part in parts]
    shapes = ["2560x6912", "4096x14336", "8192x28672"]
    first = ["exact", *(f"kernels {shape}" for shape in shapes), "decode 2b", "train 350m"]
    assert names[: len(first)] == first
    for part, shape in zip(parts[1:4], shapes, strict=True):
        words = " ".join(part.words)
        assert f"--shape {shape} --m 1 --m 16 --m 64 --m 4096 " in words
        assert "/results/kernels_gpu.csv" in words
    telling = [part for part in parts if part.share < 1]
    assert [part.name for part in telling] == names[: len(telling)]
    assert sum(part.share for part in telling) <= 1  # all get their turn, whatever the others do
    assert sum(part.least for part in telling) <= 12 * 60 - gpu.RESERVE
    assert "report" not in names  # it is drawn from docs/results
    assert gpu.parts(gpu.RESULTS, "gpu")[-1].name == "report"


def test_every_command_is_one_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, and not run."""
    from bitnet.cli.bench import bench_group as group

    for part in [*gpu.parts(Path("/results"), "gpu"), *gpu.rehearsal(Path("/results"), "cpu")]:
        if part.words[:2] == ("-m", "pytest"):
            assert all(Path(word).is_file() for word in part.words if word.endswith(".py"))
            continue
        assert part.words[:3] == ("-m", "bitnet", "bench")
        words = [one for word in part.words[3:] for one in gpu._expanded(word, list)]
        command = group.get_command(None, words[0])
        command.make_context(words[0], words[1:])  # raises where an option is unknown


def test_it_stops_in_time() -> None:
    """One that hangs has its share, and no more; one that does not fit is left, a shorter one
    behind it is run."""
    play = Play(a=1e9, b=1e9, c=30)
    parts = [Part("a", (), 0.25), Part("b", (), 0.25), Part("c", ()), Part("d", (), 1, 80)]
    states = play.go([*parts, Part("e", (), 1, 20), Part("f", ())], 120)
    assert play.ran == [("a", 30), ("b", 30), ("c", 60), ("e", 30), ("f", 29)]
    assert states == {
        **{"a": "stopped", "b": "stopped", "c": "done", "d": "left", "e": "done", "f": "done"}
    }
    assert play.results["d"].why == "needs 80 s, 30 s were left"
    play = Play(a=1e6)
    assert set(play.go(parts, None).values()) == {"done"}
    assert {limit for _, limit in play.ran} == {None}
    for minutes in (3, 6, 12, 15):
        play = Play(**{part.name: 1e9 for part in gpu.parts(ROOT, "gpu")})
        play.go(gpu.parts(ROOT, "gpu"), 60 * minutes - gpu.RESERVE)
        assert play.time - 100 <= 60 * minutes - gpu.RESERVE
        names = [name for name, _ in play.ran]
        assert names[:4] == ["exact", *(f"kernels {shape}" for shape in gpu.SHAPES)]


def test_a_failure_ends_no_other_part() -> None:
    play = Play(a=Ending(1, "error: no"), b=Ending(-signal.SIGSEGV, "at 0x0"), c=Ending(None, ""))
    parts = [Part(name, ()) for name in "abcd"]
    states = play.go([*parts, Part("tests", (), needs=("pytest",))], 100, absent=["pytest"])
    expected = {"a": "failed", "b": "failed", "c": "stopped", "d": "done", "tests": "left"}
    assert states == expected
    assert play.results["a"].why == "exit code 1: error: no"
    assert play.results["b"].why == "signal 11: at 0x0"
    assert play.results["tests"].why == "no pytest here"


def row_of(kernel: str, exact: str, **more: str) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "") | {"kernel": kernel, "exact": exact, "why": "w"}
    return row | more


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    """The others are, by name."""
    timed = Part("kernels", ("a", "KERNELS", "z"))
    rows = [row_of("sad", "yes"), row_of("gemm", "yes"), row_of("", "no")]
    play = Play()
    play.go([timed], None, rows=rows[:2])
    assert play.words["kernels"] == ["a", *gpu.option("--kernel", ["auto", "addsub", "dot"]), "z"]
    play.go([timed], None, rows=[*rows, row_of("sad", "no")])
    assert play.words["kernels"] == ["a", "--kernel", "gemm", "z"]
    assert play.go([timed], None, rows=[row_of("sad", "no")]) == {"kernels": "left"}


def said_by(tmp_path: Path, code: str, limit: float | None) -> tuple[Ending, list[str]]:
    said: list[str] = []
    processes = gpu.Processes(os.environ, tmp_path, said.append)
    return processes.run(Part("a part", ()), ["-S", "-c", code], limit), said


def test_a_part_is_a_process(tmp_path: Path) -> None:
    ending, said = said_by(tmp_path, "print('one'); import sys; sys.exit('two')", 30)
    assert ending == Ending(1, "two")
    assert said == ["== a part, 30 s at most", "   one", "   two"]
    assert (tmp_path / "log_a_part.txt").read_text() == "one\ntwo\n"
    ending, _ = said_by(tmp_path, "import os; os.kill(os.getpid(), 11)", None)
    assert ending.code == -signal.SIGSEGV
    ending, _ = said_by(tmp_path, "import time; time.sleep(60)", 0.1)
    assert ending.code is None


HANGS = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(99)"],
    start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(f"a row\\n{child.pid}")
time.sleep(99)
"""


def test_rows_stay_and_no_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that does not listen, with a worker in a separate session."""
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    path = tmp_path / "rows.csv"

    def is_written(*_: Any) -> None:
        while not path.exists() or not path.read_text().count("\n"):
            time.sleep(0.01)

    monkeypatch.setattr(gpu.Processes, "_wait", is_written)
    processes = gpu.Processes(os.environ, tmp_path, lambda line: None)
    ending = processes.run(Part("hangs", ()), ["-S", "-c", HANGS, str(path)], 1.0)
    assert ending.code is None
    row, pid = path.read_text().split("\n")
    assert row == "a row"
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the worker is alive")


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def kernel_row(family: str, m: int, ratio: str, shape: str = "2560x6912") -> dict[str, str]:
    n, k = shape.split("x")
    like = {"what": "linear", "contender": "bitnet", "dtype": "bf16", "cache": "cold"}
    return {**like, "family": family, "m": str(m), "n": n, "k": k, "ratio_to_16bit": ratio}


def test_the_summary_is_one_screen(tmp_path: Path) -> None:
    """What ran, what is exact, ratios to cuBLAS, what was left and why. Rows of an earlier run,
    and those of other settings, are not this run's."""
    path = tmp_path / "kernels_gpu.csv"
    old = kernel_row("addsub", 1, "9.99")
    write_rows(path, KERNEL_COLUMNS, [old])
    (tmp_path / "exact_gpu.csv").write_text("of an earlier run")
    report = Report(tmp_path, "gpu", "A GPU; torch")
    assert report.rows("exact") == []
    assert not report.is_exact  # nothing was checked
    new = [
        kernel_row("addsub", 1, "2.50"),
        kernel_row("addsub", 1, "3.50"),
        kernel_row("dot", 1, "4.25"),
        kernel_row("dot", 4096, "1.125"),
        kernel_row("dot", 1, "8.88") | {"cache": "hot"},
        kernel_row("other", 1, "7.77") | {"contender": "gemlite"},
    ]
    write_rows(path, KERNEL_COLUMNS, [old, *new])
    rows = [row_of("sad", "yes"), row_of("", "rel 1e-6"), row_of("auto", "")]
    write_rows(tmp_path / "exact_gpu.csv", COLUMNS, rows)
    decode = {"model": "2b", "batch": "1", "contender": "ours-auto", "tokens_s": "301.5"}
    fields = [*decode, "over_baseline"]
    write_rows(tmp_path / "decode_gpu.csv", fields, [decode | {"over_baseline": "2.5"}])
    train = {"model": "350m", "base": "fp", "variant": "ours", "step_ms": "812.5"}
    write_rows(tmp_path / "train_gpu.csv", [*train, "speedup"], [train | {"speedup": "1.02"}])
    report.results = [
        Result("exact", "done", "", 61.2),
        Result("kernels 2560x6912", "stopped", "after 72 s", 72.0),
        Result("tests", "left", "needs 90 s, 12 s were left", 0.0),
    ]
    text = report.text("11.5 of 12 minutes")
    assert report.is_exact
    for line in (
        "A GPU; torch",
        "11.5 of 12 minutes",
        "exact:   2 of 3 cases checked; 1 are not for this device",
        "decode:  2b, batch 1, ours-auto: 301.5 tokens/s, 2.50 times its baseline",
        "train:   350m, ours: 812.5 ms per step, 1.02 times as fast as fp",
        "done:    exact (61 s)",
        "stopped: kernels 2560x6912: after 72 s",
        "left:    tests: needs 90 s, 12 s were left",
    ):
        assert line in text.splitlines(), line
    assert re.search(r"2560x6912 +3\.50 / 4\.25 / - +- / 1\.12 / -$", text, re.M)
    assert not re.search(r"9\.99|8\.88|7\.77", text)
    rows += [row_of("gemm", "no", why=f"gemm is off {i} {'x' * 200}") for i in range(9)]
    write_rows(tmp_path / "exact_gpu.csv", COLUMNS, rows)
    names = [part.name for part in gpu.parts(gpu.RESULTS, "gpu")]
    report.results += [Result(name, "failed", "exit code 1: " + "y" * 300, 9.0) for name in names]
    lines = report.text("11.5 of 12 minutes").splitlines()
    assert "         wrong, so not timed: gemm" in lines
    assert any(line.startswith("  wrong: gemm is off 0") for line in lines)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert not report.is_exact


def test_what_ends_it_decides_the_exit_code(tmp_path: Path) -> None:
    report = Report(tmp_path, "gpu", "")
    write_rows(tmp_path / "exact_gpu.csv", COLUMNS, [row_of("sad", "yes")])
    for states, is_exact in (
        ((("exact", "done"), ("tests", "left"), ("decode", "stopped")), True),
        ((("exact", "stopped"),), False),
        ((("exact", "failed"),), False),
        ((("exact", "done"), ("tests", "failed")), False),
    ):
        report.results = [Result(name, state, "", 1.0) for name, state in states]
        assert report.is_exact == is_exact, states


COMMAND = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import gpu
gpu.prepare = lambda wheels, site: []
gpu._probe = lambda variables, rehearse: ("gpu", "A GPU")
fast = [gpu.Part("first", ("-S", "-c", "print(1)"))]
slow = gpu.Part("second", ("-S", "-c", f"import os, time; os.kill({os.getpid()}, "
    + sys.argv[2] + "); time.sleep(60)"))
gpu.parts = lambda out, slug: [*fast, slow, gpu.Part("third", ())]
sys.exit(gpu.main(["--out", sys.argv[3], "--minutes", "1"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_in_the_summary(tmp_path: Path, number: signal.Signals) -> None:
    """In a separate process, without torch: this file imports only the standard library, and
    nothing of the site at all."""
    folder = str(ROOT / "bitnet" / "bench")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", COMMAND, folder, str(int(number)), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - begun < 30
    text = (tmp_path / "summary_gpu.txt").read_text()
    assert text in done.stdout
    assert "stopped by a signal" in text
    assert "done:    first" in text
    assert "left:    third: stopped by a signal" in text


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pyproject.toml asks for but torch, Triton and wandb; found by name and version."""
    wanted = gpu.requirements()
    assert {"pydantic", "typer", "sentencepiece", "pytest", "pytest-xdist"} <= set(wanted)
    assert not set(wanted) & {"torch", "triton", "wandb", "gguf", "transformers"}
    assert re.fullmatch(r"pydantic>=[\d.]+", wanted["pydantic"])
    for name, version in (("pydantic", "2.9.9"), ("typer", "99.0"), ("pytest", "99.1rc1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    absent = gpu.missing(wanted, [str(tmp_path)])
    assert absent == [name for name in wanted if name not in ("typer", "pytest")]

    asked: list[list[str]] = []

    def install(names: Sequence[str], wheels: Path, site: Path) -> str:
        asked.append(list(names))
        return "no matching wheel"

    monkeypatch.setattr(gpu, "install", install)
    monkeypatch.setattr(gpu, "missing", lambda group, path: [n for n in group if n == "pydantic"])
    with pytest.raises(SystemExit) as caught:
        gpu.prepare(tmp_path, tmp_path)
    assert (caught.value.code, asked) == (2, [[wanted["pydantic"]]])
    monkeypatch.setattr(gpu, "missing", lambda group, path: [n for n in group if n == "pytest"])
    assert gpu.prepare(None, tmp_path) == ["pytest"]  # the tests alone are left


def test_wheels_are_installed_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run(words: list[str], **options: Any) -> Any:
        seen.append(words)
        return subprocess.CompletedProcess(words, 1, "a\nERROR: no wheel\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.install(["a", "b"], tmp_path / "w", tmp_path / "s") == "ERROR: no wheel"
    assert {"--no-index", str(tmp_path / "w"), str(tmp_path / "s"), "a", "b"} <= set(seen[0])
    variables = gpu.environment(tmp_path, rehearse=False)
    assert (variables["HF_HUB_OFFLINE"], variables["WANDB_MODE"]) == ("1", "offline")
    path = variables["PYTHONPATH"].split(os.pathsep)
    assert path[:3] == [str(ROOT), str(ROOT / "kernels"), str(tmp_path)]


FAKE = """#!/bin/sh
case "$2" in
*cuda*) exit {cuda} ;;
"import torch") exit {torch} ;;
esac
echo "{name}: $*"
"""


@pytest.mark.parametrize(
    ("venv", "system", "chosen"),
    [((0, 0), (0, 0), "venv"), ((1, 0), (0, 0), "system"), ((1, 0), (1, 0), "venv")],
)
def test_make_takes_the_python_whose_torch_finds_a_gpu(
    tmp_path: Path, venv: tuple[int, int], system: tuple[int, int], chosen: str
) -> None:
    """Nothing is installed; the words go to the script as they are. Exit codes of (a look for a
    GPU, a look for torch) in the .venv and in the system's Python."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for place, name, (cuda, its_torch) in (
        (tmp_path / ".venv" / "bin" / "python", "venv", venv),
        (tmp_path / "system", "system", system),
    ):
        place.write_text(FAKE.format(cuda=cuda, torch=its_torch, name=name))
        place.chmod(0o755)
    words = ["PYTHON=./system", "MINUTES=12", "OUT=a folder", "WHEELS=w"]
    done = subprocess.run(
        ["make", "-s", "-f", str(ROOT / "Makefile"), "gpu", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    want = "bitnet/bench/gpu.py --minutes 12 --out a folder --wheels w"
    assert (done.returncode, done.stdout) == (0, f"{chosen}: {want}\n"), done.stderr


@pytest.mark.parametrize("text", ["-1", "abc", "nan", "1e999", "", "12min"])
def test_minutes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--minutes", text])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"--minutes: {text!r}: expected a number of minutes, 0 for no limit")


@pytest.mark.slow
def test_the_whole_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """The whole, on a CPU and in the interpreter; minutes."""
    script = str(ROOT / "bitnet" / "bench" / "gpu.py")
    done = subprocess.run([sys.executable, script, "--rehearse", "--out", tmp_path], check=False)
    assert done.returncode == 0
    (summary,) = tmp_path.glob("summary_*.txt")
    assert "everything checked is exact" in summary.read_text()
