"""lm-evaluation-harness on a ternary model and on its Hugging Face export: the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.export.facts import Facts
from bitnet.export.hf_write import save_hf
from bitnet.generate import encode_prompt
from bitnet.harness import model_class
from tests.helpers.hf_export import (
    TEXT,
    far_from_ties,
    load_theirs,
    tokenizer,
    trained,
    transformers,
)
from tests.helpers.model_folders import packed

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[eval]"')
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and lm_eval, about themselves


@pytest.mark.parametrize("kind", ["online", "packed"])
def test_a_local_task_gives_the_same_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokens = trained(20), tokenizer(tmp_path)
    words = TEXT.split()
    documents = []
    for i in range(40):
        text, end = " ".join(words[i : i + 1 + i % 7]), f" {words[i + 1 + i % 7]}"
        ids = torch.tensor([encode_prompt(tokens, text + end)])
        if bool(far_from_ties(model, ids)):  # else an int8 code may differ, and the logits with it
            documents.append({"text": text, "end": end})
    assert len(documents) > 3
    (tmp_path / "tasks").mkdir()
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (tmp_path / "tasks" / "words.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": "local_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks" / "words.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "tasks" / "words.yaml").write_text(json.dumps(task), encoding="utf-8")

    save_hf(model, tokens, tmp_path / "hf", kind, Facts("model"))
    ours = model_class()(packed(model) if kind == "packed" else model, tokens)
    with torch.compiler.set_stance("force_eager"):
        theirs = HFLM(
            pretrained=load_theirs(tmp_path / "hf"),
            tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
            batch_size=4,
            max_length=96,
        )
        results: list[dict[str, Any]] = [
            lm_eval.simple_evaluate(
                lm,
                tasks=["local_words"],
                task_manager=TaskManager(
                    include_path=str(tmp_path / "tasks"), include_defaults=False
                ),
                bootstrap_iters=0,
            )["results"]["local_words"]
            for lm in (ours, theirs)
        ]
    for metric in ("perplexity,none", "acc,none"):
        assert results[0][metric] == pytest.approx(results[1][metric], rel=1e-3), metric
    assert results[0]["perplexity,none"] > 1
