"""Check and measure a GPU within a given number of minutes, the most telling parts first.

    make gpu MINUTES=12        or: python bitnet/bench/gpu.py --minutes 12 --out results

It runs a list of parts (:func:`parts`). Each is one command in a separate process, so a part that
crashes, hangs or fails does not end the others. With a time limit, each of the first parts has a
share of the time, so that all of them get their turn. A part that no longer fits is left out. A
part that is stopped has already written every row it had.

This file is run by its path and imports only the standard library, so that it can name anything
that is missing. It needs no network: packages that this Python lacks are installed from a folder of
wheels, into a folder that is removed at the end (docs/gpu.md lists them).
"""

import argparse
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import Distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import IO, Any, NamedTuple, Never

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SHAPES = ("2560x6912", "4096x14336", "8192x28672")
TOKENS = ("1", "16", "64", "4096")
FAMILIES = ("addsub", "dot")
NOT_NEEDED = ("torch", "triton", "wandb")
"""Dependencies that are not installed: the machine has its own, or no part imports them."""
FOR_TESTS = ("pytest", "pytest-timeout", "pytest-xdist")
RESERVE = 10.0
"""Seconds kept for ending the last part and for the summary."""
GRACE = 5.0
"""Seconds between asking a process to end and killing it."""
HEARTBEAT = 20.0
"""Seconds between lines that say what is running."""
_KERNELS = "KERNELS"
"""In a command, stands for the kernels that may be timed."""

_PROBE = """
import json, sys, torch
from bitnet_kernels.bench.machine import describe, package_version
if not {cpu} and not torch.cuda.is_available():
    sys.exit(f"error: torch {{torch.__version__}} finds no GPU here. docs/gpu.md says what is "
             "needed; without a GPU: python3 bitnet/bench/gpu.py --rehearse --out rehearsal")
here = describe(torch.device("cpu" if {cpu} else "cuda"))
cc = "" if {cpu} else ", compute capability %d.%d" % torch.cuda.get_device_capability()
versions = f"torch {{torch.__version__}}, Triton {{package_version('triton') or 'missing'}}"
print(json.dumps([here.slug, f"{{here.name}}{{cc}}; {{versions}}"]))
"""

Rows = list[dict[str, str]]


class Part(NamedTuple):
    """A command and its time limits."""

    name: str
    words: tuple[str, ...]
    """Arguments of Python."""
    share: float = 1.0
    """Largest share of the whole time."""
    least: float = 1.0
    """Seconds that it needs: with less it is not started."""
    needs: tuple[str, ...] = ()
    """Packages that it needs: without them it is left out."""


class Ending(NamedTuple):
    """How a process ended: its exit code (negative: a signal), or None if it was stopped."""

    code: int | None
    last_line: str


class Result(NamedTuple):
    """The result of a part."""

    name: str
    state: str
    """"done", "stopped" (at its limit), "failed" or "left"."""
    why: str
    seconds: float


