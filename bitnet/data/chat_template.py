"""The chat template of a model: it turns messages into the text that the model was trained to
answer.

A template is a Jinja program that comes with a model, so it is somebody else's code. It is rendered
as transformers does: in Jinja's sandbox, with values only and no access to Python, files or the
network. It can still loop for a long time; Ctrl-C ends that.

A rendered chat has two kinds of tokens. The template's own text may name special tokens, such as
<|im_start|>, which become these tokens. A message must not: a literal "<|im_end|>" in it stays
text, or a message could end itself and speak for the other side. Before rendering, a character that
no message contains is inserted into such names; it is removed again from the parts that stay text.

A model folder keeps the template in chat_template.json, with the texts of the tokens that a
template may use (bos_token, eos_token).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from bitnet.schema import UserError, read_file, user_input

FILE = "chat_template.json"
_MAX_BYTES = 2**20
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The names by which a template may use a special token's text."""
_PRIVATE = range(0xE000, 0xF8FF)
"""Characters without a meaning, to mark names that must stay text."""


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    """"system", "user" or "assistant" """
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the texts of the special tokens that it may use. It is compiled on first use:
    a model with a damaged template can still be used for other things."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    """such as ``{"bos_token": "<s>"}``"""

    @cached_property
    def _template(self) -> Any:
        with user_input("chat template: cannot be read"):
            return _environment().from_string(self.source)

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """The text of a chat.

        Arguments:
            answer: end with the beginning of the assistant's next turn.
        Raises:
            UserError: the template is not valid Jinja, or rejects the messages, such as two of one
                role in a row.
        """
        with user_input("chat template"):
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=answer,
                tools=None,
                documents=None,
                **self.tokens,
            )
        return text

    def segments(
        self, messages: Sequence[Message], specials: Mapping[str, int], answer: bool = True
    ) -> list[str | int]:
        """The text of a chat as pieces of ordinary text and ids of special tokens.

        Arguments:
            specials: the tokenizer's special tokens by name. Names become tokens only in the
                template's text, not in messages.
        """
        names = sorted(filter(None, specials), key=len, reverse=True)
        if not names:
            return [self.render(messages, answer)]
        pattern = re.compile("|".join(map(re.escape, names)))
        said = "".join(message["content"] for message in messages)
        mark = next(chr(code) for code in _PRIVATE if chr(code) not in said + self.source)

        def as_text(name: re.Match[str]) -> str:
            return name[0][0] + mark + name[0][1:]

        safe: list[Message] = [
            {"role": one["role"], "content": pattern.sub(as_text, one["content"])}
            for one in messages
        ]
        rendered = self.render(safe, answer)
        parts: list[str | int] = []
        begin = 0
        for found in pattern.finditer(rendered):
            parts += [rendered[begin : found.start()].replace(mark, ""), specials[found[0]]]
            begin = found.end()
        parts.append(rendered[begin:].replace(mark, ""))
        return [part for part in parts if part != ""]

    def to_json(self) -> bytes:
        """The content of chat_template.json."""
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode()


def read_chat_template(path: Path) -> ChatTemplate:
    """Read a chat_template.json. Raises UserError, naming the file, if it is not valid."""
    return parse_chat_template(path, read_file(path, _MAX_BYTES))


def parse_chat_template(where: Path, data: bytes) -> ChatTemplate:
    """Parse the content of a chat_template.json. Raises UserError, naming the file."""
    with user_input(f"{where}: damaged"):
        content = json.loads(data)
        if not isinstance(content, dict) or content.keys() != {"source", "tokens"}:
            raise UserError(f"{where}: damaged: expected the keys source and tokens")
        return template_of(where, content["source"], content["tokens"])


def template_of(where: Path | str, source: Any, tokens: Any) -> ChatTemplate:
    """Make a template from the values in any kind of file. Raises UserError, naming the file."""
    if not isinstance(source, str) or not isinstance(tokens, Mapping):
        raise UserError(f"{where}: its chat template is not a text with special tokens")
    texts = {name: _text_of(tokens.get(name)) for name in _TOKENS}
    return ChatTemplate(source, {name: text for name, text in texts.items() if text})


def hf_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder: chat_template.jinja, or the template in
    tokenizer_config.json (if several, "default"). None if there is none."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            data = read_file(path)
            with user_input(f"{path}: damaged"):
                content = json.loads(data)
            if not isinstance(content, dict):
                raise UserError(f"{path}: damaged: not a JSON object")
            config |= content
    source = config.get("chat_template")
    if (path := folder / "chat_template.jinja").is_file():
        with user_input(f"{path}: cannot be read"):
            source = read_file(path, _MAX_BYTES).decode("utf-8")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return None if source is None else template_of(folder, source, config)


def _text_of(token: Any) -> str:
    """A special token's text, which files store as a string or in an object; "" if none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; here it has no effect."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
