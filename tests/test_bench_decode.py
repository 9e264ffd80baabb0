"""bitnet bench decode: contenders with the weights they claim, figures worked out by hand, and
processes that never outlive the command."""

import csv
import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet import cli_bench_decode
from bitnet.bench import decode as bench_decode
from bitnet.bench import decode_profile as profiling
from bitnet.bench import decode_table as tables
from bitnet.bench.decode import Inexact, Race, fitting, held_bytes, refusals
from bitnet.bench.decode_table import Outcome, Subject
from bitnet.bench.decode_worker import Case, Job, Turn, as_transformers, prompts_of, random_model
from bitnet.bench.rows import Figures, merge
from bitnet.bench.worker import Worker
from bitnet.export.folder import save_model
from bitnet.linear import TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer

Bitnet = Callable[..., tuple[int, str, str]]
DOCS = Path(__file__).parent.parent / "docs"
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 37,
    "vocab_size": 61,
}


def tiny(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, "max_seq_len": 32, **fields}).resolve()


def job(contender: str, config: ModelConfig | None = None, **fields: Any) -> Job:
    shape = dataclasses.asdict(config or tiny())
    return Job(
        contender, shape, **{"folder": "", "seed": 0, "device": "cpu", "threads": 1, **fields}
    )


@pytest.fixture
def bench(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bitnet:
    """Runs ``bitnet bench decode --out tmp_path/decode.csv ...`` on a model of 24 columns."""
    monkeypatch.setitem(bench_decode.SIZES, "tiny", TINY)
    out = tmp_path / "decode.csv"
    return partial(bitnet, "bench", "decode", "--device", "cpu", "--out", out)


# the contenders


def test_ternary_contenders_have_the_same_weights_and_a_twin_its_own_dtype() -> None:
    models = {
        name: job(name).model(32) for name in ("ours-auto", "ours-addsub", "transformers-bf16")
    }
    first = models["ours-auto"]
    layers = [m for m in first.modules() if isinstance(m, TernaryLinear)]
    assert len(layers) == 2 * 7
    codes = torch.cat([layer.codes().flatten() for layer in layers])
    assert set(codes.tolist()) == {-1, 0, 1}
    for model in models.values():
        others = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        assert all(torch.equal(a.packed, b.packed) for a, b in zip(layers, others, strict=True))
    embedding = first.embed_tokens.weight
    assert torch.equal(
        models["transformers-bf16"].embed_tokens.weight, embedding.to(torch.bfloat16)
    )
    assert not torch.equal(job("ours-auto", seed=1).model(32).embed_tokens.weight, embedding)
    for name, dtype in (("twin-fp32", torch.float32), ("twin-bf16", torch.bfloat16)):
        twin = job(name).model(32)
        assert {p.dtype for p in twin.parameters()} == {dtype}
        assert not any(isinstance(m, TernaryLinear) for m in twin.modules())
        assert twin.lm_head.weight is twin.embed_tokens.weight


def test_ternary_matrices_are_never_made_in_floats() -> None:
    """Those of 8B parameters would not fit."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                made.append((result.dtype, result.numel()))
            return result

    with Watch():
        random_model(tiny(vocab_size=5), 0, CPU, torch.bfloat16, "auto")
    assert max(n for dtype, n in made if dtype == torch.int8) >= 37 * 24
    assert max(n for dtype, n in made if dtype.is_floating_point) == 5 * 24


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_transformers_gets_the_same_model(tied: bool) -> None:
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    config = tiny(
        d_model=96, n_heads=6, n_kv_heads=2, d_ff=160, tie_embeddings=tied, rope_theta=5e5
    )
    model = random_model(config, 3, CPU, torch.float32, "auto")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.randint(61, (2, 32))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        theirs = as_transformers(model, torch.float32)
        difference = (model(tokens) - theirs(tokens).logits).abs().amax(-1)
    # fp32 sums of 160 in another order, or, where x * (127 / max) and x / (max / 127) fall on
    # two sides of a half, another activation code: 1/127 of a value, in few tokens
    assert float((difference < 1e-5).float().mean()) > 0.8
    assert float(difference.max()) < 0.05 * float(model(tokens).std())
    assert theirs.generation_config.eos_token_id is None


def test_who_cannot_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    names = bench_decode.CONTENDERS
    no = refusals(names, CPU, tiny())
    assert set(no) == {"ours-dot", "ours-addsub"}
    assert "no such kernel" in no["ours-dot"]
    for field in ({"norm_placement": "pre_norm"}, {"qk_norm": True}, {"granularity": "row"}):
        no = refusals(names, CPU, tiny(**field))
        assert f"model.{next(iter(field))}" in no["transformers-bf16-static"]
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: None)
    no = refusals(names, torch.device("cuda"), tiny())
    assert "Triton is not installed" in no["ours-addsub"]
    assert "transformers is not installed" in no["transformers-fp32"]
    assert not set(no) & {"ours-auto", "twin-fp32", "twin-bf16"}


def test_what_does_not_fit_is_left_out_by_importance() -> None:
    jobs = [job(name) for name in ("twin-fp32", "ours-auto", "twin-bf16")]
    kept = fitting(jobs, [40, 10, 20], 100)  # ours: 10 + 10; bf16: 30 + 20; fp32: 70 + 40 > 95
    assert [one.contender for one in kept] == ["ours-auto", "twin-bf16"]
    assert len(fitting(jobs, [40, 10, 20], 116)) == 3
    assert len(fitting(jobs, [40, 10, 20], None)) == 3
    big = ModelConfig(**bench_decode.SIZES["8b"], max_seq_len=1).resolve()
    cases = [Case(1, 128, 128), Case(32, 2048, 128)]
    bf16 = held_bytes(job("twin-bf16", big, device="cuda"), big, cases)
    # 8.03e9 weights, and 32 * 2176 tokens of 32 layers * 2 * 8 heads * 128, 2 bytes each
    assert bf16 == pytest.approx(2 * 8.03e9 + 32 * 2176 * 32 * 2 * 8 * 128 * 2 + 1.6e9, rel=0.01)


# figures


COMMON = (
    "device",
    "torch",
    "triton",
    "transformers",
    "driver",
    "commit",
    "code",
    "date",
    "command",
)


def turns(*pairs: tuple[float, float]) -> list[Turn]:
    return [Turn(first, rest, None, [[1, 2, 3], [4, 5, 6]]) for first, rest in pairs]


def outcome(made: list[Turn], joules: float | None = None) -> Outcome:
    return Outcome(made, {"weights": 10, "head": 3, "embedding": 4, "cache": 5}, 99, joules)


def test_figures_by_hand() -> None:
    names = ("ours-auto", "twin-fp32", "twin-bf16", "transformers-fp32")
    differs = [
        turn._replace(tokens=[[1, 2, 9], [4, 5, 6]]) for turn in turns((4, 8), (8, 16), (4, 8))
    ]
    outcomes = {
        "ours-auto": outcome(turns((1, 2), (2, 4), (1, 1)), 0.5),
        "twin-fp32": outcome(turns((1, 9), (1, 9), (1, 9))),
        "twin-bf16": outcome(turns((2, 4), (2, 4), (2, 4))),  # the faster twin
        "transformers-fp32": outcome(differs),
    }
    subject, case = Subject("tiny", tiny(), ""), Case(2, 5, 3)
    shared: dict[str, Any] = {**dict.fromkeys(COMMON, "x"), "threads": 2, "rounds": 3}
    rows = tables.figures(subject, case, [job(name) for name in names], outcomes, shared)
    ours, fp32, bf16, theirs = rows
    assert [row["contender"] for row in rows] == list(names)
    assert ours["tokens_s"] == "2"  # 2 rows * 2 tokens, in 2, 4 and 1 seconds
    assert ours["first_ms"] == "1000"
    assert ours["over_twin"] == "2"  # of 2, 1 and 4
    assert ours["over_transformers"] == "4"  # of 4, 4 and 8
    assert ours["first_over_twin"] == "2"  # of 2, 1 and 2
    assert ours["first_over_transformers"] == "4"  # of 4, 4 and 4
    assert bf16["over_twin"] == bf16["over_twin_p75"] == "1"
    assert float(fp32["over_twin"]) == pytest.approx(4 / 9)
    assert ours["agreement"] == "1"
    assert float(theirs["agreement"]) == pytest.approx((2 / 3 + 1) / 2)
    assert bf16["agreement"] == ""
    assert (ours["head_bytes"], ours["cache_bytes"], ours["peak_bytes"]) == ("7", "5", "99")
    assert (ours["joules_token"], bf16["joules_token"]) == ("0.5", "")
    shown = tables.table(rows)
    assert "| tiny | 2 | 5 | ours-auto | 1,000 | 2.0 (" in shown
    assert shown.count("\n") == 3 + len(names)
    assert cli_bench_decode._line(rows) == (
        "tiny batch 2 prompt 5, tokens/s: "
        "ours-auto 2.0 (2.00x twin-bf16, 4.00x transformers-fp32, first token 1,000 ms), "
        "twin-fp32 0.4 (first token 1,000 ms), twin-bf16 1.0 (first token 2,000 ms), "
        "transformers-fp32 0.5 (first token 4,000 ms)"
    )
    assert cli_bench_decode._line(rows[:1]).endswith("ours-auto 2.0 (first token 1,000 ms)")


def test_what_stands_above_a_table() -> None:
    rows = tables.figures(
        Subject("tiny", tiny(), ""),
        Case(2, 5, 3),
        [job("ours-auto")],
        {"ours-auto": outcome(turns((1, 2)))},
        {**dict.fromkeys(COMMON, "x"), "threads": 1, "rounds": 1, "device": "A CPU"},
    )
    blank = {"transformers": "", "commit": "", "torch": "2.1", "date": "today"}
    for row, title in (
        (rows[0] | blank, "**A CPU**, 1 thread: torch 2.1; 3 new tokens a row, 1 round; today"),
        (
            rows[0] | {"threads": "2", "rounds": "7"},
            "**A CPU**, 2 threads: torch x, transformers x; 3 new tokens a row, 7 rounds; commit x,"
            " x",
        ),
        (
            rows[0] | {"threads": ""},
            "**A CPU**: torch x, transformers x; 3 new tokens a row, 1 round; commit x, x",
        ),
    ):
        assert tables.table([row]).splitlines()[0] == title
    both = tables.table([rows[0], rows[0] | {"new": "8"}])
    assert both.count("**A CPU**") == 2


def test_without_opponents_there_are_no_ratios() -> None:
    (row,) = tables.figures(
        Subject("tiny", tiny(), ""),
        Case(2, 5, 3),
        [job("ours-auto")],
        {"ours-auto": outcome(turns((1, 2)))},
        {**dict.fromkeys(COMMON, "x"), "threads": None, "rounds": 1},
    )
    assert row["over_twin"] == row["over_transformers"] == row["first_over_twin"] == ""
    assert "| tiny | 2 | 5 | ours-auto |" in tables.table([row])


def test_kernels_of_ours_must_choose_the_same_tokens() -> None:
    same, other = turns((1, 1))[0], turns((1, 1))[0]._replace(tokens=[[1, 2, 3], [4, 5, 7]])
    bench_decode._check_tokens({"ours-auto": same, "ours-dot": same, "twin-fp32": other})
    with pytest.raises(Inexact, match="ours-dot and ours-auto chose different tokens"):
        bench_decode._check_tokens({"ours-auto": same, "ours-dot": other})


def test_prompts_are_the_seeds() -> None:
    case = Case(3, 11, 2)
    assert prompts_of(case, 61, 5) == prompts_of(case, 61, 5) != prompts_of(case, 61, 6)
    assert all(len(row) == 11 and 0 <= min(row) <= max(row) < 61 for row in prompts_of(case, 61, 5))


# the command


RUN = ("--size", "tiny", "--contender", "ours-auto", "--new", "5", "--prompt", "9")


def read(path: Path) -> list[Figures]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
        assert row["over_twin"] == row["over_transformers"] == row["joules_token"] == ""
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


def test_rows_of_another_version_are_not_taken_for_done() -> None:
    subject, case, jobs = Subject("tiny", tiny(), ""), Case(2, 5, 3), [job("ours-auto")]
    common: dict[str, Any] = dict.fromkeys((*tables.KEY, *tables.VERSION, *COMMON), "x")
    for own in ("model", "weights", "contender", "batch", "prompt", "new", "seed"):
        del common[own]
    common |= {"threads": 1, "rounds": 2}
    rows = tables.figures(subject, case, jobs, {"ours-auto": outcome(turns((1, 2)))}, common)
    assert tables.stored(subject, case, jobs, common, rows) == rows
    assert not tables.stored(subject, case, [job("ours-auto", seed=1)], common, rows)
    assert not tables.stored(subject, case, [*jobs, job("twin-fp32")], common, rows)
    assert not tables.stored(subject, case._replace(new=4), jobs, common, rows)
    for column in ("code", "torch", "rounds", "threads"):
        assert not tables.stored(subject, case, jobs, common | {column: 7}, rows)
    trained = Subject("tiny", tiny(), "folder")
    assert not tables.stored(trained, case, jobs, common, rows)
    short = [rows[0] | {"rounds": "1"}, rows[0] | {"new": "2"}]
    assert merge(rows, short, tables.KEY) == [*rows, *short]  # they replace no longer run
    other = [rows[0] | {"code": "newer"}]
    assert merge(rows, other, tables.KEY) == other


def test_a_model_of_a_folder_and_what_cannot_run(bench: Bitnet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_model(tmp_path / "model", as_transformer(pack(Transformer(tiny()))), None)
    asked = ("--model", folder, "--batch", "2", "--rounds", "1")
    code, said, err = bench(*asked, *RUN[2:], "--contender", "ours-addsub")
    assert code == 0, err
    assert "ours-addsub is left out: a CPU has no such kernel" in said
    found = [(row["contender"], row["weights"]) for row in read(tmp_path / "decode.csv")]
    assert found == [("ours-auto", "trained")]
    code, _, err = bench("--size", "tiny", "--contender", "ours-dot")
    assert code == 2
    assert "--contender: none of ours-dot can run here" in err
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
    code, said, _ = bench("--quick", "--contender", "twin-bf16", "--rounds", "3")
    assert code == 0
    assert "--quick" not in said
    assert raced == [
        (["ours-auto", "twin-fp32"], 2, [Case(1, 32, 8)]),
        (["twin-bf16"], 3, [Case(1, 32, 8)]),
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
    (["--size", "110"], "--size: '110' is unknown; did you mean 110m?"),
    (["--size", "100m"], "did you mean 110m?"),
    (["--size", "7b"], "did you mean 8b?"),
    (["--contender", "our-auto"], "did you mean ours-auto?"),
    (["--contender", "ours"], "did you mean ours-auto?"),
    (["--contender", "twin-fp16"], "did you mean twin-bf16?"),
    (["--contender", "transformers-fp"], "did you mean transformers-fp32?"),
    (["--contender", "ours-addsub"], "can run here: a CPU has no such kernel"),
    (["--quick", "--size", "10"], "did you mean 60m?"),
    (["--new", "1"], "the nearest is 2"),
    (["--model", "runs/x", "--size", "60m"], "--model and --size exclude each other"),
    (["--all", "--quick"], "exclude each other"),
    (["--profile", "--batch", "1", "--batch", "8"], "--profile: one --contender"),
    (["--batch", "65"], "--batch"),
    (["--device", "tpu"], "expected cpu, cuda"),
]


@pytest.mark.parametrize(("asked", "said"), MISTAKES, ids=lambda value: " ".join(value)[:30])
def test_mistakes_end_in_one_line(bench: Bitnet, asked: list[str], said: str) -> None:
    code, out, err = bench(*asked)
    assert (code, out) == (2, "")  # mistakes come before everything else
    assert said in err


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


# profiles


def event(name: str, ts: float, dur: float, *shapes: list[int], **fields: Any) -> dict[str, Any]:
    kinds = fields.pop("kinds", ["float"] * len(shapes))
    args = {"Input Dims": list(shapes), "Input type": kinds}
    return {"ph": "X", "cat": "cpu_op", "tid": 1, "name": name, "ts": ts, "dur": dur} | {
        "args": args,
        **fields,
    }


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
    assert profiling.step_bytes(memory, tiny(), job("twin-fp32"), case) == 1500 + 30 * cached
    untied = memory | {"head": 70}
    found = profiling.step_bytes(untied, tiny(), job("twin-bf16"), case)
    assert found == 1070 + 30 * cached // 2


@pytest.mark.parametrize("contender", ["ours-auto", "twin-fp32"])
def test_a_profile(bench: Bitnet, tmp_path: Path, contender: str) -> None:
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
    assert len(
        {(row["batch"], row["operation" if "operation" in row else "name"]) for row in kept}
    ) == len(kept)


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
        "from bitnet.bench.decode import SIZES\n"
        f"SIZES['tiny'] = {TINY}\n"
        "from bitnet.cli import main\nmain()"
    )
    asked = ["--profile", "--size", "tiny", "--prompt", "6", "--device", "cpu"]
    out = str(tmp_path / "profile.csv")
    child = subprocess.run(
        [sys.executable, "-c", program, "bench", "decode", *asked, "--out", out],
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


# the guide


def test_the_guide_shows_the_table_of_the_csvs() -> None:
    guide = (DOCS / "decoding.md").read_text(encoding="utf-8")
    shown = guide.partition("<!-- decode:begin -->\n")[2].partition("\n<!-- decode:end -->")[0]
    assert shown == tables.table(tables.load(DOCS / "results"))