class Stopped(BaseException):
    """A signal asks this process to end; ``code`` is the matching exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


Run = Callable[[Part, Sequence[str], float | None], Ending]


def bench(*words: str) -> tuple[str, ...]:
    """``bitnet bench`` ... as arguments of Python, since there may be no ``bitnet`` command."""
    return ("-m", "bitnet", "bench", *words)


def option(name: str, values: Iterable[str]) -> list[str]:
    """An option, repeated for each value."""
    return [word for value in values for word in (name, value)]


def parts(out: Path, slug: str) -> list[Part]:
    """All parts, the most telling first; rows go to ``out``, in files named after the device."""
    exact, kernels, decode, train = (
        ("--out", str(out / f"{kind}_{slug}.csv"))
        for kind in ("exact", "kernels", "decode", "train")
    )
    tokens = option("--m", TOKENS)
    few = ("--dtype", "bf16", "--cache", "cold", "--no-energy", "--no-estimate")
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_on_device_*.py"))
    workers = str(min(os.cpu_count() or 1, 16))
    pairs = ("--contender", "ours-auto", "--contender", "baseline-bf16")
    eager = option("--variant", ("fp", "ours"))
    compiled = option("--variant", ("fp-compiled", "ours-compiled"))
    short = ("--steps", "5", "--warmup", "2")
    return [
        Part(
            "exact",
            bench("exact", *option("--shape", SHAPES), *tokens, "--limit", "60", *exact),
            0.25,
            45,
        ),
        *(
            Part(
                f"kernels {shape}",
                bench("kernels", "--shape", shape, *tokens, _KERNELS, *few, *kernels),
                0.1,
                25,
            )
            for shape in SHAPES
        ),
        Part(
            "decode 2b",
            bench("decode", "--size", "2b", *pairs, "--batch", "1", "--rounds", "3", *decode),
            0.2,
            60,
        ),
        Part("train 350m", bench("train", "--size", "350m", *eager, *short, *train), 0.1, 45),
        Part(
            "train 350m compiled",
            bench("train", "--size", "350m", *compiled, *short, *train),
            0.15,
            90,
        ),
        Part(
            "tests",
            ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", workers, *tests),
            least=90,
            needs=FOR_TESTS,
        ),
        Part("decode 2b, all", bench("decode", "--size", "2b", *decode), least=90),
        Part("kernels, all M", bench("kernels", *kernels), least=60),
        Part("train, all", bench("train", *option("--size", ("350m", "1b")), *train), least=180),
        Part(
            "decode, all",
            bench(
                "decode",
                *option("--size", ("700m", "2b", "8b")),
                *option("--prompt", ("128", "2048")),
                *decode,
            ),
            least=180,
        ),
        Part("kernels, all", bench("kernels", "--all", *kernels), least=60),
        *([Part("report", bench("report"), least=30)] if out == RESULTS else []),
    ]


def rehearsal(out: Path, slug: str) -> list[Part]:
    """Small stand-ins for the parts, on a CPU and in Triton's interpreter."""
    exact, kernels, decode, train = (
        ("--device", "cpu", "--out", str(out / f"{kind}_{slug}.csv"))
        for kind in ("exact", "kernels", "decode", "train")
    )
    tests = str(ROOT / "tests" / "test_on_device_launches.py")
    small = ("--shape", "64x256", "--m", "1", "--kernel", "auto", "--dtype", "bf16")
    return [
        Part("exact", bench("exact", "--quick", *exact), 0.5),
        Part("kernels 64x256", bench("kernels", *small, "--no-estimate", *kernels), 0.5),
        Part("decode 60m", bench("decode", "--quick", *decode), 0.5),
        Part("train 15m", bench("train", "--quick", *train), 0.5),
        Part("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", tests), needs=FOR_TESTS),
    ]


