"""bitnet bench decode: contenders with the weights they claim, figures worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.bench import decode as bench_decode
from bitnet.bench import decode_table as tables
from bitnet.bench.decode import Inexact, fitting, held_bytes, refusals
from bitnet.bench.decode_table import Subject
from bitnet.bench.decode_worker import (
    Case,
    EngineRunner,
    as_transformers,
    prompts_of,
    random_model,
)
from bitnet.bench.rows import merge
from bitnet.cli import bench_decode as cli_bench_decode
from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig
from bitnet_kernels.cpu import native
from tests.helpers.decode_bench import job, outcome, tiny, turns

DOCS = Path(__file__).parents[2] / "docs"


CPU = torch.device("cpu")


def test_ternary_contenders_have_the_same_weights_and_a_baseline_its_own_dtype() -> None:
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
    for name, dtype in (("baseline-fp32", torch.float32), ("baseline-bf16", torch.bfloat16)):
        baseline = job(name).model(32)
        assert {p.dtype for p in baseline.parameters()} == {dtype}
        assert not any(isinstance(m, TernaryLinear) for m in baseline.modules())
        assert baseline.lm_head.weight is baseline.embed_tokens.weight


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
    monkeypatch.setattr(native, "missing", lambda: "")
    assert set(refusals(names, CPU, tiny())) == {"llama.cpp", "llama.cpp-fa"}
    monkeypatch.setattr(native, "missing", lambda: "no library")
    no = refusals(names, CPU, tiny())
    kernels = {"ours-dot", "ours-addsub", "ours-dot-bf16-head", "ours-addsub-bf16-head"}
    assert {name for name, why in no.items() if why == "no library"} == kernels
    for field in ({"norm_placement": "pre_norm"}, {"qk_norm": True}, {"granularity": "row"}):
        no = refusals(names, CPU, tiny(**field))
        assert f"model.{next(iter(field))}" in no["transformers-bf16-static"]
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: None)
    no = refusals(names, torch.device("cuda"), tiny())
    assert "Triton is not installed" in no["ours-addsub"]
    assert "transformers is not installed" in no["transformers-fp32"]
    assert not set(no) & {"ours-auto", "baseline-fp32", "baseline-bf16"}
    assert "in bf16" in no["ours-bf16-head"]
    assert "in bf16" in no["ours-int8-head"]


def test_a_head_of_fewer_bits_is_another_contender() -> None:
    held, numbers = {}, tiny().vocab_size * tiny().d_model
    for name in ("ours-auto", "ours-bf16-head"):
        runner = EngineRunner(job(name), Case(1, 4, 2), None)
        memory = runner.memory()
        held[name] = memory["head"] + memory["embedding"]
        assert runner.generate([[1, 2, 3, 4]], 2).tokens[0]
    assert held["ours-auto"] == 4 * numbers
    one_for_both = native.library() is not None  # the embedding is read from the head
    assert held["ours-bf16-head"] == (2 if one_for_both else 2 + 4) * numbers


def test_what_does_not_fit_is_left_out_by_importance() -> None:
    jobs = [job(name) for name in ("baseline-fp32", "ours-auto", "baseline-bf16")]
    kept = fitting(jobs, [40, 10, 20], 100)  # ours: 10 + 10; bf16: 30 + 20; fp32: 70 + 40 > 95
    assert [one.contender for one in kept] == ["ours-auto", "baseline-bf16"]
    assert len(fitting(jobs, [40, 10, 20], 116)) == 3
    assert len(fitting(jobs, [40, 10, 20], None)) == 3
    big = ModelConfig(**bench_decode.SIZES["8b"], max_seq_len=1).resolve()
    cases = [Case(1, 128, 128), Case(32, 2048, 128)]
    bf16 = held_bytes(job("baseline-bf16", big, device="cuda"), big, cases)
    # 8.03e9 weights, and 32 * 2176 tokens of 32 layers * 2 * 8 heads * 128, 2 bytes each
    assert bf16 == pytest.approx(2 * 8.03e9 + 32 * 2176 * 32 * 2 * 8 * 128 * 2 + 1.6e9, rel=0.01)


# Figures


COMMON = (
    "device",
    "torch",
    "triton",
    "transformers",
    "llama_cpp",
    "driver",
    "commit",
    "code",
    "date",
    "command",
)


def test_figures_by_hand() -> None:
    names = ("ours-auto", "baseline-fp32", "baseline-bf16", "transformers-fp32")
    differs = [
        turn._replace(tokens=[[1, 2, 9], [4, 5, 6]]) for turn in turns((4, 8), (8, 16), (4, 8))
    ]
    outcomes = {
        "ours-auto": outcome(turns((1, 2), (2, 4), (1, 1)), 0.5),
        "baseline-fp32": outcome(turns((1, 9), (1, 9), (1, 9))),
        "baseline-bf16": outcome(turns((2, 4), (2, 4), (2, 4))),  # the faster baseline
        "transformers-fp32": outcome(differs),
    }
    subject, case = Subject("tiny", tiny(), ""), Case(2, 5, 3)
    shared: dict[str, Any] = {**dict.fromkeys(COMMON, "x"), "threads": 2, "rounds": 3}
    rows = tables.figures(subject, case, [job(name) for name in names], outcomes, shared)
    ours, fp32, bf16, theirs = rows
    assert [row["contender"] for row in rows] == list(names)
    assert ours["tokens_s"] == "2"  # 2 rows * 2 tokens, in 2, 4 and 1 seconds
    assert ours["first_ms"] == "1000"
    assert ours["over_baseline"] == "2"  # of 2, 1 and 4
    assert ours["over_transformers"] == "4"  # of 4, 4 and 8
    assert ours["first_over_baseline"] == "2"  # of 2, 1 and 2
    assert ours["first_over_transformers"] == "4"  # of 4, 4 and 4
    assert bf16["over_baseline"] == bf16["over_baseline_p75"] == "1"
    assert float(fp32["over_baseline"]) == pytest.approx(4 / 9)
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
        "ours-auto 2.0 (2.00x baseline-bf16, 4.00x transformers-fp32, first token 1,000 ms), "
        "baseline-fp32 0.4 (first token 1,000 ms), baseline-bf16 1.0 (first token 2,000 ms), "
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
        (rows[0] | blank, "**A CPU**, 1 thread: torch 2.1; 3 new tokens per row, 1 round; today"),
        (
            rows[0] | {"threads": "2", "rounds": "7"},
            "**A CPU**, 2 threads: torch x, transformers x; 3 new tokens per row, 7 rounds; commit "
            "x, x",
        ),
        (
            rows[0] | {"threads": ""},
            "**A CPU**: torch x, transformers x; 3 new tokens per row, 1 round; commit x, x",
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
    assert row["over_baseline"] == row["over_transformers"] == row["first_over_baseline"] == ""
    assert "| tiny | 2 | 5 | ours-auto |" in tables.table([row])


def test_kernels_of_ours_must_choose_the_same_tokens() -> None:
    same, other = turns((1, 1))[0], turns((1, 1))[0]._replace(tokens=[[1, 2, 3], [4, 5, 7]])
    bench_decode._check_tokens({"ours-auto": same, "ours-dot": same, "baseline-fp32": other})
    bench_decode._check_tokens({"ours-auto": same, "ours-bf16-head": other})  # it rounds
    with pytest.raises(Inexact, match="ours-dot and ours-auto chose different tokens"):
        bench_decode._check_tokens({"ours-auto": same, "ours-dot": other})


def test_prompts_are_the_seeds() -> None:
    case = Case(3, 11, 2)
    assert prompts_of(case, 61, 5) == prompts_of(case, 61, 5) != prompts_of(case, 61, 6)
    assert all(len(row) == 11 and 0 <= min(row) <= max(row) < 61 for row in prompts_of(case, 61, 5))


def test_rows_of_another_version_are_not_taken_for_done() -> None:
    subject, case, jobs = Subject("tiny", tiny(), ""), Case(2, 5, 3), [job("ours-auto")]
    common: dict[str, Any] = dict.fromkeys((*tables.KEY, *tables.VERSION, *COMMON), "x")
    for own in ("model", "weights", "contender", "batch", "prompt", "new", "seed"):
        del common[own]
    common |= {"threads": 1, "rounds": 2}
    rows = tables.figures(subject, case, jobs, {"ours-auto": outcome(turns((1, 2)))}, common)
    assert tables.stored(subject, case, jobs, common, rows) == rows
    assert not tables.stored(subject, case, [job("ours-auto", seed=1)], common, rows)
    assert not tables.stored(subject, case, [*jobs, job("baseline-fp32")], common, rows)
    assert not tables.stored(subject, case._replace(new=4), jobs, common, rows)
    for column in ("code", "torch", "rounds", "threads"):
        assert not tables.stored(subject, case, jobs, common | {column: 7}, rows)
    trained = Subject("tiny", tiny(), "folder")
    assert not tables.stored(trained, case, jobs, common, rows)
    short = [rows[0] | {"rounds": "1"}, rows[0] | {"new": "2"}]
    assert merge(rows, short, tables.KEY) == [*rows, *short]  # they replace no longer run
    other = [rows[0] | {"code": "newer"}]
    assert merge(rows, other, tables.KEY) == other


def test_the_guide_shows_the_table_of_the_csvs() -> None:
    guide = (DOCS / "decoding.md").read_text(encoding="utf-8")
    shown = guide.partition("<!-- decode:begin -->\n")[2].partition("\n<!-- decode:end -->")[0]
    assert shown == tables.table(tables.load(DOCS / "results"))
