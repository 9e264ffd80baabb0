"""A small trained model to export, the export as loaded by transformers, and a BitNet made by
transformers. Not a test module."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import ModelConfig, Transformer
from tests.helpers.hf_folder import edit, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TEXT = "to be or not to be, that is the question: whether 'tis nobler — naïve café\n" * 8
VOCAB = 320


@cache
def tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer([TEXT + "if x:\n    return  1\n"], VOCAB, folder / "tokenizer.model", 1)


@cache
def trained(steps: int = 2, **fields: Any) -> Transformer:
    """A tiny model after a few steps: odd sizes, grouped queries, all norm weights different. With
    more steps it has memorized a text, so that its greedy tokens are far from any tie. It is made
    once: do not change it."""
    shape: dict[str, Any] = {"depth": 2, "d_model": 48, "n_heads": 6, "n_kv_heads": 2}
    shape |= {"d_ff": 76, "vocab_size": VOCAB, "max_seq_len": 96, "rope_theta": 50_000.0}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(shape | fields)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    text = torch.arange(70) * 37 % 97  # no token follows two others
    with torch.enable_grad():
        for _ in range(steps):
            model(text[None, :-1], text[None, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def far_from_ties(model: Transformer, tokens: Tensor) -> Tensor:
    """Rows of the tokens ``[B, T]`` whose activations are all further than 1e-4 from the middle
    between two int8 codes, bool ``[B]``.

    transformers computes x * (127 / max), we compute x / (max / 127): up to 127 codes, each with a
    few roundings of 2^-24, after layers whose results differ equally little. Closer to the middle
    the two may round to different codes, and the logits differ by the precision of int8.
    """
    near = torch.zeros(len(tokens), dtype=torch.bool)

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        codes = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5) * 127
        near.logical_or_(((codes.frac().abs() - 0.5).abs() < 1e-4).flatten(1).any(1))

    layers = [m for m in model.modules() if isinstance(m, BitLinear | TernaryLinear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    assert len(hooks) == 7 * model.config.n_layers
    return ~near


def load_theirs(folder: Path) -> Any:
    """The model as transformers loads it, using only its config."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(theirs: Any, prompt: list[int], count: int) -> list[int]:
    generated = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    new: list[int] = generated[0, len(prompt) :].tolist()
    return new


def spreads(ours: Tensor, theirs: Tensor) -> Tensor:
    """|difference| in standard deviations of ours, in the same shape."""
    return (ours - theirs).abs() / ours.std()


def bitnet(**changes: Any) -> Any:
    """A random BitNetForCausalLM in bf16, with all norm weights different."""
    fields = {k: v for k, v in llama().config.to_dict().items() if k != "model_type"}
    config = transformers.BitNetConfig(**fields | {"hidden_act": "relu2"} | changes)
    torch.manual_seed(0)
    model = transformers.BitNetForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.bfloat16()


def quantized(folder: Path, **fields: Any) -> Path:
    quantization = {"quant_method": "bitnet", **fields}
    edit(folder, lambda config: config.update(quantization_config=quantization))
    return folder
