"""train.py on a mixture: the same losses after a stop, and numbers for each source."""

import json
import random
from pathlib import Path

import pytest

from bitnet.config import load_config
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load
from bitnet.schema import UserError
from bitnet.summary import tables
from tests.helpers.training_script import Run, exact

WORDS = {"letters": "alpha beta gamma delta epsilon zeta", "numbers": "uno dos tres quatro cinco"}


@pytest.fixture
def sources(tmp_path: Path) -> str:
    """data.sources: 1 part of letters to 3 of numbers, which have little text."""
    tables = []
    for name, words in WORDS.items():
        rng = random.Random(name)
        rows = [
            json.dumps({"text": " ".join(rng.choices(words.split(), k=30))})
            for _ in range(400 if name == "letters" else 40)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        weight = 1 if name == "letters" else 3
        file = tmp_path / f"{name}.jsonl"
        tables.append(f'{{name = "{name}", texts = ["{file}"], weight = {weight}}}')
    return f"data.sources=[{', '.join(tables)}]"


def test_a_mixture_is_trained_on_and_measured_apart(
    run: Run, sources: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = (sources, f"data.path={tmp_path}/mix", "run.name=mixed")
    rows = run(*mixed, "train.steps=80", "eval.every=40")
    out = capsys.readouterr().out
    assert "letters: 25.0% of the sequences" in out
    assert "numbers: 75.0% of the sequences" in out
    assert "warning: data.sources: numbers is read " in out
    assert "letters is read" not in out

    last = [row for row in rows if "val_loss" in row][-1]
    model, tokenizer = load(tmp_path / "mixed" / "model")
    for name, words in WORDS.items():
        part = TokenDataset(tmp_path / "mix" / name, "val")
        windows = sequential_windows(part, 32)
        alone = evaluate_windows(model, windows, tokenizer.count_bytes)
        assert last[f"val_loss/{name}"] == pytest.approx(alone.loss, abs=1e-6)
        assert last[f"val_bpb/{name}"] == pytest.approx(alone.bits_per_byte, abs=1e-6)
        assert words.split()[0] in tokenizer.decode(part.tokens(0, 300).tolist())
        n_windows = (TokenDataset(tmp_path / "mix" / name, "train").n_tokens - 1) // 32
        drawn = 80 * 8 * (0.25 if name == "letters" else 0.75)
        assert last[f"epochs/{name}"] == pytest.approx(drawn / n_windows, abs=1 / n_windows)
    expected = 0.25 * last["val_loss/letters"] + 0.75 * last["val_loss/numbers"]
    assert last["val_loss"] == pytest.approx(expected)
    assert f"numbers {last['val_loss/numbers']:.4f}, " in out

    (table,) = [
        t for t in tables(load_config([tmp_path / "mixed/config.toml"])) if t.title == "Mixture"
    ]
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["letters", "numbers"]
    assert columns[2] == ["25.00%", "75.00%"]
    assert columns[3] == ["5.12k", "15.36k"]


def test_a_mixture_resumes_exactly_and_does_not_change(
    run: Run, sources: str, tmp_path: Path
) -> None:
    mixed = (sources, f"data.path={tmp_path}/mix", "train.steps=20", "eval.every=20")
    straight = run(*mixed, "run.name=straight")
    run(*mixed, "run.name=parts", "checkpoint.every=7")
    last = tmp_path / "parts" / "checkpoints" / "step_00000020"
    (last / "manifest.json").unlink()  # as if killed before it was whole
    resumed = run(*mixed, "run.name=parts", "checkpoint.every=7")
    assert exact(resumed) == exact(straight)
    other = sources.replace("weight = 3", "weight = 2")
    with pytest.raises(UserError, match=r"holds a run with another config: data\.sources: "):
        run(other, *mixed[1:], "run.name=parts")
