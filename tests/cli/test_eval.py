"""``bitnet eval`` on a text, called as from a shell."""

import re
from collections.abc import Callable
from pathlib import Path

from bitnet.evaluate import EvalResult, evaluate_text
from bitnet.export.folder import load
from bitnet.perplexity import sliding_perplexity

Bitnet = Callable[..., tuple[int, str, str]]


def shown(out: str) -> list[str]:
    """The cells of the model's row."""
    (row,) = re.findall(r"model +│(.*)│", out)
    return [cell.strip() for cell in row.split("│")]


def cells(result: EvalResult) -> list[str]:
    numbers = (result.bits_per_byte, result.loss), (result.perplexity, result.word_perplexity)
    return [*(f"{n:.4f}" for n in numbers[0]), *(f"{n:.2f}" for n in numbers[1])]


def test_a_text_by_windows_that_overlap_or_do_not(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    text = (folders / "text.txt").read_text(encoding="utf-8")[:900]
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    args = ("eval", folders / "model", "--text", tmp_path / "short.txt")
    model, tokenizer = load(folders / "model")
    code, out, err = bitnet(*args, "--stride", "16", "--context", "32")
    assert code == 0, err
    sliding = sliding_perplexity(model, tokenizer, text, 16, 32)
    assert shown(out) == cells(sliding)
    assert f"{sliding.tokens:,} tokens predicted" in out
    code, out, err = bitnet(*args, "--context", "20")
    assert code == 0, err
    assert shown(out) == cells(evaluate_text(model, tokenizer, text, context=20))
    code, _, err = bitnet(*args, "--context", "65")
    assert (code, err) == (2, "error: --context 65: the model has a context of 64\n")
    code, _, err = bitnet(*args, "--context", "8", "--stride", "9")
    assert (code, err) == (2, "error: stride: must be 1 to the context of 8, got 9\n")
