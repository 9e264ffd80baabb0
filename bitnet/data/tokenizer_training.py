"""sentencepiece's trainer in a separate process: the code of the parent and of the child.

The trainer is one call of C++ that takes minutes and handles no signal. A separate process can be
killed: on any exception here (Ctrl-C, SIGTERM), and when this process ends for any reason. The
child leads its own session, so that Ctrl-C in a terminal reaches only the parent.

The parent writes frames: a length in 8 bytes, then that many bytes. The first frame holds the
options in JSON, the others hold sentences, and the length -1 ends them. The child answers with the
model and exit code 0, or with a message and exit code 1. The parent keeps its end of the pipe open
until then; if it closes, the child ends.

The child runs this file, which therefore imports only sentencepiece.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import chain
from struct import Struct
from typing import IO

_LENGTH = Struct("<q")
_END = -1


def train_model(sentences: Iterable[str], options: dict[str, str | int | bool]) -> bytes:
    """Run ``SentencePieceTrainer.train`` on sentences, which may be a generator.

    Arguments:
        options: sentencepiece's options, except those for input and output.
    Returns:
        The model file's bytes.
    Raises:
        RuntimeError: with the trainer's message, or how its process ended.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    requests, replies = child.stdin, child.stdout
    assert requests is not None
    assert replies is not None
    try:
        with suppress(BrokenPipeError):  # if the child has ended, its exit code says why
            for text in chain([json.dumps(options)], sentences):
                data = text.encode()
                requests.write(_LENGTH.pack(len(data)))
                requests.write(data)
            requests.write(_LENGTH.pack(_END))
            requests.flush()
        reply, code = replies.read(), child.wait()
    finally:
        child.kill()
        child.wait()
        replies.close()
        with suppress(BrokenPipeError):
            requests.close()
    if code == 1:
        raise RuntimeError(reply.decode(errors="replace"))
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RuntimeError(
            f"its process ended early ({how}); where memory is short, a lower "
            "data.max_tokenizer_mb takes less"
        )
    return reply


def _frames(requests: IO[bytes]) -> Iterator[bytes]:
    """Yield the parent's frames; if they end too early, this process ends."""
    while header := requests.read(_LENGTH.size):
        (length,) = _LENGTH.unpack(header)
        if length == _END:
            return
        yield requests.read(length)
    os._exit(2)


def _end_with_the_parent() -> None:
    os.read(0, 1)  # only the end of the pipe can come now
    os._exit(2)


def _reply(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the parent was killed
        os._exit(2)


def _serve() -> None:
    frames = _frames(sys.stdin.buffer)
    options, model = json.loads(next(frames)), BytesIO()

    def sentences() -> Iterator[bytes]:
        yield from frames
        threading.Thread(target=_end_with_the_parent, daemon=True).start()

    try:
        from sentencepiece import SentencePieceTrainer

        SentencePieceTrainer.train(sentence_iterator=sentences(), model_writer=model, **options)
    except Exception as error:
        _reply((str(error) or repr(error)).encode(errors="replace"))
        sys.exit(1)
    _reply(model.getvalue())


if __name__ == "__main__":
    _serve()
