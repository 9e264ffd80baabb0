"""Importing GGUF: the same logits and tokens as the model it was made from, or a refusal."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.export.gguf_vocab import _SPLITS
from bitnet.export.hf import load_hf
from bitnet.export.source import load_source
from bitnet.schema import UserError
from tests.helpers.gguf_file import (
    CONTEXT,
    HEADS,
    KV,
    LAYERS,
    VOCAB,
    D,
    Fields,
    bytes_to_marks,
    gguf,
    model,
    tensors,
    vocabulary,
    write,
)

regex = pytest.importorskip("regex")
pytest.importorskip("tokenizers")

TEXT = (
    "to be or not to be, that's it: naïve café 1234 ²½ don't DON'T\n\n  x = 10_000\t// 漢字テスト"
)


def fails(path: Path, message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        load_source(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def test_the_same_weights_and_logits(tmp_path: Path) -> None:
    """fp32 to the last bit; a vocabulary without <|endoftext|> gets no token that it has not."""
    loaded, tokenizer = load_hf(write(tmp_path / "model.gguf"))
    for name, tensor in model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config == model().config.resolve()
    tokens = torch.randint(VOCAB, (2, 20))
    assert torch.equal(loaded(tokens), model()(tokens))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (VOCAB, VOCAB - 2)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantized_weights_are_dequantized(tmp_path: Path, kind: str) -> None:
    loaded, _ = load_hf(write(tmp_path / "model.gguf", kind=kind))
    quantized = gguf.GGMLQuantizationType[kind]
    plain = tensors()["blk.1.ffn_up.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(plain, quantized), quantized)
    assert np.array_equal(loaded.state_dict()["layers.1.mlp.up_proj.weight"].numpy(), expected)


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """Another reader of the same file: its names, its order of rows."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ours, _ = load_hf(tmp_path / "model.gguf")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name.removeprefix("model.")], tensor), name


def as_qwen2(keys: Fields) -> None:
    keys["general.architecture"] = "qwen2"
    for key in [key for key in keys if key.startswith("llama.")]:
        keys[f"qwen2.{key.removeprefix('llama.')}"] = keys.pop(key)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@torch.no_grad()
def test_qwen2_with_its_biases(tmp_path: Path, kind: str) -> None:
    """Rows of q_proj and k_proj are not interleaved there; transformers is another reader."""
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    rows = {"attn_q": D, "attn_k": D // HEADS * KV, "attn_v": D // HEADS * KV}
    more = {
        f"blk__{i}__{part}__bias": generator.normal(size=n).astype(np.float32)
        for i in range(LAYERS)
        for part, n in rows.items()
    }
    path = write(tmp_path / "model.gguf", as_qwen2, kind, **more)
    ours, _ = load_hf(path)
    assert ours.config.qkv_bias
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    state = {n.removeprefix("model."): t for n, t in theirs.state_dict().items()}
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.randint(VOCAB, (2, 20))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    fails(write(tmp_path / "none.gguf", as_qwen2), "missing tensor .*q_proj.bias")
    more["blk__1__attn_output__bias"] = np.zeros(D, np.float32)
    other = write(tmp_path / "more.gguf", as_qwen2, **more)
    fails(other, "unexpected tensor .*attn_output.bias")


def test_a_tied_head_and_padding(tmp_path: Path) -> None:
    """Without output.weight the head is the embedding; unused tokens at the end are dropped."""

    def padded(keys: Fields) -> None:
        keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "[PAD0]", "[PAD1]"]
        keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 5, 5]
        keys["llama.vocab_size"] = VOCAB + 2

    wider = np.concatenate([tensors()["token_embd.weight"], np.ones((2, D), np.float32)])
    more = {"output__weight": None, "token_embd__weight": wider}
    loaded, tokenizer = load_hf(write(tmp_path / "model.gguf", padded, **more))
    assert loaded.config.vocab_size == tokenizer.vocab_size == VOCAB
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert np.array_equal(loaded.lm_head.weight.detach().numpy(), wider[:VOCAB])


def merged(word: str, whole_words: bool) -> list[int]:
    """Byte pair encoding of one word, the textbook loop."""
    tokens, merges = vocabulary()
    parts = [bytes_to_marks()[b] for b in word.encode()]
    if whole_words and "".join(parts) in tokens:
        return [tokens.index("".join(parts))]
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(zip(parts, parts[1:])))  # noqa: B905, RUF007
        if rank == 10**9:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [tokens.index(part) for part in parts]


