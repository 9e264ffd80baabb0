"""llama.cpp beside our engine: the check before the timing, the figures, and llama.cpp itself
where llama-cpp-python is installed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.bench import decode as bench_decode
from bitnet.bench import decode_table as tables
from bitnet.bench import peers_table
from bitnet.bench.decode import Inexact, Race, refusals
from bitnet.bench.decode_table import Subject
from bitnet.bench.decode_worker import (
    LLAMA,
    LLAMA_FA,
    Case,
    LlamaRunner,
    check,
    prompts_of,
    random_model,
)
from bitnet.bench.peers import disagreement, exact_logits
from bitnet.cli import bench_decode as cli_bench_decode
from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer
from tests.helpers.decode_bench import Bitnet, bench, job, outcome, tiny, turns

__all__ = ["bench"]  # a fixture
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"d_model": 256, "n_heads": 8, "n_kv_heads": 2, "d_ff": 512}


def carried(**fields: Any) -> ModelConfig:
    """A model that GGUF carries."""
    return tiny(**SHAPE, norm_placement="pre_norm", activation="silu", **fields)


def test_the_oracle_is_the_dense_model() -> None:
    packed = random_model(carried(), 3, CPU, torch.float32, "auto")
    dense = Transformer(dataclasses.replace(packed.config, linear="fp"))
    state = dict(packed.state_dict())
    for name, module in packed.named_modules():
        if isinstance(module, TernaryLinear):
            del state[f"{name}.packed"], state[f"{name}.scale"]
            state[f"{name}.weight"] = module.codes().float() * module.scale
    dense.load_state_dict(state)
    prompt = torch.randint(61, (16,)).tolist()
    with torch.no_grad():
        wanted = dense(torch.tensor([prompt]))[0, -1]
    # the same fp32 sums
    torch.testing.assert_close(exact_logits(packed, prompt), wanted, rtol=1e-5, atol=1e-5)


def test_an_engine_may_err_as_far_as_ours() -> None:
    exact = torch.tensor([1.0, -1.0] * 8)  # deviation just above 1
    off = torch.tensor([0.1, 0.1] * 8)
    assert disagreement(exact + off, exact - off, exact) == ""
    assert disagreement(exact + off, exact + 1.9 * off, exact) == ""
    assert "not compute the same model" in disagreement(exact + off, exact + 2.1 * off, exact)
    assert "not compute the same model" in disagreement(exact + off, exact * torch.nan, exact)
    assert "too far off" in disagreement(exact + 6 * off, exact, exact)
    assert "too far off" in disagreement(exact * torch.nan, exact, exact)


def test_all_contenders_get_numbers_that_each_can_hold() -> None:
    model = random_model(carried(), 0, CPU, torch.float32, "auto")
    embedding = model.embed_tokens.weight
    assert torch.equal(embedding.half().float(), embedding)
    assert torch.equal(embedding.bfloat16().float(), embedding)
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.05)
    scales = [m.scale for m in model.modules() if isinstance(m, TernaryLinear)]
    assert all(torch.equal(scale.half().float(), scale) for scale in scales)


def test_who_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: name)
    assert not refusals([LLAMA], CPU, carried())
    for size in ("110m-silu", "730m-silu"):
        config = ModelConfig(**bench_decode.SIZES[size], max_seq_len=1).resolve()
        assert not refusals([LLAMA], CPU, config)
    assert config.num_parameters()["total"] == pytest.approx(730e6, rel=0.005)
    assert "model.activation" in refusals([LLAMA], CPU, tiny())[LLAMA]
    assert "on a CPU" in refusals([LLAMA], torch.device("cuda"), carried())[LLAMA]
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: None)
    said = refusals([LLAMA], CPU, carried())[LLAMA]
    assert said == 'llama-cpp-python is not installed (pip install "bitnet-train[peers]")'


def test_without_llama_cpp_one_line_says_what_to_install(
    bench: Bitnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: None)
    code, said, err = bench("--peers")
    assert (code, said) == (2, "")
    assert err == (
        "error: --peers: 110m-silu: llama-cpp-python is not installed "
        '(pip install "bitnet-train[peers]")\n'
    )


def test_the_shapes_threads_and_contenders_of_the_comparison(
    bench: Bitnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[tuple[Any, ...]] = []

    def race(self: Any, subject: Subject, jobs: list[Any]) -> None:
        names = {one.contender for one in jobs}
        threads = {one.threads for one in jobs}
        raced.append((subject.name, names, threads, self.here.threads, self.cases))

    monkeypatch.setattr(bench_decode, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_decode, "free_bytes", lambda device: None)
    monkeypatch.setattr(cli_bench_decode._Run, "race", race)
    before = torch.get_num_threads()
    try:
        code, _, err = bench("--peers", "--contender", "ours-bf16-head", "--threads", "1",
                             "--threads", "2")  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert code == 0, err
    both = {"ours-bf16-head", LLAMA}
    case = [Case(1, 128, 64)]
    assert raced == [
        (size, both, {n}, n, case) for size in ("110m-silu", "730m-silu") for n in (1, 2)
    ]


def test_figures_by_hand() -> None:
    names = ("ours-bf16-head", LLAMA, LLAMA_FA)
    outcomes = {
        "ours-bf16-head": outcome(turns((1, 2), (2, 4), (1, 1))),
        LLAMA: outcome(turns((16, 8), (32, 20), (8, 3))),  # the faster decoder
        LLAMA_FA: outcome(turns((4, 16), (8, 40), (2, 6))),  # the faster with prompts
    }
    common = ("device", "torch", "triton", "transformers", "llama_cpp", "driver", "commit", "code")
    shared: dict[str, Any] = {**dict.fromkeys((*common, "date", "command"), "x"), "threads": 2}
    jobs = [job(name, carried()) for name in names]
    subject, case = Subject("110m-silu", carried(), ""), Case(2, 5, 3)
    rows = tables.figures(subject, case, jobs, outcomes, {**shared, "rounds": 3})
    ours, theirs, fa = rows
    found = [ours[f"over_llama_cpp{part}"] for part in ("", "_min", "_max")]
    assert found == ["4", "3", "5"]  # of 4, 5 and 3
    found = [ours[f"first_over_llama_cpp{part}"] for part in ("", "_min", "_max")]
    assert found == ["4", "2", "4"]  # of 4, 4 and 2
    assert theirs["over_llama_cpp"] == fa["first_over_llama_cpp_max"] == "1"
    assert (fa["over_llama_cpp"], theirs["first_over_llama_cpp"]) == ("0.5", "0.25")
    assert (ours["agreement"], theirs["agreement"], theirs["dtype"]) == ("1", "1", "float16")
    assert peers_table.prefill(ours) == 2 * 5 / 1
    title, _, _, _, *lines = peers_table.table(rows).splitlines()
    assert (
        title == "**x**: torch x, llama-cpp-python x; 3 new tokens per row, 3 rounds; commit x, x"
    )
    assert lines[0] == (
        "| 110m-silu | 2 | 2 | 5 | ours-bf16-head | 10 | 4.00 (2.00 to 4.00) | 2.0 "
        "| 4.00 (3.00 to 5.00) | 100% | 17 B | 90 B |"
    )
    assert peers_table.summary(rows) == "No figures yet."  # not one row and 128 tokens
    one = [row | {"batch": "1", "prompt": "128"} for row in rows]
    int8 = one[0] | {"contender": "ours-int8-head", "over_llama_cpp": "6.04"}
    assert peers_table.summary([*one, int8]).splitlines()[2:] == [
        "| x | 110m-silu | 2 | 2 | 4.0 |  | 6.0 | 4.0 |"
    ]
    assert tables.table(rows) == peers_table.table([]) == "No figures yet."
    assert "2.0 (4.00x llama.cpp, first token 1,000 ms)" in cli_bench_decode._line(rows)


def test_a_wrong_llama_cpp_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            started.append(name)

        def ask(self, method: str) -> str:
            return "it does not compute the same model"

        def close(self) -> None:
            started.remove("check")

    started: list[str] = []
    monkeypatch.setattr(bench_decode, "Worker", Other)
    with pytest.raises(Inexact, match=r"llama\.cpp: it does not compute the same model"):
        Race([job("ours-auto", carried()), job(LLAMA, carried())], lambda text: None).__enter__()
    assert started == []


# llama.cpp itself


def test_llama_cpp_computes_our_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="the peers extra is not installed")
    pytest.importorskip("gguf", reason="the peers extra is not installed")
    path = tmp_path / "model.gguf"
    one = job(LLAMA, carried(n_layers=3, vocab_size=300), gguf=str(path))
    assert check(one) == ""

    case = Case(2, 11, 6)
    runner = LlamaRunner(one, case, None)
    prompts = prompts_of(case, 300, 7)
    made = runner.generate(prompts, 6)
    assert made == runner.generate(prompts, 6)._replace(first_s=made.first_s, rest_s=made.rest_s)
    assert min(made.first_s, made.rest_s) > 0
    alone = LlamaRunner(one, case._replace(batch=1), None)
    assert [alone.generate([prompt], 6).tokens[0] for prompt in prompts] == made.tokens
    sizes = runner.memory()
    assert sizes["embedding"] == 2 * 300 * 256
    matrices = 3 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256)
    assert sizes["weights"] == matrices * 66 // 256 + (3 * 2 + 1) * 256 * 4

    # a file whose writer forgets that llama.cpp turns neighbouring channels
    monkeypatch.setattr("bitnet.export.gguf_write.rearrange", _unturned)
    assert "not compute the same model" in check(one)


def _unturned(x: Any, pattern: str, **sizes: int) -> Any:
    from einops import rearrange

    return x if "two" in pattern else rearrange(x, pattern, **sizes)
