"""llama.cpp runs what we export: our token ids, our logits. Needs `pip install -e .[peers]`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.export.gguf_write import save_gguf
from bitnet.export.hf import load_hf
from bitnet.linear import TernaryLinear, pack
from bitnet.model import Transformer, as_transformer
from tests.helpers.gguf_file import write as write_byte_level
from tests.helpers.gguf_models import model

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -e .[peers]")
TEXT = (Path(__file__).parents[2] / "bitnet" / "model.py").read_text()
VOCAB, CONTEXT = 512, 512
PROBES = (
    "",
    " ",
    "   ",
    "to be",
    " to be",
    "two  spaces   three",
    "trailing space ",
    "\n",
    "\n\n\ttab\t",
    "a\r\nb",
    "    def __init__(self, x: int) -> None:\n        return x\n",
    "1234567890 3.14e-5",
    "naïve café",
    "\U0001f600 \U0001f468‍\U0001f469‍\U0001f467",
    "漢字テスト",
    "e\u0301 ﬁ \u3000",
    "\x00\x01\x7f",
    "<s> [INST] <unk>",
    "x" * 300,
    "<|endoftext|>",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], VOCAB, tmp_path_factory.mktemp("t") / "tokenizer.model", 1)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    llama = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=1, verbose=False, **options
    )
    try:
        yield llama
    finally:
        llama.close()


def their_logits(path: Path, tokens: Tensor) -> Tensor:
    """Of each position of each row."""
    with opened(path, logits_all=True) as llama:
        rows = []
        for row in tokens:
            llama.reset()
            llama.eval(row.tolist())
            rows.append(torch.from_numpy(llama.scores[: len(row)].copy()))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def made() -> Transformer:
    return model(vocab_size=VOCAB, max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))


class WithoutRounding(torch.nn.Module):
    """A packed layer whose activations are not quantized, as in llama.cpp's float matrices."""

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.weight = layer.codes().float() * layer.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["sub_norm", "pre_norm"])
def test_float_matrices_give_the_logits_of_the_same_maths(
    tmp_path: Path, own: Tokenizer, tokens: Tensor, placement: str
) -> None:
    """Within what keys and values in fp16 round: a wrong order of rows, scale, angle, norm or
    activation moves logits by their own size."""
    ours = model(vocab_size=VOCAB, max_seq_len=CONTEXT, norm_placement=placement)
    theirs = their_logits(save_gguf(ours, own, tmp_path / "f32.gguf", "f32"), tokens)
    for name, module in list(ours.named_modules()):
        if isinstance(module, TernaryLinear):
            ours.set_submodule(name, WithoutRounding(module))
    exact = ours(tokens)
    assert float((exact - theirs).abs().max()) < 0.01 * float(exact.std())
    prompt = [own.eos_id, *own.encode("def ")]
    with opened(tmp_path / "f32.gguf") as llama:  # as a server does it
        made = llama.create_completion("def ", max_tokens=1, temperature=0)
    assert made["usage"]["prompt_tokens"] == len(prompt)
    likeliest = int(ours(torch.tensor([prompt]))[0, -1].argmax())
    text = own.decode([*prompt, likeliest])
    assert text.startswith("def " + made["choices"][0]["text"])  # which leaves half a character out


@torch.no_grad()
def test_packed_matrices_agree_but_for_the_rounding_of_activations(
    tmp_path: Path, own: Tokenizer, made: Transformer, tokens: Tensor
) -> None:
    """llama.cpp rounds activations to int8 in blocks of 256, we by token. Both types of matrix hold
    the same numbers, so their logits are equal."""
    ours = made(tokens)
    found = {
        kind: their_logits(save_gguf(made, own, tmp_path / kind, kind), tokens)
        for kind in ("tq2_0", "tq1_0")
    }
    assert torch.equal(found["tq1_0"], found["tq2_0"])
    assert float((ours - found["tq2_0"]).square().mean().sqrt()) < 0.05 * float(ours.std())


@pytest.mark.slow
def test_a_trained_model_predicts_the_same_tokens(tmp_path: Path, own: Tokenizer) -> None:
    trained = model(packed=False, vocab_size=VOCAB, max_seq_len=CONTEXT)
    ids = torch.tensor(own.encode(TEXT * 2))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=4e-3)
    for _ in range(60):
        windows = torch.stack([ids[i : i + 65] for i in torch.randint(len(ids) - 65, (8,))])
        loss = trained(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 5  # a uniform guess has log 512 = 6.24
    packed = as_transformer(pack(trained)).eval()
    tokens = ids[:2000].reshape(4, 500)
    theirs = {
        kind: their_logits(save_gguf(packed, own, tmp_path / kind, kind), tokens)
        for kind in ("tq2_0", "tq1_0")
    }
    assert torch.equal(theirs["tq1_0"], theirs["tq2_0"])
    with torch.no_grad():
        ours = packed(tokens)
    agree = (ours.argmax(-1) == theirs["tq2_0"].argmax(-1)).float().mean()
    assert agree.item() >= 0.95, agree


def test_a_text_has_our_ids(tmp_path: Path, own: Tokenizer, made: Transformer) -> None:
    with opened(save_gguf(made, own, tmp_path / "model.gguf"), vocab_only=True) as llama:
        for text in PROBES:
            assert llama.tokenize(text.encode(), add_bos=False) == own.encode(text), text
            dressed = llama.tokenize(text.encode(), add_bos=True)
            assert dressed == [own.eos_id, *own.encode(text)], text
        assert llama.token_eos() == llama.token_bos() == own.eos_id


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_a_text_has_our_ids_in_bytes(tmp_path: Path, pre: str) -> None:
    """Of a byte-level vocabulary, as it was imported: with its merges and its way to split."""
    pytest.importorskip("tokenizers")
    source = write_byte_level(
        tmp_path / "source.gguf", lambda keys: keys.update({"tokenizer.ggml.pre": pre})
    )
    tokenizer = load_hf(source)[1]
    ours = model(vocab_size=tokenizer.vocab_size)
    path = save_gguf(ours, tokenizer, tmp_path / "model.gguf")
    again = load_hf(path)[1]
    assert again.eos_ids == tokenizer.eos_ids
    with opened(path, vocab_only=True) as llama:
        for text in PROBES:
            expected = tokenizer.encode(text)
            assert again.encode(text) == expected, text
            assert llama.tokenize(text.encode(), add_bos=False) == expected, text
