"""train.py with the documents of a sequence kept apart, from the data to the saved model."""

import math
from pathlib import Path

import pytest
import torch

from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load
from bitnet.schema import UserError
from tests.helpers.training_script import Run


def test_a_run_keeps_documents_apart(
    run: Run, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train.steps=20", "eval.every=20", "run.name=apart")
    rows = run(*options, "data.document_mask=true")
    assert "kept apart" in capsys.readouterr().out
    together = run(*options[:2], "run.name=together")
    assert rows[0]["loss"] != together[0]["loss"]

    model, tokenizer = load(tmp_path / "apart" / "model")
    assert model.document_separator == tokenizer.eos_id
    val = TokenDataset(texts / "prepared", "val")
    windows = sequential_windows(val, 32)
    result = evaluate_windows(model, windows, tokenizer.count_bytes)
    measured = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert result.loss == pytest.approx(measured, abs=1e-6)

    # an oracle that cuts the same windows at the separators and has no mask
    model.document_separator = None
    nats = count = 0.0
    for window in sequential_windows(val, 32):
        begins = [i for i in range(len(window) - 1) if i == 0 or window[i] == tokenizer.eos_id]
        for begin, end in zip(begins, [*begins[1:], len(window) - 1], strict=True):
            with torch.no_grad():
                loss = model(window[None, begin:end], window[None, begin + 1 : end + 1])
            nats, count = nats + float(loss) * (end - begin), count + end - begin
    assert count == val.n_tokens
    assert math.isclose(nats / count, measured, abs_tol=1e-3)

    with pytest.raises(UserError, match=r"data\.document_mask: True -> False"):
        run(*options)
