"""The command bitnet bench decode: files that are kept and resumed, and processes that never
outlive it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.bench import decode as bench_decode
from bitnet.bench import decode_table as tables
from bitnet.bench.decode import Race
from bitnet.bench.decode_table import Subject
from bitnet.bench.decode_worker import Case, Job
from bitnet.bench.worker import Worker
from bitnet.cli import bench_decode as cli_bench_decode
from bitnet.export.folder import save_model
from bitnet.linear import pack
from bitnet.model import Transformer, as_transformer
from tests.helpers.decode_bench import RUN, TINY, Bitnet, bench, read, tiny

__all__ = ["bench"]  # a fixture


def test_a_run_is_kept_and_goes_on(
    bench: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*RUN, "--batch", "1", "--batch", "3", "--rounds", "2")
    run, cases = Race.run, list[Case]()

    def interrupted(self: Race, case: Case, rounds: int) -> Any:
        cases.append(case)
        if len(cases) == 2:
            workers.extend(self._workers.values())
            raise KeyboardInterrupt
        return run(self, case, rounds)

    workers: list[Worker] = []
    monkeypatch.setattr(Race, "run", interrupted)
    monkeypatch.setattr(tables, "code_hash", lambda device: "of these sources")
    code, said, err = bench(*asked)
    assert code == 130, err
    path = tmp_path / "decode.csv"
    assert said.splitlines()[-1] == f"stopped; the same command goes on from {path}"
    assert [worker.process.returncode for worker in workers] == [-signal.SIGKILL]
    assert [row["batch"] for row in read(path)] == ["1"]

    code, said, err = bench(*asked)
    assert code == 0, err
    assert [case.batch for case in cases] == [1, 3, 3]  # the first was there already
    rows = read(path)
    assert [row["batch"] for row in rows] == ["1", "3"]
    for row in rows:
        assert tuple(row) == tables.COLUMNS
        assert (row["weights"], row["dtype"]) == ("random", "float32")
        assert (row["new"], row["rounds"], row["prompt"]) == ("5", "2", "9")
        assert 0 < float(row["tokens_s_p25"]) <= float(row["tokens_s"])
        assert float(row["first_ms"]) > 0
        assert row["peak_bytes"] == "" or int(row["peak_bytes"]) > 10e6
        assert row["over_baseline"] == row["over_transformers"] == row["joules_token"] == ""
        assert "bench decode" in row["command"]
        one_column = 2 * 2 * int(row["batch"]) * 12 * 4  # k and v, 2 layers, fp32 heads of 12
        columns, rest = divmod(int(row["cache_bytes"]), one_column)
        assert rest == 0
        assert columns >= 9 + 5

    stamp = path.stat().st_mtime_ns
    code, again, _ = bench(*asked)
    assert code == 0
    assert (path.stat().st_mtime_ns, len(cases)) == (stamp, 3)  # nothing left to do
    told, *lines = again.splitlines()
    assert told == "measured already by these sources; --out elsewhere repeats it:"
    assert [line.partition(" prompt")[0] for line in lines[:2]] == ["tiny batch 1", "tiny batch 3"]
    assert tables.table(rows) in said
    assert tables.table(rows) in again
    assert again.splitlines()[-1] == said.splitlines()[-1] == f"figures: {path}"


def test_a_model_of_a_folder_and_what_cannot_run(bench: Bitnet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_model(tmp_path / "model", as_transformer(pack(Transformer(tiny()))), None)
    asked = ("--model", folder, "--batch", "2", "--rounds", "1")
    code, said, err = bench(*asked, *RUN[2:], "--contender", "llama.cpp")
    assert code == 0, err
    assert "llama.cpp is left out: " in said
    found = [(row["contender"], row["weights"]) for row in read(tmp_path / "decode.csv")]
    assert found == [("ours-auto", "trained")]
    code, _, err = bench("--size", "tiny", "--contender", "llama.cpp")
    assert code == 2
    assert "--contender: none of llama.cpp can run here" in err
    code, _, err = bench(*asked, "--prompt", "30", "--new", "3")
    assert code == 2
    assert "33 tokens in all exceed the context" in err
    save_model(tmp_path / "fp", Transformer(tiny(linear="fp")), None)
    code, _, err = bench("--model", tmp_path / "fp")
    assert code == 2
    assert "is not ternary" in err


def test_sigterm_leaves_no_process_behind(bench: Bitnet, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[Worker] = []

    def terminated(self: Race, case: Case, rounds: int) -> Any:
        workers.extend(self._workers.values())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Race, "run", terminated)
    assert bench(*RUN)[0] == 143
    assert [worker.process.returncode for worker in workers] == [-signal.SIGKILL]


def test_a_quick_run_writes_nothing_unless_told_where(
    bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench_decode.SIZES, "tiny", TINY)
    asked = ("bench", "decode", "--device", "cpu", "--quick", *RUN)
    code, said, err = bitnet(*asked)
    assert code == 0, err
    assert "| tiny | 1 | 9 | ours-auto |" in said
    assert said.splitlines()[-1] == "nothing is written; --out FILE keeps the figures"
    assert not list(results.iterdir())

    def interrupted(self: Race, case: Case, rounds: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Race, "run", interrupted)
    for options in (asked, (*asked, "--out", "x.csv")):
        code, said, _ = bitnet(*options)
        assert (code, said.splitlines()[-1]) == (130, "stopped; nothing is written")


def test_quick_leaves_transformers_out_unless_it_is_named(
    bench: Bitnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[tuple[list[str], int, list[Case]]] = []

    def race(self: Any, subject: Subject, jobs: list[Job]) -> None:
        raced.append((self.names, self.rounds, self.cases))

    monkeypatch.setattr(cli_bench_decode._Run, "race", race)
    code, said, _ = bench("--quick")
    assert code == 0
    assert "--quick leaves transformers out; --contender transformers-fp32 times it\n" in said
    code, said, _ = bench("--quick", "--contender", "baseline-bf16", "--rounds", "3")
    assert code == 0
    assert "--quick" not in said
    assert raced == [
        (["ours-auto", "baseline-fp32"], 2, [Case(1, 32, 8)]),
        (["baseline-bf16"], 3, [Case(1, 32, 8)]),
    ]


def test_a_dead_worker_is_named_with_its_last_words(
    bench: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Worker.ask

    def killed(self: Worker, method: str, *values: float) -> Any:
        os.kill(self.process.pid, signal.SIGKILL)
        return ask(self, method, *values)

    monkeypatch.setattr(Worker, "ask", killed)
    code, _, err = bench(*RUN, "--batch", "1")
    assert code == 1
    assert "error: ours-auto: its process ended (signal 9)" in err
    assert "out of memory?" in err
    assert not (tmp_path / "decode.csv").exists()


MISTAKES = [
    (
        ["--size", "110"],
        "--size: '110' is none of 60m, 110m, 350m, 700m, 2b, 8b, 110m-silu, 730m-silu, tiny; did "
        "you mean 110m?",
    ),
    (["--size", "100m"], "did you mean 110m?"),
    (["--size", "7b"], "did you mean 8b?"),
    (["--contender", "our-auto"], "did you mean ours-auto?"),
    (["--contender", "ours"], "did you mean ours-auto?"),
    (["--contender", "baseline-fp16"], "did you mean baseline-bf16?"),
    (["--contender", "transformers-fp"], "did you mean transformers-fp32?"),
    (["--contender", "llama.cpp"], "none of llama.cpp can run here: "),
    (["--quick", "--size", "10"], "did you mean 60m?"),
    (["--new", "1"], "the nearest is 2"),
    (["--model", "runs/x", "--size", "60m"], "--model and --size exclude each other"),
    (["--all", "--quick"], "exclude each other"),
    (["--all", "--peers"], "exclude each other"),
    (["--model", "runs/x", "--peers"], "--peers and --model exclude each other"),
    (["--profile", "--threads", "1", "--threads", "2"], "--profile: one --threads"),
    (["--profile", "--batch", "1", "--batch", "8"], "--profile: one --contender"),
    (["--batch", "65"], "--batch"),
    (["--device", "tpu"], "expected cpu, cuda"),
]


@pytest.mark.parametrize(("asked", "said"), MISTAKES, ids=lambda value: " ".join(value)[:30])
def test_mistakes_end_in_one_line(bench: Bitnet, asked: list[str], said: str) -> None:
    code, out, err = bench(*asked)
    assert (code, out) == (2, "")  # mistakes come before everything else
    *usage, line = err.splitlines()
    assert said in line
    assert not usage or usage[0].startswith("Usage: ")


def test_a_file_of_something_else_is_not_overwritten(
    bench: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench_decode, "measure", pytest.fail)
    path = tmp_path / "decode.csv"
    path.write_text("a,b\n1,2\n")
    for options in (RUN, (*RUN[:4], "--profile")):
        code, said, err = bench(*options)
        assert (code, said) == (2, "")
        assert "has other columns" in err
    assert path.read_text() == "a,b\n1,2\n"
