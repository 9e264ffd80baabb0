import math
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import bitnet.quant
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.evaluate import (
    EvalConfig,
    EvalResult,
    compressor_baselines,
    evaluate_text,
    evaluate_windows,
    evaluation_mode,
)
from bitnet.model import KVCache, ModelConfig, Transformer
from bitnet.schema import UserError


class Markov(Transformer):
    """A model whose next-token logits are a table's row for the last token, and nothing else."""

    def __init__(self, table: Tensor, max_seq_len: int = 16) -> None:
        super().__init__(ModelConfig(d_model=2, vocab_size=len(table), max_seq_len=max_seq_len))
        self.table = table
        self.inputs: list[Tensor] = []

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert tokens.shape[1] <= self.config.max_seq_len
        self.inputs.append(tokens)
        logits = self.table[tokens]
        if targets is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def counter(sizes: list[int]) -> Callable[[Tensor], int]:
    """Bytes of a window's targets, by a table."""
    return lambda window: sum(sizes[token] for token in window[1:].tolist())


def windows_of(ids: np.ndarray, span: int) -> list[Tensor]:
    return [torch.from_numpy(ids[i : i + span + 1]) for i in range(0, len(ids) - 1, span)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "def main() -> None:\n    return  # the end of the thing\n" * 50
    return train_tokenizer([text], 300, tmp_path_factory.mktemp("tok") / "tokenizer.model", 1)


@pytest.mark.parametrize("batch_size", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_the_three_numbers_by_hand(batch_size: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 7)) * 2
    ids = rng.integers(0, 7, 150)
    count_bytes = counter([0, 1, 2, 3, 4, 5, 6])  # 0: end of document, no bytes
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    predicted = [-log_p[a, b] for a, b in pairwise(ids)]
    n, nats, n_bytes = 149, sum(predicted), int(ids[1:].sum())

    model = Markov(torch.tensor(table, dtype=torch.float32))
    windows = windows_of(ids.astype(dtype), 16)
    got = evaluate_windows(model, windows, count_bytes, batch_size)
    assert (got.tokens, got.bytes) == (n, n_bytes)
    assert got.loss == pytest.approx(nats / n, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_batches_keep_the_limit_and_the_order() -> None:
    model = Markov(torch.zeros(3, 3))
    ids = np.arange(50) % 3
    evaluate_windows(model, windows_of(ids, 8), counter([1] * 3), batch_size=4)
    assert [tuple(batch.shape) for batch in model.inputs] == [(4, 8), (2, 8), (1, 1)]
    seen = torch.cat([batch.flatten() for batch in model.inputs])
    assert seen.tolist() == ids[:-1].tolist()


def test_an_open_batch_size_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.evaluate._CPU_LOGITS", 100)
    model = Markov(torch.zeros(3, 3))
    evaluate_windows(model, windows_of(np.zeros(161, dtype=np.int64), 8), counter([1] * 3))
    assert [len(batch) for batch in model.inputs] == [4] * 5  # 4 * 8 * 3 = 96 logits
    monkeypatch.setattr("bitnet.evaluate._CPU_LOGITS", 1)
    evaluate_windows(model, windows_of(np.zeros(17, dtype=np.int64), 8), counter([1] * 3))
    assert [len(batch) for batch in model.inputs[5:]] == [1, 1]


@pytest.mark.parametrize("kind", ["plain", "bias", "hooked model"])
def test_one_long_window_keeps_the_bound_too(kind: str) -> None:
    """A window with more logits than the bound is scored in parts within the bound, with the same
    sum as all logits at once. A context of 131,072 and the default bound, 2^23."""
    torch.manual_seed(0)
    span, vocab = 131_072, 97
    config = ModelConfig(d_model=8, n_layers=1, vocab_size=vocab, max_seq_len=span)
    model = Transformer(config)
    torch.nn.init.normal_(model.embed_tokens.weight, std=2.0)  # far from uniform
    model.layers = torch.nn.ModuleList()  # attention over so many tokens takes minutes
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(vocab))
    if kind == "hooked model":
        model.register_forward_hook(lambda *_: None)
    window = torch.randint(vocab, (span + 1,))
    sizes: list[int] = []

    def largest(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        sizes.append(output.numel())

    handle = model.lm_head.register_forward_hook(largest)
    got = evaluate_windows(model, [window], len)
    handle.remove()
    assert max(sizes) <= 2**23 < span * vocab
    assert sum(sizes) == span * vocab
    with torch.no_grad():
        log_p = model(window[:-1].unsqueeze(0))[0].double().log_softmax(-1)
    expected = -log_p[torch.arange(span), window[1:]].mean()
    assert got.tokens == span
    # each fp32 logit and its softmax are within 8 ulps of the largest, 2^5
    assert abs(got.loss - float(expected)) < 8 * 2**5 * 2**-23


@pytest.mark.parametrize("linear", ["ternary", "fp"])
def test_a_real_model_does_not_depend_on_the_batch_size(linear: Any) -> None:
    torch.manual_seed(0)
    config = ModelConfig(depth=1, d_model=64, vocab_size=97, max_seq_len=24, linear=linear)
    model = Transformer(config)
    windows = windows_of(np.random.default_rng(1).integers(0, 97, 500), 24)
    results = [evaluate_windows(model, windows, counter([1] * 97), size) for size in (1, 3, 21, 0)]
    for result in results:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-4)
    assert results[0] == evaluate_windows(
        model, windows, counter([1] * 97), 1
    )  # repeatable exactly


def test_long_sums_lose_nothing() -> None:
    """The sum of ten million predictions of one token would be off by percents in fp32."""
    model = Markov(torch.zeros(2, 2), max_seq_len=1000)
    window = torch.zeros(1001, dtype=torch.int64)
    got = evaluate_windows(model, (window for _ in range(10_000)), lambda _: 1000, 100)
    assert got.tokens == 10**7
    assert got.loss == pytest.approx(float(np.log(np.float32(2))), rel=1e-7)


@pytest.mark.parametrize("windows", [[], [torch.tensor([1])], [torch.tensor([0, 0])]])
def test_nothing_to_predict_is_an_error(windows: list[Tensor]) -> None:
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate_windows(Markov(torch.zeros(2, 2)), windows, counter([0, 1]))


def test_mode_and_gradients_are_restored_after_an_error_too() -> None:
    model = Markov(torch.zeros(2, 2)).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def fail_inside() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_weights_are_quantized_once_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(ModelConfig(depth=1, d_model=64, vocab_size=97, max_seq_len=24))
    windows = windows_of(np.random.default_rng(1).integers(0, 97, 241), 24)
    expected = evaluate_windows(model, windows, counter([1] * 97), 2)
    quantized = []
    plain = bitnet.quant.absmean_ternary
    monkeypatch.setattr(
        bitnet.quant, "absmean_ternary", lambda w, *rest: (quantized.append(w), plain(w, *rest))[1]
    )
    assert evaluate_windows(model, windows, counter([1] * 97), 2) == expected
    assert len(quantized) == 7  # and not once for each of the 5 batches
    with pytest.raises(RuntimeError, match=r"weight: changed inside"), evaluation_mode(model):
        quantized[0].mul_(2)


TEXTS = ["x", "the end", "def main() -> None:\n" * 30, "naïve 😀 日本語\n" * 9]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_predicted_once_and_whole(tokenizer: Tokenizer, text: str) -> None:
    model = Markov(torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size))
    got = evaluate_text(model, tokenizer, text, batch_size=3)
    ids = tokenizer.encode(text)
    assert got.tokens == len(ids)
    assert got.bytes == len(text.encode())
    bits = math.log2(tokenizer.vocab_size)
    assert got.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(bits * len(ids) / len(text.encode()), rel=1e-6)
    seen = torch.cat([batch.flatten() for batch in model.inputs]).tolist()
    assert seen == [tokenizer.eos_id, *ids[:-1]]


