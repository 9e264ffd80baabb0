"""Turn tokens into text as they come, and end the text at a stop string.

Text and tokens have different boundaries. A character may take several tokens (byte fallback). A
stop string may span tokens and may begin inside one. So both are returned only when they are
certain: text that may begin a stop string is held back until it is one or cannot become one. A
token is *settled* when all of its text has been returned.
"""

from collections.abc import Sequence

from bitnet.data.tokenizer import Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_ANCHOR = "a"
_WINDOW = 16
"""Most tokens decoded again with each new one; more if they do not end with a whole character."""


class TextStream:
    """The text of a prompt's continuation, piece by piece.

    Without stop strings, the returned pieces add up to ``tokenizer.decode(prompt + tokens)`` after
    the prompt. With them, the text ends exactly before the first stop string to be complete (if one
    token completes several, before the one that begins first). A stop string counts only if all of
    it is in the new text, not if it begins in the prompt.

    Arguments:
        prompt: decides whether the first new token keeps its leading space. If the prompt ends in
            an incomplete character, the completed character belongs to the continuation.
        stop: the stop strings, none empty.
    Attributes:
        stopped: a stop string is complete; no more tokens may be pushed.
        settled: how many of the new tokens are certain to stay, because all of their text has been
            returned. Once ``stopped``, these are the tokens that lie wholly before the stop string.
            They exclude the token in which it begins, though the text before it is returned.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        self.settled = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ends: list[int] = []  # length of the decoded text after each new token
        # Only the tokens after a border are decoded. A border lies between two characters and has
        # text before it. An anchor in front of the tokens keeps their first space: tokenizers put a
        # space before a text, and decoding removes it.
        self._anchor: list[int] = []
        self._ids = list(prompt)
        self._begin = 0  # characters before the border
        self._waiting = ""  # those of them not returned yet
        text = self._decode()
        whole = text
        if tokenizer.count_bytes([tokenizer.eos_id, *prompt]) != len(text.encode()):
            whole = _whole(text)  # some bytes form no character yet
        self._given = len(whole)  # characters after the border returned so far
        self._move_border(text)

    def push(self, token: int) -> str:
        """Add one token; return the text that is certain now, which may be empty."""
        assert not self.stopped
        self._ids.append(token)
        text = self._decode()
        self._ends.append(self._begin + len(text))
        new = self._certain(self._waiting + _whole(text)[self._given :])
        self._given += max(0, len(new) - len(self._waiting))
        self._waiting = self._waiting[len(new) :]
        printed = self._begin - len(self._waiting) + self._given
        ends = self._ends if self._stop else []
        self.settled = next(
            (n for n in range(len(ends), self.settled, -1) if ends[n - 1] <= printed),
            self.settled if self._stop else len(self._ends),
        )
        if len(self._ids) >= _WINDOW:
            self._move_border(text)
        return new

    def finish(self) -> str:
        """Return the rest: text held back that did not become a stop string, and incomplete
        characters as U+FFFD. Returns "" if ``stopped``, or when called again."""
        if self.stopped:
            return ""
        self.settled = len(self._ends)
        text = self._decode()
        new = self._waiting + text[self._given :]
        self._waiting, self._given = "", len(text)
        return new

    def _decode(self) -> str:
        """The text of the tokens after the border."""
        text = self._tokenizer.decode([*self._anchor, *self._ids])
        return text[len(_ANCHOR) :] if self._anchor else text

    def _move_border(self, text: str) -> None:
        """Move the border behind the tokens, whose text is ``text``, if a character ends there."""
        if text and text[-1] != _UNKNOWN:
            self._waiting += text[self._given :]
            self._begin += len(text)
            self._given, self._ids = 0, []
            self._anchor = self._anchor or self._tokenizer.encode(_ANCHOR)

    def _certain(self, new: str) -> str:
        """The beginning of ``new``, the text not returned yet, that neither is nor may become part
        of a stop string."""
        if found := [start for stop in self._stop if (start := new.find(stop)) >= 0]:
            self.stopped = True
            return new[: min(found)]
        held = max(
            (n for stop in self._stop for n in range(1, len(stop)) if new.endswith(stop[:n])),
            default=0,
        )
        return new[: len(new) - held]


def _whole(text: str) -> str:
    """The text without the last characters that another token may still change. An incomplete UTF-8
    character has at most three bytes, and each decodes to one U+FFFD."""
    for _ in range(3):
        text = text.removesuffix(_UNKNOWN)
    return text