def carry_out(
    todo: Sequence[Part],
    seconds: float | None,
    run: Run,
    absent: Iterable[str],
    exact: Callable[[], Rows],
    each: Callable[[Result], None],
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Run the parts in order, as the time allows.

    Arguments:
        seconds: for all of them; None for no limit.
        run: runs a part's command for so many seconds at most.
        absent: packages that are missing.
        exact: returns the rows of the check of operators so far.
        each: called with the result of each part.
    """
    begun, missing = now(), set(absent)
    for part in todo:
        started = now()
        left = None if seconds is None else seconds - (started - begun)
        if lacking := [name for name in part.needs if name in missing]:
            each(Result(part.name, "left", f"no {', '.join(lacking)} here", 0.0))
            continue
        if left is not None and left < part.least:
            why = f"needs {part.least:.0f} s, {max(left, 0.0):.0f} s were left"
            each(Result(part.name, "left", why, 0.0))
            continue
        limit = None
        if left is not None and seconds is not None:
            limit = min(left, max(part.share * seconds, part.least))
        words = [one for word in part.words for one in _expanded(word, exact)]
        if _KERNELS in part.words and "--kernel" not in words:
            each(Result(part.name, "left", "no kernel is exact", 0.0))
            continue
        code, last_line = run(part, words, limit)
        took = now() - started
        if code is None:
            each(Result(part.name, "stopped", f"after {took:.0f} s", took))
        elif code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            each(Result(part.name, "failed", f"{how}: {last_line}", took))
        else:
            each(Result(part.name, "done", "", took))


def _expanded(word: str, exact: Callable[[], Rows]) -> list[str]:
    """A word of a command, or the words that it stands for. A kernel that is wrong in any case is
    not timed, because it could end the process that times the others."""
    if word != _KERNELS:
        return [word]
    rows = exact()
    if not any(row["exact"] == "no" for row in rows):
        return option("--kernel", ("auto", *FAMILIES))
    tried = dict.fromkeys(row["kernel"] for row in rows if row["kernel"])
    return option("--kernel", (name for name in tried if name not in wrong_kernels(rows)))


def wrong_kernels(rows: Rows) -> list[str]:
    """The kernels that are wrong in a case of the check of operators."""
    return list(dict.fromkeys(r["kernel"] for r in rows if r["exact"] == "no" and r["kernel"]))


class Processes:
    """Runs parts, and writes their output to logs and to the terminal."""

    def __init__(
        self, environment: Mapping[str, str], folder: Path, say: Callable[[str], None]
    ) -> None:
        self._environment, self._folder, self._say = environment, folder, say

    def run(self, part: Part, words: Sequence[str], limit: float | None) -> Ending:
        """Run one part until it ends, reaches its limit in seconds, or this process gets a
        signal."""
        asked = "" if limit is None else f", {limit:.0f} s at most"
        self._say(f"== {part.name}{asked}")
        begun = time.monotonic()
        path = self._folder / f"log_{re.sub('[^a-z0-9]+', '_', part.name)}.txt"
        with path.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is for this process, which ends the part
            )
            last, reader = [""], threading.Thread(target=lambda: None)
            try:
                assert process.stdout is not None
                reader = threading.Thread(
                    target=self._tell, args=(process.stdout, log, last), daemon=True
                )
                reader.start()
                code = self._wait(process, part, begun, limit)
            finally:
                end(process)
                reader.join(GRACE)
                if process.stdout is not None and not reader.is_alive():
                    process.stdout.close()
        return Ending(code, last[0])

    def _wait(
        self, process: "subprocess.Popen[str]", part: Part, begun: float, limit: float | None
    ) -> int | None:
        while True:
            spent = time.monotonic() - begun
            if limit is not None and spent >= limit:
                return None
            rest = HEARTBEAT if limit is None else min(HEARTBEAT, limit - spent)
            with suppress(subprocess.TimeoutExpired):
                return process.wait(rest)
            self._say(f"   {part.name}: {time.monotonic() - begun:.0f} s")

    def _tell(self, pipe: IO[str], log: IO[str], last: list[str]) -> None:
        with suppress(ValueError):  # the log was closed: a process still alive has its pipe
            for line in pipe:
                log.write(line)
                log.flush()
                if line.strip():
                    last[0] = " ".join(line.split())[:200]
                    self._say(f"   {line.rstrip()}")


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started: first by SIGTERM, so that it can clean up, then by
    SIGKILL."""
    family = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    for pid in {*family, *descendants(process.pid)}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
        process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process started, directly or not, since workers lead their own groups.
    Empty if the system does not tell."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it has ended
            parent = int(
                path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            )
            children.setdefault(parent, []).append(int(path.parent.name))
    found = children.get(pid, [])
    for child in found:  # grows during the loop
        found += children.get(child, [])
    return found


def read(path: Path) -> Rows:
    """The rows of a CSV file; none if it is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


class Report:
    """Summary of the run from the files' new rows: what is exact, how fast, what was left out."""

    def __init__(self, out: Path, slug: str, machine: str) -> None:
        self.machine, self.out = machine, out
        self.results: list[Result] = []
        kinds = ("exact", "kernels", "decode", "train")
        self._paths = {kind: out / f"{kind}_{slug}.csv" for kind in kinds}
        self._paths["exact"].unlink(missing_ok=True)  # it is written anew
        self._before = {kind: read(path) for kind, path in self._paths.items()}

    def rows(self, kind: str) -> Rows:
        """The rows that were not in the file before."""
        return [row for row in read(self._paths[kind]) if row not in self._before[kind]]

    @property
    def is_exact(self) -> bool:
        """Whether every operator was checked and is right, and no part failed."""
        checked = any(one.name == "exact" and one.state == "done" for one in self.results)
        failed = any(one.state == "failed" for one in self.results)
        wrong = any(row["exact"] == "no" for row in self.rows("exact"))
        return checked and not failed and not wrong

    def text(self, end: str) -> str:
        """One screen of text; ``end``: how the run ended."""
        lines = [self.machine, end, *self._exact(), *self._kernels()]
        ours = [row for row in self.rows("decode") if row["contender"].startswith("ours")]
        lines += [_of("decode", row) for row in ours if row["over_baseline"]][:4]
        others = [row for row in self.rows("train") if row["variant"] != row["base"]]
        lines += [_of("train", row) for row in others][:4]
        done = [f"{one.name} ({one.seconds:.0f} s)" for one in self.results if one.state == "done"]
        lines.append(f"done:    {', '.join(done) or 'nothing'}")
        rest = [one for one in self.results if one.state != "done"]
        lines += [f"{one.state + ':':8} {one.name}: {one.why}" for one in rest]
        lines.append(f"files:   {self.out}")
        return "\n".join(line if len(line) <= 100 else f"{line[:97]}..." for line in lines)

    def _exact(self) -> list[str]:
        rows = self.rows("exact")
        wrong = [row for row in rows if row["exact"] == "no"]
        absent = sum(row["exact"] == "" for row in rows)
        lines = [f"exact:   {len(rows) - len(wrong) - absent} of {len(rows)} cases checked"]
        if absent:
            lines[0] += f"; {absent} are not for this device"
        if names := wrong_kernels(rows):
            lines.append(f"         wrong, so not timed: {', '.join(names)}")
        lines += [f"  wrong: {row['why']}" for row in wrong[:3]]
        return lines

    def _kernels(self) -> list[str]:
        """The best of each family, by shape and M."""
        best: dict[tuple[str, str, str], float] = {}
        for row in self.rows("kernels"):
            cell = (f"{row['n']}x{row['k']}", row["m"], row["family"])
            like = (row["what"], row["dtype"], row["cache"]) == ("linear", "bf16", "cold")
            if like and row["contender"] == "bitnet" and row["ratio_to_16bit"]:
                best[cell] = max(best.get(cell, 0.0), float(row["ratio_to_16bit"]))
        shapes = dict.fromkeys(shape for shape, _, _ in best)
        tokens = sorted({m for _, m, _ in best}, key=int)
        if not best:
            return ["kernels: nothing was timed anew"]
        if len(tokens) > len(TOKENS) or len(shapes) > len(SHAPES):
            tokens = [m for m in tokens if m in TOKENS]
            shapes = {shape: None for shape in shapes if shape in SHAPES}
        lines = ["kernels: times as fast as 16-bit cuBLAS, cold cache: addsub / dot / auto"]
        lines.append(f"  {'N x K':12}" + "".join(f"{'M = ' + m:>19}" for m in tokens))
        for shape in shapes:
            cells = (
                " / ".join(
                    f"{best[shape, m, name]:.2f}" if (shape, m, name) in best else "-"
                    for name in (*FAMILIES, "auto")
                )
                for m in tokens
            )
            lines.append(f"  {shape:12}" + "".join(f"{cell:>19}" for cell in cells))
        return lines


def _of(kind: str, row: dict[str, str]) -> str:
    if kind == "decode":
        what = f"{row['model']}, batch {row['batch']}, {row['contender']}"
        return (
            f"decode:  {what}: {float(row['tokens_s']):,.1f} tokens/s, "
            f"{float(row['over_baseline']):.2f} times its baseline"
        )
    return (
        f"train:   {row['model']}, {row['variant']}: {float(row['step_ms']):,.1f} ms per step, "
        f"{float(row['speedup']):.2f} times as fast as {row['base']}"
    )


def requirements() -> dict[str, str]:
    """Package -> its requirement in pyproject.toml, such as ``"pydantic>=2.10"``, for the packages
    that the parts or the tests import."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name, wanted = re.split(r"(?=[<>=!~ ;])", text, maxsplit=1)
        found[name] = name + wanted.partition(";")[0].strip()
    needed = [re.split("[<>= ;]", text)[0] for text in project["dependencies"]]
    return {name: found[name] for name in (*needed, *FOR_TESTS) if name not in NOT_NEEDED}


def missing(wanted: Mapping[str, str], path: Sequence[str]) -> list[str]:
    """The packages that are missing from ``path`` or too old."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)[:3]]

    found = []
    for name, text in wanted.items():
        here = next(iter(Distribution.discover(name=name, path=list(path))), None)
        floor = text.partition(">=")[2].partition(",")[0]
        if here is None or numbers(here.version) < numbers(floor):
            found.append(name)
    return found


def install(names: Sequence[str], wheels: Path, site: Path) -> str:
    """Install packages and their dependencies from a folder of wheels into the folder ``site``.
    Returns the reason if that fails, else ""."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-index", "--find-links", str(wheels), "--only-binary", ":all:"),
            *("--target", str(site), "--upgrade", *names),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1]


def environment(site: Path, rehearse: bool) -> dict[str, str]:
    """Environment of the parts: this checkout comes before installed packages; no network."""
    path = [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    return {**os.environ, **own, **({"TRITON_INTERPRET": "1"} if rehearse else {})}


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of minutes, 0 for no limit")


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py",
        description="Check everything on a GPU, then measure, the most telling first.",
    )
    minutes = "for everything; 0: no limit (default)"
    parser.add_argument("--minutes", type=_minutes, default=0.0, help=minutes)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for rows and logs")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this Python lacks")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, small, in Triton's interpreter"
    )
    return parser.parse_args(words)


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal is gone
        print(line, flush=True)


def _fail(message: str) -> Never:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(wheels: Path | None, site: Path) -> list[str]:
    """Install missing packages. Returns those that are still missing, which only the tests need."""
    wanted = requirements()
    core = {name: text for name, text in wanted.items() if name not in FOR_TESTS}
    path, why = [str(site), *sys.path], ""
    for group in (core, {name: wanted[name] for name in FOR_TESTS}):
        lacking = missing(group, path)
        if lacking and wheels is not None:
            why = install([wanted[name] for name in lacking], wheels, site)
            lacking = missing(group, path)
        if lacking and group is core:
            hint = why or "bring them as wheels, --wheels FOLDER (docs/gpu.md lists them)"
            _fail(f"{sys.executable} lacks {', '.join(lacking)}: {hint}")
    return lacking


def _probe(variables: Mapping[str, str], rehearse: bool) -> tuple[str, str]:
    """The device's name for file names, and a line about it."""
    code = _PROBE.format(cpu=rehearse)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=180,
            check=False,
        )
    except subprocess.TimeoutExpired:
        _fail("torch does not start within three minutes")
    try:
        slug, line = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        _fail(
            (said or [f"torch ends with exit code {done.returncode}"])[-1].removeprefix("error: ")
        )
    return slug, line


