"""A conversation with a model: its messages, and the prompt that the next answer continues.

Every answer is generated from the whole conversation. That costs little: the engine still holds
the keys and values of the earlier tokens, so it computes only the new message.

A model with a chat template gets its messages in the template's form. Any other model was not
trained on messages. It continues one growing text, to which each message adds a line.
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
    """The messages, and the settings that sample the next answer."""

    engine: Engine
    """engine with one row, made for this conversation"""
    tokenizer: Tokenizer
    params: SamplingParams
    """its seed samples the first answer; each further answer adds 1 to the seed"""
    max_new_tokens: int
    """most tokens of an answer; fewer if the context is nearly full"""
    system: str = ""
    """The system message; the chat template must support one."""
    messages: list[Message] = field(default_factory=list)
    answers: int = 0
    """Number of answers requested so far."""
    forgotten: int = 0
    """Messages that the latest prompt left out because the context was full."""

    @property
    def has_template(self) -> bool:
        """Whether the model was trained to answer messages."""
        return self.tokenizer.chat_template is not None

    def reset(self) -> None:
        """Forget all messages; the system message stays."""
        self.messages, self.forgotten = [], 0

    def say(self, text: str, on_text: Callable[[str], None]) -> None:
        """Add a message and generate the answer; ``on_text`` gets the answer piece by piece.

        On Ctrl-C the partial answer is kept and KeyboardInterrupt raised. If there is no answer
        yet, or after any other error, the conversation is unchanged.

        Raises:
            UserError: the message does not fit the context, or the template rejects it.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        self._answer(before, on_text)

    def retry(self, on_text: Callable[[str], None]) -> None:
        """Answer the last message again, with the next seed. Raises the errors of :meth:`say`."""
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
        """The token ids of the conversation. If they leave too little room for an answer, the
        oldest messages are dropped two at a time, so the first is always the user's."""
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