def split(text: str, expressions: tuple[str, ...]) -> list[str]:
    """llama.cpp's unicode_regex_split: each expression cuts its matches out of every part."""
    parts = [text]
    for expression in expressions:
        pieces = []
        for part in parts:
            at = 0
            for match in regex.finditer(expression, part):
                pieces += [part[at : match.start()], match[0]]
                at = match.end()
            pieces.append(part[at:])
        parts = [piece for piece in pieces if piece]
    return parts


# As llama.cpp spells them (src/llama-vocab.cpp), not as this project does.
_CPP_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CPP_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CPP = {
    "gpt-2": (_CPP_GPT2,),
    "smollm": (r"\p{N}", _CPP_GPT2),
    "llama-bpe": (_CPP_LLAMA3,),
    "dbrx": (_CPP_LLAMA3,),
    "qwen2": (_CPP_LLAMA3.replace("{1,3}", ""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _CPP_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}


@pytest.mark.parametrize("pre", CPP)
def test_text_is_split_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    path = write(tmp_path / "model.gguf", lambda keys: keys.update({"tokenizer.ggml.pre": pre}))
    _, tokenizer = load_hf(path)
    rng = random.Random(0)
    alphabet = TEXT + " \t\r\n'  sStTdD09½²漢字é_-=<>$~"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(200)]
    for text in (TEXT, *texts):
        words = split(text, CPP[pre])
        expected = [token for word in words for token in merged(word, pre == "llama-bpe")]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text


def test_the_key_for_splitting(tmp_path: Path) -> None:
    """Every name that is known loads; another is refused by name; a file without one is old."""
    path = tmp_path / "model.gguf"
    for pre in ("deepseek-llm", "falcon", "kimi-k2", "smolm", "gpt2", "x" * 10_000):
        write(path, lambda keys, pre=pre: keys.update({"tokenizer.ggml.pre": pre}))  # type: ignore[misc]
        message = fails(path, r"tokenizer\.ggml\.pre = '.*: how it splits text is not")
        assert len(message) < 700
        assert "llama-bpe" in message
    write(path, lambda keys: keys.pop("tokenizer.ggml.pre"))
    tokenizer = load_hf(path)[1]
    write(path)
    assert tokenizer.encode(TEXT) == load_hf(path)[1].encode(TEXT)
    for pre in _SPLITS:
        from bitnet.data.tokenizer_json import JsonTokenizer

        content = json.loads(tokenizer.model_bytes)
        steps = [
            {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
            for r in _SPLITS[pre]
        ]
        content["pre_tokenizer"]["pretokenizers"][:-1] = steps
        known = JsonTokenizer(path, json.dumps(content).encode())
        assert known.decode(known.encode(TEXT)) == TEXT


def test_several_end_tokens_are_kept_and_unknown_ones_refused(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": VOCAB - 1, "tokenizer.ggml.eom_token_id": VOCAB - 3}
    _, tokenizer = load_hf(write(tmp_path / "model.gguf", lambda keys: keys.update(ends)))
    assert tokenizer.eos_id == VOCAB - 2
    assert set(tokenizer.eos_ids) == {VOCAB - 1, VOCAB - 2, VOCAB - 3}
    for end in (5, -1, VOCAB, 2**40):
        path = write(
            tmp_path / "model.gguf",
            lambda keys, end=end: keys.update({"tokenizer.ggml.eot_token_id": end}),  # type: ignore[misc]
        )
        fails(path, r"tokenizer\.ggml\.eot_token_id = \S+ is none of its control tokens")


def test_a_number_of_the_maths_that_llama_cpp_needs_too(tmp_path: Path) -> None:
    """llama.cpp refuses a file without rms_epsilon; a guess would change the logits a little."""
    key = "llama.attention.layer_norm_rms_epsilon"
    fails(write(tmp_path / "model.gguf", lambda f: f.pop(key)), f"has no {key}")


EXTRA = np.ones((D, D), np.float32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"blk__2__attn_q__weight": EXTRA}, r"unexpected tensor blk\.2\.attn_q\.weight"),
        ({"blk__0__attn_q_norm__weight": EXTRA[0]}, "unexpected tensor blk.0.attn_q_norm.weight"),
        ({"blk__0__ffn_gate_exps__weight": EXTRA}, "unexpected tensor blk.0.ffn_gate_exps.weight"),
        ({"blk__00__attn_q__weight": EXTRA}, r"unexpected tensor blk\.00\.attn_q\.weight"),
        ({"cls__weight": EXTRA}, r"unexpected tensor cls\.weight"),
        ({"blk__0__attn_q__bias": EXTRA[0]}, r"has biases \(blk\.0\.attn_q\.bias\)"),
        ({"rope_freqs__weight": EXTRA[0]}, "rope_freqs.weight: scaled rotary"),
        ({"blk__1__ffn_up__weight": None}, r"missing tensor .*layers\.1\.mlp\.up_proj"),
        (
            {"blk__1__ffn_up__weight": EXTRA},
            r"tensor blk\.1\.ffn_up\.weight is \[32, 32\]; .* \[64",
        ),
        ({"blk__1__attn_q__weight": EXTRA.astype(np.int32)}, "is I32; expected a float weight"),
        ({"blk__1__attn_q__weight": EXTRA.astype(np.float64)}, r"attn_q\.weight: cannot be read"),
        ({"output_norm__weight": EXTRA[0] * np.nan}, r"output_norm\.weight holds NaN"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_tensors_that_our_model_has_not(tmp_path: Path, more: Fields, message: str) -> None:
    fails(write(tmp_path / "model.gguf", **more), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 1, r"unexpected tensor blk\.1\."),
        ("llama.block_count", 3, r"missing tensor .*layers\.2\."),
        ("llama.block_count", 10**9, r"missing tensor .*layers\.2\."),
        ("llama.block_count", 2**63, r"block_count: cannot be read"),
        ("llama.block_count", 0, r"block_count: cannot be read: is 0"),
        ("llama.block_count", -1, r"block_count: cannot be read: is -1"),
        ("llama.block_count", "2", r"block_count: cannot be read: expected int"),
        ("llama.block_count", True, r"block_count: cannot be read: expected int"),
        ("llama.block_count", [2, 2], r"block_count: cannot be read: expected int"),
        ("llama.block_count", None, r"has no llama\.block_count"),
        ("llama.embedding_length", 2**24, r"heads|rope\.dimension_count"),
        ("llama.feed_forward_length", 2**30, r"ffn_gate\.weight is"),
        ("llama.vocab_size", 2**24 + 1, r"token_embd\.weight is"),
        ("llama.attention.head_count", 0, "head_count: cannot be read"),
        ("llama.attention.head_count_kv", 3, "3 key-value heads for 4 heads"),
        ("llama.attention.head_count_kv", [2, 2], "head_count_kv: cannot be read"),
        ("llama.context_length", 2**30, "max_seq_len: .* less than or equal"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon: cannot be read"),
        ("llama.rope.freq_base", float("inf"), "freq_base: cannot be read"),
        ("llama.rope.freq_base", "x", "freq_base: cannot be read"),
        ("llama.rope.dimension_count", 4, "rope.dimension_count = 4"),
        ("llama.attention.key_length", 16, "key_length = 16"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type = 'yarn', scaled rotary positions"),
        ("llama.rope.scaling.factor", 2.0, "rope.scaling.factor"),
        ("llama.rope.scaling.type", "linear", "rope.scaling.type = 'linear'"),
        ("llama.attention.sliding_window", 32, "sliding_window = 32"),
        ("llama.expert_count", 8, "llama.expert_count = 8"),
        ("llama.logit_scale", 0.5, "llama.logit_scale = 0.5"),
        ("llama.final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("general.architecture", "qwen3", "'qwen3' cannot be imported; the nearest .* is 'qwen2'"),
        ("general.type", "adapter", "GGUF of type 'adapter', not a model"),
        ("split.count", 3, "one part of several"),
        ("tokenizer.ggml.model", "bert", "only 'llama' .sentencepiece. and 'gpt2' .* supported"),
        ("tokenizer.ggml.model", "llama", "has no tokenizer.ggml.scores"),
        ("tokenizer.ggml.tokens", None, "has no tokenizer.ggml.tokens"),
        ("tokenizer.ggml.merges", None, "has no tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", ["a b c"], "damaged|cannot be read"),
        ("tokenizer.ggml.merges", ["zz yy"], "damaged|cannot be read"),
        ("tokenizer.ggml.tokens", [1, 2], "expected an array of strings"),
        ("tokenizer.ggml.token_type", [1, 2], "not as many as there are tokens"),
    ],
)
def test_keys_that_our_model_has_not(tmp_path: Path, key: str, value: Any, message: str) -> None:
    def change(keys: Fields) -> None:
        keys[key] = value
        if value is None:
            del keys[key]

    fails(write(tmp_path / "model.gguf", change), message)


def test_neutral_keys_are_accepted(tmp_path: Path) -> None:
    neutral = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 1.0,
        "llama.attention.sliding_window": CONTEXT,
        "llama.attention.causal": True,
        "llama.attention.key_length": D // HEADS,
        "general.type": "model",
        "general.name": "a model",
    }
    load_hf(write(tmp_path / "model.gguf", lambda keys: keys.update(neutral)))


def test_the_other_byte_order(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", EXTRA)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fails(tmp_path / "big.gguf", "byte order")
