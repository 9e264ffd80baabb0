"""bitnet bench train: real workers once, on a model of a few thousand weights; figures by hand."""

import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitnet.bench import train as bench_train
from bitnet.bench.rows import as_figures, counted, percent
from bitnet.bench.train import Reply, Stepper, build, most_allocated, variant_config
from bitnet.bench.train_rows import COLUMNS, figures, table
from bitnet.config import load_config
from bitnet.linear import BitLinear
from bitnet.model import Transformer
from bitnet.training.throughput import mfu
from bitnet_kernels.bench import machine
from tests.helpers.train_bench import Bitnet, bitnet, read, tiny, variants

__all__ = ["bitnet", "tiny"]  # fixtures
CONFIGS = Path(__file__).parents[2] / "configs"


def expected_fp_losses(path: Path, steps: int) -> list[float]:
    """A training loop as anyone writes it, of the full-precision baseline."""
    config = load_config([path], ["model.linear=fp"]).resolve()
    torch.manual_seed(0)
    model = Transformer(config.model)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    tokens = torch.randint(261, (12, 13), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        losses.append(loss.item())
    return losses


def test_a_run_from_end_to_end(bitnet: Bitnet, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "train.csv"
    options = ("--config", tiny, "--steps", 4, "--warmup", 1, "--out", out)
    code, said, err = bitnet(*options, *variants("fp", "ours"))
    assert code == 0, err
    assert tuple(out.read_text().splitlines()[0].split(",")) == COLUMNS
    rows = {row["variant"]: row for row in read(out)}
    assert tuple(rows) == ("fp", "ours")
    for row in rows.values():
        assert row["variant"] in said
        assert (row["model"], row["base"], row["dtype"]) == (str(tiny), "fp", "fp32")
        assert (row["tokens"], row["micro_batches"], row["steps"]) == ("48", "3", "4")
        assert (row["threads"], row["seq_len"], row["warmup"]) == ("1", "12", "1")
        assert (row["torch"], row["compile_s"], row["joules_token"]) == (torch.__version__, "", "")
        assert 0 < float(row["step_ms_p25"]) <= float(row["step_ms"]) <= float(row["step_ms_p75"])
        assert float(row["speedup_min"]) <= float(row["speedup"]) <= float(row["speedup_max"])
        assert float(row["tokens_s"]) == pytest.approx(144e3 / float(row["step_ms"]), rel=1e-6)
        weights = 4 * int(row["parameters"])  # and gradients, and Adam's two means
        assert 4 * weights < int(row["peak_bytes"]) < 40 * weights
        if sys.platform == "linux":
            assert 50e6 < int(row["resident_bytes"]) < 2e9
        # embedding 261 x 40; q, o 40 x 40; k, v 20 x 40; gate, up, down 128 x 40; norms
        assert int(row["parameters"]) == 10440 + 2 * 1600 + 1600 + 3 * 5120 + 3 * 40 + 128 + 40
        assert f"--out {out}" in row["command"]
    assert float(rows["fp"]["speedup"]) == 1
    loss = {name: float(row["loss"]) for name, row in rows.items()}
    for name in ("naive", "ours-int8"):
        stepper = Stepper(variant_config([tiny], ["train.device=cpu"], name), name)
        loss[name] = [stepper.step() for _ in range(5)][-1]
    # fp32 sums in another order, the updates' Adam ratios amplify them where gradients are small
    assert loss["fp"] == pytest.approx(expected_fp_losses(tiny, 5)[-1], rel=1e-4)
    # the same maths in floats: an activation on a rounding border may fall to the other side,
    # which is 1/127 of the token's largest in one of 40 summands
    assert loss["naive"] == pytest.approx(loss["ours"], abs=1e-3)
    assert loss["ours-int8"] == pytest.approx(loss["ours"], abs=0.05)
    assert abs(loss["fp"] - loss["ours"]) > 1e-2
    assert loss["ours-int8"] != loss["ours"]


def test_figures_by_hand(tiny: Path) -> None:
    names = ("fp", "ours", "fp-compiled", "ours-compiled")
    configs = {name: variant_config([tiny], ["train.dtype=fp32"], name) for name in names}
    seconds = {
        "fp": [9, 1.0, 2.0, 3.0],
        "ours": [9, 2.0, 1.0, 2.0],
        "fp-compiled": [40, 0.5, 0.5, 0.5],
        "ours-compiled": [50, 0.25, 0.5, 0.125],
    }
    peaks = {"fp": 100, "ours": 80, "fp-compiled": 200, "ours-compiled": 250}
    resident = {"fp": 900, "ours": None, "fp-compiled": 1000, "ours-compiled": 1100}
    replies = {
        name: [
            Reply(s, s + 1, 4.0 - i, peaks[name], resident[name], 2 * s)
            for i, s in enumerate(times)
        ]
        for name, times in seconds.items()
    }
    here, peak = machine.describe(torch.device("cpu")), (5e9, "by hand")
    fp, ours, fp_compiled, ours_compiled = figures("tiny", here, configs, replies, 1, peak)
    assert (fp.step_ms, fp.step_ms_p25, fp.step_ms_p75, fp.speedup) == (2000, 1500, 2500, 1)
    # ratios 1/2, 2/1, 3/2: paired, and so not the ratio 2/2 of the medians
    assert (ours.speedup, ours.speedup_min, ours.speedup_max, ours.base) == (1.5, 0.5, 2, "fp")
    assert (ours.memory_ratio, ours.compile_s, ours.loss) == (0.8, None, 1.0)
    assert (ours.tokens_s, ours.joules_token) == (72, 4 / 144)
    assert (ours_compiled.base, ours_compiled.speedup) == ("fp-compiled", 2)
    assert (ours_compiled.compile_s, fp_compiled.compile_s) == (51, 41)
    assert (ours_compiled.peak_bytes, ours_compiled.memory_ratio) == (250, 1.25)
    assert (fp.resident_bytes, ours.resident_bytes) == (900, None)
    flops = configs["fp"].model.flops_per_token(12)
    assert ours.mfu == pytest.approx(mfu(flops, 72, 5e9))
    assert (ours.peak_flops, ours.peak_flops_source) == peak
    alone = figures("tiny", here, {"ours": configs["ours"]}, {"ours": replies["ours"]}, 1, peak)
    assert (alone[0].base, alone[0].speedup) == ("ours", 1)

    row = as_figures(dataclasses.asdict(ours))
    row |= {"device": "A CPU", "commit": "", "torch": "2.1", "date": "today"}
    places = {"1": "A CPU, 1 thread, fp32;", "4": "A CPU, 4 threads,", "": "A CPU, fp32"}
    for threads, said in places.items():
        title = table([row | {"threads": threads}]).splitlines()[0]
        assert said in title
        assert title.endswith("a step is 3 x 48 tokens; 3 steps; torch 2.1, today")
    shares = {"0.875": "| 87.5% |", "1": "| 100.0% |", "1.25": "| ~125.0% |"}
    for share, cell in shares.items():
        assert cell in table([row | {"mfu": share}])
    assert "| 80 B, 0.80x |  |" in table([row])
    assert "| 80 B, 0.80x | 90 B |" in table([row | {"resident_bytes": "90"}])
    assert table([]) == "No figures yet."


def test_shares_above_all_of_it_are_marked() -> None:
    assert [percent(share) for share in (0.994, 1.0, 1.04)] == ["99%", "100%", "~104%"]
    assert [counted(n, "step") for n in (0, 1, 2, 4096)] == [
        *("0 steps", "1 step", "2 steps", "4,096 steps"),
    ]


def test_torchao_gets_the_matrices_of_the_layers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    stub = SimpleNamespace(
        quantize_=lambda model, recipe: called.append((model, recipe)), bitnet_training=lambda: "b"
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: stub)
    model = build(variant_config([tiny], [], "torchao"), "torchao")
    assert called == [(model.layers, "b")]
    assert type(model.layers[0].mlp.up_proj) is nn.Linear  # type: ignore[union-attr]


def test_all_variants_begin_with_the_same_weights(tiny: Path) -> None:
    names = ("fp", "naive", "ours")
    models = {name: build(variant_config([tiny], [], name), name) for name in names}
    states = [model.state_dict() for model in models.values()]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    matrices = [model.layers[0].mlp.up_proj for model in models.values()]  # type: ignore[union-attr]
    assert [type(m) for m in matrices] == [nn.Linear, bench_train.NaiveBitLinear, BitLinear]


@pytest.mark.parametrize("size", ["15m", "60m", "350m"])
def test_sizes_are_those_of_the_configs(size: str) -> None:
    named = load_config([CONFIGS / f"{size}.toml"]).resolve().model
    assert load_config([], bench_train.SIZES[size]).resolve().model == named


def test_1b_has_a_large_models_layers() -> None:
    model = load_config([], bench_train.SIZES["1b"]).resolve().model
    whole = dataclasses.replace(model, n_layers=32)
    assert (model.d_model, model.n_layers) == (2048, 8)
    assert 1e9 < whole.num_parameters()["total"] < 2e9


def test_a_naive_layer_multiplies_what_it_quantized() -> None:
    layer = bench_train.NaiveBitLinear(37, 5, bias=False)
    x = torch.randn(3, 37, requires_grad=True)
    gamma = float(layer.weight.detach().abs().mean())
    codes = (layer.weight.detach() / gamma).round().clamp(-1, 1)
    assert codes.unique().tolist() == [-1, 0, 1]
    scale = x.detach().abs().amax(1, keepdim=True) / 127
    x_hat = (x.detach() / scale).round() * scale
    y = layer(x)
    # K = 37 products of fp32, each off by a few 2^-24 of values near 1
    torch.testing.assert_close(y, x_hat @ (codes * gamma).t(), rtol=1e-5, atol=1e-5)
    dy = torch.randn(3, 5)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad, dy @ (codes * gamma), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_variants(bitnet: Bitnet, tiny: Path, tmp_path: Path) -> None:
    """The compiler changes no loss: minutes, since each process compiles with an empty cache."""
    out, families = tmp_path / "train.csv", ("fp", "naive", "ours")
    names = [*families, *(f"{family}-compiled" for family in families)]
    code, _, err = bitnet("--config", tiny, *variants(*names), "--steps", 3, "--out", out)
    assert code == 0, err
    rows = {row["variant"]: row for row in read(out)}
    for family in families:
        compiled = rows[f"{family}-compiled"]
        assert float(compiled["loss"]) == pytest.approx(float(rows[family]["loss"]), abs=2e-3)
        assert float(compiled["compile_s"]) > float(compiled["step_ms"]) / 1e3


def test_the_most_that_tensors_held() -> None:
    """By hand: 3 MB beside 2, after 1 is gone."""
    before = torch.zeros(1 << 20)

    def run() -> None:
        one = torch.empty(1 << 20, dtype=torch.uint8)
        two = torch.ones(2 << 20, dtype=torch.uint8)
        del one
        three = torch.empty(3 << 18, dtype=torch.float32)
        before[: 1 << 10].add_(1)
        del two, three
        torch.empty(4 << 20, dtype=torch.uint8)

    assert 5 << 20 <= most_allocated(run) < (5 << 20) + 64  # scalars are tensors too
    assert most_allocated(lambda: None) == 0
