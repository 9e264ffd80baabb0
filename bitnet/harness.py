"""Evaluate a model folder in lm-evaluation-harness (extra `eval`), under the name "bitnet".

    bitnet eval runs/mine/model-packed --tasks hellaswag,arc_easy --limit 100
    python -m bitnet.harness --model bitnet --model_args pretrained=runs/mine/model-packed \\
        --tasks hellaswag                                    # every option of lm_eval

lm_eval has no entry point for models of other packages: a model class must be registered in the
same process. So plain ``lm_eval --model bitnet`` does not find it. This module, run as above,
registers the class and then runs lm_eval's own command.

A text begins with the end-of-document token, which starts each document in training and each text
of the tokenizer that ``bitnet export --to hf`` writes. Answers are scored in batches sorted by
length (bitnet/scoring.py). :class:`bitnet.Engine` generates texts. If a text is longer than the
context, scoring and generation cut its beginning (as lm_eval's own model does), and perplexity
(``loglikelihood_rolling``) predicts it in several windows.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bitnet.data.tokenizer import Tokenizer
from bitnet.engine.decoder import LARGEST_BATCH
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.export.folder import load
from bitnet.export.source import find_model
from bitnet.generate import encode_prompt
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.schema import UserError, nearest, user_input
from bitnet.scoring import Ending, log_likelihoods

NAME = "bitnet"
_NEW_TOKENS = 256
"""New tokens if a task does not set a number, as in lm_eval's own models."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
_ROWS = 8


