"""lm-evaluation-harness on a model of ours and on a transformers model of the same weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet.export.folder import save_model
from bitnet.export.hf import load_hf
from bitnet.harness import Harness, model_class, run_tasks
from bitnet.schema import UserError
from tests.helpers.hf_folder import TEXT, llama, tokenizer_json, transformers, write
from tests.helpers.model_folders import make

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[eval]"')
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

QUESTIONS = [
    {"question": "To be or not", "choices": [" to be", " be", " the question"], "answer": 0},
    {"question": "that is the", "choices": [" question", " nobler — naïve"], "answer": 1},
    {"question": "", "choices": ["to be", "café"], "answer": 0},
    {"question": "whether 'tis " * 20, "choices": [" nobler", " to be"], "answer": 1},
    {"question": "to ", "choices": ["be", "x"], "answer": 0},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} to be",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["e "], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
OPTIONS = {"until": ["e "], "max_gen_toks": 9, "do_sample": False}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    for name, task in TASKS.items():
        source = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(source | task), encoding="utf-8")
    return folder


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same weights and tokens in our class and in lm_eval's for transformers."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, processors

    folder = write(llama(), tmp_path_factory.mktemp("llama"))
    model, tokenizer = load_hf(folder)
    assert tokenizer.eos_id == 2
    backend = Tokenizer.from_str(tokenizer_json().decode())
    end = "<|im_end|>"  # token 2
    backend.post_processor = processors.TemplateProcessing(f"{end} $A", special_tokens=[(end, 2)])
    backend.encode_special_tokens = True
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end
    )
    # its cache takes "" + "to be" and "to" + " be" for one request and scores one of them wrongly
    options = {"batch_size": 2, "max_length": 64, "logits_cache": False}
    hf = HFLM(pretrained=llama(), tokenizer=theirs, **options)
    return model_class()(model, tokenizer), hf


def test_answers_have_the_same_log_likelihoods(pair: tuple[Any, Any]) -> None:
    arguments = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]  # type: ignore[attr-defined]
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", arguments)) for lm in pair)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (log_p, _), (expected, _) in zip(ours, theirs, strict=True):
        assert log_p == pytest.approx(expected, abs=1e-3)


def test_whole_texts_have_the_same_log_likelihood(pair: tuple[Any, Any]) -> None:
    """lm_eval's class also predicts the first token of its tokenizer, here the end of document, so
    its tokenizer puts none before the text; the prefix that predicts the text is the same."""
    ours, theirs = pair
    texts = [(TEXT,), (TEXT * 3,), ("a",), ("",)]
    mine = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    usual, theirs.add_bos_token = theirs.add_bos_token, False
    try:
        want = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts[:3]))
    finally:
        theirs.add_bos_token = usual
    assert mine == pytest.approx([*want, 0.0], abs=1e-2)


def test_generated_texts_are_the_same(pair: tuple[Any, Any]) -> None:
    prompts = [(text, dict(OPTIONS)) for text in ("to be", "that", TEXT * 3, "né")]
    prompts += [("whether", {"max_gen_toks": 5, "until": []})]
    ours, theirs = (lm.generate_until(instances("generate_until", prompts)) for lm in pair)
    assert ours == theirs
    assert any(ours)


def test_a_local_task_gives_the_same_numbers(
    pair: tuple[Any, Any], tasks: Path, tmp_path: Path
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["local_choice", "local_write"]
    ours, theirs = (
        lm_eval.simple_evaluate(
            lm,
            tasks=names,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )["results"]
        for lm in pair
    )
    for name in names:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, abs=1e-3), metric


def test_a_model_is_known_by_its_name_and_loads_a_folder(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    model, tokenizer = load_hf(write(llama(), tmp_path / "hf"))
    save_model(tmp_path / "model", model, tokenizer)
    model_class()
    known = get_model("bitnet")
    arguments = f"pretrained={tmp_path / 'model'},device=cpu"
    lm = known.create_from_arg_string(arguments, {"batch_size": 3, "max_batch_size": None})
    assert lm.tok_encode("to") == [2, *tokenizer.encode("to")]
    assert lm.eot_token_id == lm.prefix_token_id == 2


def test_bitnet_eval_runs_a_task(
    bitnet: Callable[..., tuple[int, str, str]], tasks: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_hf(write(llama(), tmp_path / "hf"))
    folder = save_model(tmp_path / "model", model, tokenizer)
    args = ("eval", folder, "--include-path", tasks, "--limit", "3", "--tasks")
    code, out, err = bitnet(*args, "local_choice,local_text")
    assert code == 0, err
    for words in ("local_choice", "acc_norm", "local_text", "word_perplexity", "bits_per_byte"):
        assert words in out
    (tasks / "questions.jsonl").rename(tasks / "gone.jsonl")
    try:
        code, _, err = bitnet(*args, "local_write")
    finally:
        (tasks / "gone.jsonl").rename(tasks / "questions.jsonl")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: --tasks local_write: ")


def test_what_the_engine_does_not_have_is_an_error() -> None:
    model, tokenizer = make(), None
    harness = Harness(model, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"generation_kwargs: num_beams: is not supported"):
        harness.generate(["a"], {"num_beams": 2})
    with pytest.raises(UserError, match=r"temperatur: .*; did you mean temperature\?"):
        harness.generate(["a"], {"temperatur": 2})
    with pytest.raises(UserError, match="32 new tokens leave no room for a prompt in the model's"):
        harness.generate(["a"], {"max_gen_toks": 32})
    with pytest.raises(UserError, match="an answer of 33 tokens exceeds the model's context of 32"):
        harness.score([([1], [2] * 33)])


@pytest.mark.slow
def test_an_unknown_task_is_an_error_that_names_the_nearest(
    pair: tuple[Any, Any], tasks: Path
) -> None:
    """lm_eval reads all of its task files for it."""
    inner = pair[0]._harness
    for wrong, right in {"local_choise": "local_choice", "helaswag": "hellaswag"}.items():
        said = f"--tasks: lm_eval has no task '{wrong}'; did you mean {right}\\?"
        with pytest.raises(UserError, match=said):
            run_tasks(inner.model, inner.tokenizer, [wrong], tasks)