def test_text_and_windows_agree(tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    size = tokenizer.vocab_size
    model = Markov(torch.randn(size, size, generator=generator))
    ids = np.array([tokenizer.eos_id, *tokenizer.encode(TEXTS[2])])
    by_windows = evaluate_windows(model, windows_of(ids, 16), tokenizer.count_bytes)
    by_text = evaluate_text(model, tokenizer, TEXTS[2])
    words = len(TEXTS[2].split())
    assert by_text.nats_per_word == pytest.approx(by_windows.loss * by_windows.tokens / words)
    assert by_text._replace(nats_per_word=by_windows.nats_per_word) == by_windows


def test_a_split_counts_every_token_and_exactly_its_bytes(tokenizer: Tokenizer) -> None:
    """Documents as shards hold them: their tokens, then the end-of-document token."""
    eos, size = tokenizer.eos_id, tokenizer.vocab_size
    texts = ["the end", "naïve 😀 of the thing\n" * 3, "x"]
    ids = np.array([token for text in texts for token in [*tokenizer.encode(text), eos]])
    split = SimpleNamespace(n_tokens=len(ids), eos_id=eos, tokens=lambda a, b: ids[a:b])
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    windows = sequential_windows(cast(TokenDataset, split), 16)
    got = evaluate_windows(Markov(table), windows, tokenizer.count_bytes)
    assert got.tokens == len(ids)
    assert got.bytes == sum(len(text.encode()) for text in texts)
    log_p = table.double().log_softmax(-1)
    nats = -float(log_p[[eos, *ids[:-1]], ids].sum())
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / got.bytes, rel=1e-6)


def test_text_mistakes_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="empty"):
        evaluate_text(Markov(torch.zeros(300, 300)), tokenizer, "")
    with pytest.raises(UserError, match="the model only 5"):
        evaluate_text(Markov(torch.zeros(5, 5)), tokenizer, "x")


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.0, 1.0), (math.log(20), 20.0), (1e4, math.inf), (math.inf, math.inf)]
)
def test_perplexity_is_the_exponential_of_the_loss(loss: float, expected: float) -> None:
    assert EvalResult(loss, 1.0, 1, 1).perplexity == pytest.approx(expected)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    table = torch.full((2, 2), math.nan)
    got = evaluate_windows(Markov(table), [torch.tensor([0, 1])], counter([1, 1]))
    assert math.isnan(got.loss)
    assert math.isnan(got.perplexity)
    assert math.isnan(got.bits_per_byte)


@pytest.mark.parametrize("program", ["gzip", "xz"])
@pytest.mark.parametrize("make", [lambda text: text, lambda text: text[:1]], ids=["file", "byte"])
def test_compressors_are_the_command_line_ones(
    program: str, make: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    text = make(Path(__file__).read_bytes())
    (tmp_path / "text").write_bytes(text)
    packed = subprocess.run([program, "-9", "-c", tmp_path / "text"], capture_output=True).stdout
    # gzip notes the file's name ("text" and a zero byte); its zlib may be another version
    size = len(packed) - (5 if program == "gzip" else 0)
    got = compressor_baselines(text)[f"{program} -9"] * len(text) / 8
    assert got == pytest.approx(size, rel=2e-3, abs=1e-6)


def test_compressing_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="empty"):
        compressor_baselines(b"")


@pytest.mark.parametrize("fields", [{"every": 0}, {"max_tokens": -1}, {"sample_prompt": 3}])
def test_config_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvalConfig(**fields)