class Harness:
    """The functions that lm_eval needs from a model, for token ids. Works without lm_eval.

    Arguments:
        batch_size: sequences per forward; 0 = as memory allows.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 0) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.context = model.config.max_seq_len
        self._engine: Engine | None = None

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log probability of each answer after its question, and whether greedy decoding would
        give the answer.

        Arguments:
            pairs: (question, answer) token ids; a question is not empty.
        Raises:
            UserError: an answer is longer than the context.
        """
        endings = []
        for question, answer in pairs:
            if len(answer) > self.context:
                raise UserError(
                    f"an answer of {len(answer)} tokens exceeds the model's context of "
                    f"{self.context}"
                )
            ids = (question + answer)[-self.context - 1 :]
            endings.append(Ending(torch.tensor(ids, dtype=torch.int64, device="cpu"), len(answer)))
        scores = log_likelihoods(self.model, endings, self.batch_size)
        return [(score.log_p, score.greedy) for score in scores]

    def rolling(self, texts: Iterable[str]) -> list[float]:
        """The log probability of each text. All tokens are predicted, the first one from the
        end-of-document token. Each window fills the context; the last window overlaps the one
        before it, so that its predictions have as much context as fits."""
        pairs, counts = [], []
        for text in texts:
            ids = encode_prompt(self.tokenizer, text)
            begins = range(0, len(ids) - 1, self.context)
            counts.append(len(begins))
            for begin in begins:
                end = min(begin + self.context, len(ids) - 1)
                first = max(0, end - self.context)
                pairs.append((ids[first : begin + 1], ids[begin + 1 : end + 1]))
        scores = iter(self.score(pairs))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Continue texts, until a stop string, the end of the document or the number of tokens.

        Arguments:
            options: a task's ``generation_kwargs``.
        Raises:
            UserError: an option that the engine does not support, or a number of new tokens that
                leaves no room for a prompt.
        """
        for name in options:
            if name not in _GENERATION:
                near = nearest(name, _GENERATION)
                hint = f"; did you mean {near}?" if near else ""
                raise UserError(f"generation_kwargs: {name}: is not supported{hint}")
        given = [int(options[name]) for name in _LENGTHS if options.get(name) is not None]
        count = given[0] if given else _NEW_TOKENS
        room = self.context - count
        if room < 1:
            raise UserError(
                f"generation_kwargs: {count} new tokens leave no room for a prompt in the model's "
                f"context of {self.context}"
            )
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        temperature = float(options.get("temperature") or 0.0)
        params = SamplingParams(
            temperature=temperature if options.get("do_sample", temperature > 0) else 0.0,
            top_k=options.get("top_k") or 0,
            top_p=options.get("top_p") or 1.0,
            eos_id=self.tokenizer.eos_ids,
            stop=[one for one in stop if one],
        )
        ids = [encode_prompt(self.tokenizer, prompt)[-room:] for prompt in prompts]
        texts = [""] * len(ids)

        def add(index: int, text: str) -> None:
            texts[index] += text

        self._get_engine().generate(ids, count, params, on_text=add)
        return texts

    def _get_engine(self) -> Engine:
        """The engine, made when text is first generated."""
        if self._engine is None:
            rows = min(self.batch_size or _ROWS, LARGEST_BATCH)
            self._engine = Engine(self.model, self.tokenizer, max_batch=rows)
        return self._engine


@cache
def model_class() -> type[Any]:
    """The class that lm_eval calls, registered under "bitnet" in this process.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(
            'lm_eval is not installed; the eval extra has it: pip install "bitnet-train[eval]"'
        ) from error

    class BitnetLM(TemplateLM):
        """A model folder, trained or packed.

        Arguments:
            pretrained: the folder, or a :class:`Transformer` together with its ``tokenizer``.
            batch_size: a number, or "auto": as memory allows. max_batch_size: not used.
            device: "auto": a GPU if there is one. kernel: the kernel of packed layers.
        """

        def __init__(
            self,
            pretrained: str | Path | Transformer,
            tokenizer: Tokenizer | None = None,
            batch_size: int | str = "auto",
            max_batch_size: int | None = None,
            device: str = "auto",
            kernel: Kernel = "auto",
        ) -> None:
            super().__init__()
            if isinstance(pretrained, Transformer):
                assert tokenizer is not None
                model = pretrained
            else:
                if device == "auto":
                    device = "cuda" if torch.cuda.is_available() else "cpu"
                model, tokenizer = load(find_model(Path(pretrained)), device, kernel)
            self._device = model.norm.weight.device
            self._harness = Harness(model, tokenizer, _batch_size(batch_size))

        @property
        def eot_token_id(self) -> int:
            """The end-of-document token, which is also the prefix of every text."""
            return self._harness.tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            """The ids of a text, by default after the end-of-document token."""
            tokenizer = self._harness.tokenizer
            if add_special_tokens is False:
                return tokenizer.encode(string)
            return encode_prompt(tokenizer, string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            results = self._harness.score([(context, end) for _, context, end in requests])
            for (texts, _, _), result in zip(requests, results, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, result)
            return results

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """The log probability of each text."""
            return self._harness.rolling(request.args[0] for request in requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Continue each text. Texts with the same options run together, longest first."""
            texts = [""] * len(requests)
            jobs = [(repr(r.args[1]), -len(r.args[0]), i) for i, r in enumerate(requests)]
            for _, group in groupby(sorted(jobs), key=lambda job: job[0]):
                places = [place for _, _, place in group]
                options = requests[places[0]].args[1]
                new = self._harness.generate([requests[i].args[0] for i in places], options)
                for place, text in zip(places, new, strict=True):
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
            return texts

    register_model(NAME)(BitnetLM)
    return BitnetLM


def _batch_size(value: int | str) -> int:
    """Convert lm_eval's ``batch_size`` to ours: "auto" and "auto:4" become 0."""
    if str(value).partition(":")[0] == "auto":
        return 0
    with user_input(f"batch_size: {value!r} is neither a number nor auto"):
        return int(value)


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm_eval.

    Arguments:
        names: tasks or groups. include_path: a folder of more tasks (YAML).
        limit: documents per task; None = all. fewshot: examples before each document; None = the
            task's own number.
    Returns:
        For each task and group, its results as lm_eval has them: "metric,filter" -> number.
    Raises:
        UserError: lm_eval is not installed, an unknown task, a task that fails.
    """
    lm = model_class()(model, tokenizer)
    from lm_eval import simple_evaluate

    manager = _task_manager(names, include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"--tasks: lm_eval has no task {name!r}{hint}")
    with user_input(f"--tasks {','.join(names)}"):
        results = simple_evaluate(
            lm,
            tasks=list(names),
            num_fewshot=fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    return {**results["results"], **results.get("groups", {})}


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm_eval's index of tasks. Indexing lm_eval's own tasks, thousands of files, takes seconds, so
    it is skipped if all names are tasks of the folder."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(include_path))


def main() -> None:
    """Run lm_eval's command with the model "bitnet" registered."""
    model_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