def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 if everything was checked and is exact and no part
    failed; 2 if it cannot begin; else 1."""
    begun = time.monotonic()
    asked = _arguments(words)
    out = asked.out.resolve()

    def stop(number: int, frame: FrameType | None) -> Never:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)  # a second signal would interrupt the ending
        raise Stopped(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="gpu-packages-") as name:
            return _measure(asked, begun, out, Path(name))
    except OSError as error:
        _fail(f"{error.filename or out}: {error.strerror or error}")
    except Stopped as signalled:
        return signalled.code


def _measure(asked: Any, begun: float, out: Path, site: Path) -> int:
    absent = prepare(asked.wheels, site)
    variables = environment(site, asked.rehearse)
    slug, machine = _probe(variables, asked.rehearse)
    _say(machine)
    report = Report(out, slug, machine)

    def write(state: str) -> str:
        spent = (time.monotonic() - begun) / 60
        of = f" of {asked.minutes:g}" if asked.minutes else ""
        text = report.text(f"{spent:.1f}{of} minutes; {state}")
        (out / f"summary_{slug}.txt").write_text(f"{text}\n", encoding="utf-8")
        return text

    def each(result: Result) -> None:
        report.results.append(result)
        _say(f"   {result.name}: {' '.join(filter(None, [result.state, result.why]))}")
        write("not at its end yet")

    todo = (rehearsal if asked.rehearse else parts)(out, slug)
    seconds = 60 * asked.minutes - RESERVE - (time.monotonic() - begun) if asked.minutes else None
    run = Processes(variables, out, _say).run
    try:
        carry_out(todo, seconds, run, absent, lambda: report.rows("exact"), each)
    except Stopped as signalled:
        seen = {result.name for result in report.results}
        unseen = [part.name for part in todo if part.name not in seen]
        report.results += [Result(name, "left", "stopped by a signal", 0.0) for name in unseen]
        _say(f"\n{write('stopped by a signal')}")
        return signalled.code
    ended = "everything checked is exact" if report.is_exact else "NOT everything is shown exact"
    _say(f"\n{write(ended)}")
    return 0 if report.is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
