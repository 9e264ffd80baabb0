"""``bitnet chat``: talk to a model in a terminal.

On a terminal, readline edits lines if Python has it, Ctrl-C ends an answer or clears a line, and
Ctrl-D quits. If the input is a pipe, each line is a message, only the answers are written to
stdout, and a mistake or Ctrl-C ends the program.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer

from bitnet.chat import Chat
from bitnet.cli.common import Device, Folder, KernelOption, load_for_inference, packed_bf16
from bitnet.engine.decoder import CacheDtype, HeadDtype
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.export.folder import read_config
from bitnet.schema import UserError, nearest, user_input

_PROMPT, _MORE = "> ", "... "
HELP = """\
/reset          forget the conversation
/retry          answer the last message again
/system [TEXT]  show or set the system message, and start anew
/set [KEY VALUE]  show or change temperature, top_k, top_p, seed, max_new_tokens
/stats          tokens, reused tokens and speed of the last answer
/help           this list
/quit           leave (or Ctrl-D)
A line that ends with \\ goes on in the next one. A message that begins with / is written with //.
Ctrl-C ends an answer, which stays in the conversation as far as it got."""
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "seed": int}


def chat_command(
    folder: Folder,
    system: Annotated[str, typer.Option(help="The system message; needs a chat template.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely. 0: all.")] = 50,
    top_p: Annotated[
        float,
        typer.Option(help="Sample among the fewest tokens with this total probability. 1: all."),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the first answer.", min=0, max=2**62)] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text, or a special token's name, that ends an answer; repeatable."),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Longest conversation in tokens. 0: the model's context.", min=0)
    ] = 0,
    device: Device = "auto",
    kernel: KernelOption = "auto",
    kv: Annotated[CacheDtype, typer.Option(help="Dtype of the cache of keys and values.")] = "auto",
    head: Annotated[HeadDtype, typer.Option(help="Dtype of the output head.")] = "auto",
) -> None:
    """Talk to a trained or packed model.

    A model imported with a chat template answers messages. Any other model continues your text.
    /help lists the commands.

    Example: bitnet chat runs/quickstart/model-packed
    """
    model, tokenizer = load_for_inference(folder, device, kernel)
    if model.norm.weight.is_cuda and not read_config(folder).quant.enabled:
        model = packed_bf16(model, kernel)
    longest = model.config.max_seq_len
    if context > longest:
        raise UserError(f"--context {context}: the model has a context of {longest}")
    engine = Engine(
        model, tokenizer, max_batch=1, max_len=context, cache_dtype=kv, head=head, kernel=kernel
    )
    del model  # the engine keeps the tensors that it needs
    params = SamplingParams(temperature, top_k, top_p, seed, tokenizer.eos_ids, stop=stop or ())
    chat = Chat(engine, tokenizer, params, max_new_tokens, system)
    if system and not chat.has_template:
        raise UserError(f"--system: {folder} has no chat template, so no place for it")
    if sys.stdin.isatty():
        _talk(chat, f"{folder}: " + _introduction(chat))
    else:
        _answer_lines(chat)


def _introduction(chat: Chat) -> str:
    if chat.has_template:
        return "answers messages by its chat template. /help lists the commands."
    return "has no chat template; it continues the text that you begin. /help lists the commands."


def _answer_lines(chat: Chat) -> None:
    """Answer each message of a pipe; the first mistake ends the program."""
    while (message := _read_message(lambda prompt: sys.stdin.readline())) is not None:
        if not _command(chat, message):
            return


def _talk(chat: Chat, introduction: str) -> None:
    """Read and answer messages until the user quits; errors do not end the chat."""
    with contextlib.suppress(ImportError):  # Windows has none: lines cannot be edited then
        import readline  # noqa: F401 - input() uses it once it is imported
    print(introduction, file=sys.stderr)
    while True:
        reading = True
        try:
            message = _read_message(_read_line)
            reading = False
            if message is None or not _command(chat, message):
                return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)" if reading else "\n(stopped)", file=sys.stderr)


def _read_line(prompt: str) -> str:
    """A line with its newline; "" at the end of the input."""
    try:
        return input(prompt) + "\n"
    except EOFError:
        print()
        return ""


def _read_message(read: Callable[[str], str]) -> str | None:
    """The next message that is not empty, without its final newline. A line that ends with a
    backslash is joined to the next line. None at the end of the input."""
    parts: list[str] = []
    while True:
        with user_input("the input cannot be read"):
            line = read(_MORE if parts else _PROMPT)
        parts.append(line.removesuffix("\n"))
        if line.endswith("\\\n"):
            parts[-1] = parts[-1][:-1]
        elif (message := "\n".join(parts)).strip():
            return message
        elif not line:
            return None
        else:
            parts = []


def _command(chat: Chat, message: str) -> bool:
    """Run a command, or answer a message; returns False to quit.

    Raises:
        UserError: an unknown command, a wrong value, a message that cannot be answered.
    """
    if message.startswith("//"):
        message = message[1:]
    elif message.startswith("/"):
        name, _, rest = message[1:].strip().partition(" ")
        return _run(chat, name, rest.strip())
    chat.say(message, _write)
    _end(chat)
    return True


def _run(chat: Chat, name: str, rest: str) -> bool:
    if name in ("quit", "exit"):
        return False
    if name == "help":
        print(HELP, file=sys.stderr)
    elif name == "reset":
        chat.reset()
    elif name == "retry":
        chat.retry(_write)
        _end(chat)
    elif name == "system":
        _system(chat, rest)
    elif name == "set":
        _set(chat, rest.split())
    elif name == "stats":
        stats = chat.engine.stats
        print(
            f"{stats.prompt_tokens} tokens read, {stats.reused_tokens} of them known from before; "
            f"first after {stats.first_token_s:.3f} s, then {stats.new_tokens} tokens at "
            f"{stats.tokens_per_second:.1f} tokens/s",
            file=sys.stderr,
        )
    else:
        names = ("help", "reset", "retry", "system", "set", "stats", "quit")
        near = nearest(name, names)
        hint = f"; did you mean /{near}?" if near else "; /help lists the commands"
        raise UserError(f"/{name}: no such command{hint}")
    return True


def _system(chat: Chat, text: str) -> None:
    if not chat.has_template:
        raise UserError("/system: the model has no chat template, so no place for it")
    if text:
        chat.system = text
        chat.reset()
    print(f"system: {chat.system or '(none)'}", file=sys.stderr)


def _set(chat: Chat, words: list[str]) -> None:
    if len(words) == 2:
        key, value = words
        if key == "max_new_tokens":
            with user_input(f"/set {key}"):
                chat.max_new_tokens = max(1, int(value))
        elif key in SAMPLING:
            with user_input(f"/set {key}"):
                changed = {key: SAMPLING[key](value)}
            chat.params = replace(chat.params, **changed)
        else:
            near = nearest(key, (*SAMPLING, "max_new_tokens"))
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"/set {key}: no such setting{hint}")
    elif words:
        raise UserError("/set: expected a key and a value, such as /set temperature 0.2")
    shown = [f"{key} {getattr(chat.params, key)}" for key in SAMPLING]
    print(", ".join([*shown, f"max_new_tokens {chat.max_new_tokens}"]), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(chat: Chat) -> None:
    """End an answer's line; report the messages that the model no longer sees."""
    _write("\n")
    if chat.forgotten:
        print(
            f"(the context is full: the first {chat.forgotten} messages are left out)",
            file=sys.stderr,
        )
