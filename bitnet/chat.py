"""A conversation with a model: what was said, and the prompt that the next answer continues.

Every answer is generated from the whole conversation. That costs little, since the engine still
holds the keys and values of what it has read and written: only the new message is computed.

A model with a chat template gets its messages as the template spells them. Any other model has
never seen a message. It continues one growing text, to which each message adds a line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bitnet.data.chat_template import Message
from bitnet.data.tokenizer import Tokenizer
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.generate import encode_prompt
from bitnet.schema import UserError


@dataclass
class Chat:
    """Messages, and how the next answer is sampled."""

    engine: Engine
    """made with one row for this conversation"""
    tokenizer: Tokenizer
    params: SamplingParams
    """its seed is that of the first answer; each further answer takes the next"""
    max_new_tokens: int
    """of an answer, at most; if the context is nearly full, fewer"""
    system: str = ""
    """The system message; needs a chat template that takes one."""
    messages: list[Message] = field(default_factory=list)
    answers: int = 0
    """Answers asked for so far."""
    forgotten: int = 0
    """Messages that the latest prompt left out, since the context was full."""

    @property
    def has_template(self) -> bool:
        """Whether the model was trained to answer messages."""
        return self.tokenizer.chat_template is not None

    def reset(self) -> None:
        """Forget all messages; the system message stays."""
        self.messages, self.forgotten = [], 0

    def say(self, text: str, on_text: Callable[[str], None]) -> None:
        """Add a message and generate the answer, which is handed out as it grows.

        On Ctrl-C the answer so far is kept, and KeyboardInterrupt raised. If there is none, and
        after any other error, the conversation is what it was.

        Raises:
            UserError: the message does not fit the context, or the template refuses it.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        self._answer(before, on_text)

    def retry(self, on_text: Callable[[str], None]) -> None:
        """Answer the last message again, by the next seed. Errors are those of :meth:`say`."""
        if not self.messages:
            raise UserError("there is no message to answer yet")
        before = list(self.messages)
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        self._answer(before, on_text)

    def _answer(self, before: list[Message], on_text: Callable[[str], None]) -> None:
        pieces: list[str] = []

        def add(_: int, piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        params = replace(self.params, seed=(self.params.seed + self.answers) % 2**62)
        self.answers += 1
        try:
            self.engine.generate([self._prompt()], self.max_new_tokens, params, on_text=add)
        except KeyboardInterrupt:
            if not pieces:
                self.messages = before
            raise
        except UserError:
            self.messages = before
            raise
        finally:
            if self.messages is not before:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> list[int]:
        """The ids of the conversation. Where they leave too little room for an answer, the oldest
        messages are left out, two at a time, so that the first is always the user's."""
        room = min(self.max_new_tokens, max(1, self.engine.max_len // 4))
        last = len(self.messages) - 1
        for first in range(0, last + 1, 2):
            ids = self._encode(self.messages[first:])
            if len(ids) + room <= self.engine.max_len:
                self.forgotten = first
                return ids
        raise UserError(
            f"the message is too long: with it, the prompt has {len(ids)} tokens, and "
            f"{self.engine.max_len - room} fit into a context of {self.engine.max_len} beside an "
            "answer"
        )

    def _encode(self, messages: list[Message]) -> list[int]:
        template = self.tokenizer.chat_template
        if template is None:
            lines = [
                message["content"] + ("\n" if message["role"] == "assistant" else "")
                for message in messages
            ]
            return encode_prompt(self.tokenizer, "".join(lines))
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.encode_chat(template, [*system, *messages])
