"""Conversations: prompts, what the engine reuses, and what is left out."""

from pathlib import Path
from typing import Any

import pytest

from bitnet.chat import Chat
from bitnet.data.chat_template import ChatTemplate
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.export.hf import load_hf
from bitnet.generate import encode_prompt, generate
from bitnet.schema import UserError
from tests.helpers.hf_folder import llama, write

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_hf(write(llama(), tmp_path_factory.mktemp("llama")))


def chat(loaded: tuple[Any, Any], template: str = "", **fields: Any) -> tuple[Chat, list[str]]:
    model, tokenizer = loaded
    tokenizer.chat_template = ChatTemplate(template) if template else None
    engine = Engine(model, tokenizer, max_batch=1, max_len=fields.pop("max_len", 0))
    settings = {"max_new_tokens": 6} | fields
    params = settings.pop("params", SamplingParams(eos_id=tokenizer.eos_ids))
    return Chat(engine, tokenizer, params, **settings), []


def test_a_chat_is_rendered_again_and_only_the_new_is_computed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    one, said = chat(loaded, TEMPLATE, system="S")
    texts = ["to be", "or not"]
    prompt: list[int] = []
    known = 0
    end = tokenizer.specials["<|im_end|>"]
    for turn, text in enumerate(texts):
        prompt += [*tokenizer.encode("sS"), end] if turn == 0 else [end]
        prompt += [*tokenizer.encode(f"u{text}"), end, *tokenizer.encode("a")]
        before = len(said)
        one.say(text, said.append)
        answer = "".join(said[before:])
        (new,) = generate(model, [prompt], 6, eos_id=tokenizer.eos_ids)
        assert answer == tokenizer.decode(new)
        assert one.messages[-1] == {"role": "assistant", "content": answer}
        assert one.engine.stats.reused_tokens >= known
        known = len(prompt) - 1
        # the answer is encoded again, with the word before it: the text may have other tokens
        prompt = [*prompt[:-1], *tokenizer.encode(f"a{answer}")]
    assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2


def test_without_a_template_one_text_grows(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    one, said = chat(loaded)
    one.say("to be", said.append)
    first = "".join(said)
    (new,) = generate(model, [encode_prompt(tokenizer, "to be")], 6, eos_id=tokenizer.eos_ids)
    assert first == tokenizer.decode(new)
    one.say("that", lambda text: None)
    assert one.engine.stats.prompt_tokens == len(encode_prompt(tokenizer, f"to be{first}\nthat"))


def test_retry_takes_the_next_seed_and_reset_forgets(loaded: tuple[Any, Any]) -> None:
    params = SamplingParams(temperature=1.5, seed=7)
    one, said = chat(loaded, TEMPLATE, params=params)
    with pytest.raises(UserError, match="there is no message to answer yet"):
        one.retry(said.append)
    one.say("to", said.append)
    answers = [one.messages[-1]["content"]]
    one.retry(said.append)
    answers.append(one.messages[-1]["content"])
    assert answers[0] != answers[1]
    assert len(one.messages) == 2
    other, _ = chat(loaded, TEMPLATE, params=params)
    other.say("to", said.append)
    assert other.messages[-1]["content"] == answers[0]
    one.reset()
    assert one.messages == []


def test_the_oldest_messages_are_left_out_when_the_context_is_full(
    loaded: tuple[Any, Any],
) -> None:
    one, said = chat(loaded, TEMPLATE, max_len=40)
    for _ in range(6):
        one.say("to be or", said.append)
        assert one.engine.stats.prompt_tokens + 6 <= 40
    assert one.forgotten > 0
    assert one.forgotten % 2 == 0
    assert len(one.messages) == 12
    with pytest.raises(UserError, match="the message is too long: with it, the prompt has"):
        one.say("\u2603" * 40, said.append)
    assert len(one.messages) == 12


def test_ctrl_c_keeps_what_was_said(loaded: tuple[Any, Any]) -> None:
    one, said = chat(loaded, TEMPLATE)

    def interrupt(text: str) -> None:
        said.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.say("to be", interrupt)
    assert one.messages[-1] == {"role": "assistant", "content": "".join(said)}
    one.say("or", said.append)
    assert len(one.messages) == 4


def test_a_template_that_refuses_leaves_the_chat_as_it_was(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}x"
    one, said = chat(loaded, refuses)
    one.say("to", said.append)
    before = list(one.messages)
    with pytest.raises(UserError, match="chat template: enough"):
        one.say("be", said.append)
    assert one.messages == before
