"""``bitnet generate``: continue texts with a trained or packed model."""

import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from bitnet.cli.common import Device, Folder, KernelOption, load_for_inference, packed_bf16
from bitnet.data.tokenizer import Tokenizer
from bitnet.engine.decoder import CacheDtype, HeadDtype
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.export.folder import read_config
from bitnet.generate import encode_prompt, size_for
from bitnet.progress import reporting


def generate_command(
    folder: Folder,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per prompt, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely. 0: all.")] = 50,
    top_p: Annotated[
        float,
        typer.Option(help="Sample among the fewest tokens with this total probability. 1: all."),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**62)] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text, or a special token's name, that ends a text; repeatable."),
    ] = None,
    device: Device = "auto",
    kernel: KernelOption = "auto",
    kv: Annotated[CacheDtype, typer.Option(help="Dtype of the cache of keys and values.")] = "auto",
    head: Annotated[HeadDtype, typer.Option(help="Dtype of the output head.")] = "auto",
) -> None:
    """Continue one text or several with a trained or packed model.

    Text goes to stdout, speed to stderr. Ctrl-C ends the text, with exit code 130.

    Example: bitnet generate runs/quickstart/model --prompt "def main" --temperature 0.7
    """
    model, tokenizer = load_for_inference(folder, device, kernel)
    if model.norm.weight.is_cuda and not read_config(folder).quant.enabled:
        model = packed_bf16(model, kernel)
    prompts = [encode_prompt(tokenizer, text) for text in prompt or [""]]
    output = _Output(tokenizer, prompts)
    size = size_for(model, prompts, max_new_tokens)
    engine = Engine(model, tokenizer, **size, cache_dtype=kv, head=head, kernel=kernel)
    del model  # the engine keeps what it needs, such as a bf16 head, not the fp32 embedding
    params = SamplingParams(temperature, top_k, top_p, seed, tokenizer.eos_ids, stop=stop or ())
    interrupted = False
    several = reporting(f"generating {len(prompts)} texts") if len(prompts) > 1 else nullcontext()
    try:
        with several:
            engine.generate(prompts, max_new_tokens, params, on_text=output.add)
    except KeyboardInterrupt:
        interrupted = True
    output.end()
    stats = engine.stats
    print(
        f"{stats.prompt_tokens} prompt and {stats.new_tokens} new tokens; first after "
        f"{stats.first_token_s:.3f} s, then {stats.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
    if interrupted:
        raise typer.Exit(130)  # 128 + SIGINT, as in shells


class _Output:
    """Prompts and continuations on stdout: a single text as it is generated, several at the end."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
        self.prompts = [tokenizer.decode(ids) for ids in prompts]
        self.texts = [""] * len(prompts)
        self.begun = False

    def add(self, row: int, text: str) -> None:
        """Take new text of a prompt's continuation."""
        self.texts[row] += text
        if len(self.texts) == 1:
            self._begin()
            self._write(text)

    def end(self) -> None:
        """Write the text that is not written yet."""
        if len(self.texts) == 1:
            self._begin()
            self._write("\n")
            return
        for number, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True), 1):
            self._write(f"--- {number}\n{prompt}{text}\n")

    def _begin(self) -> None:
        """Write the prompt when the first text comes, so that an earlier error has its own line."""
        if not self.begun:
            self._write(self.prompts[0])
        self.begun = True

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
