"""The ``bitnet`` command: prepare data, inspect a config, and what comes after training.

Every command is a thin layer over a function of the library; ``bitnet COMMAND --help`` teaches it.
A mistake of the user ends in one line on stderr and exit code 2.
"""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from typer.core import TyperGroup

from bitnet.cli.bench import app as bench_app
from bitnet.cli.common import Device, Folder, is_file, load_for_inference, read_text, split_args
from bitnet.cli.convert import convert_command
from bitnet.cli.inspect_kernels import inspect_kernels
from bitnet.cli.inspect_model import inspect_model
from bitnet.cli.ptq import ptq_command
from bitnet.cli.shell import run
from bitnet.config import load_config
from bitnet.data.loader import SplitName, TokenDataset, sequential_windows
from bitnet.data.prepare import prepare
from bitnet.engine.decoder import CacheDtype, HeadDtype
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingParams
from bitnet.evaluate import compressor_baselines, evaluate_text, evaluate_windows
from bitnet.export.folder import CONFIG, load, read_config, save_model, sizes
from bitnet.export.proof import prove
from bitnet.generate import encode_prompt, size_for
from bitnet.linear import BitLinear, Kernel, pack
from bitnet.model import Transformer, as_transformer
from bitnet.progress import Reports, plain_console, reporting
from bitnet.qat.prepare import convert
from bitnet.schema import UserError
from bitnet.summary import human, tables

app = typer.Typer(
    help="Ternary language models: prepare data, inspect configs, pack, generate, evaluate.\n\n"
    "Training itself is train.py of a checkout: python train.py configs/quickstart.toml\n\n"
    "--debug, anywhere in a command, or BITNET_DEBUG=1: an error shows its traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _ConfigByDefault(TyperGroup):
    """``inspect CONFIG.toml`` means ``inspect config CONFIG.toml``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """What click does, with the default command where the first word is none."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["config", *args])


inspect_app = typer.Typer(
    cls=_ConfigByDefault,
    help="Show the sizes and costs of a config or a model, or the GPU kernels' machine code.\n\n"
    "bitnet inspect CONFIG.toml... [SECTION.KEY=VALUE...]: shapes, parameters, FLOPs, memory, "
    "energy. Try: bitnet inspect configs/15m.toml model.depth=8\n\n"
    "bitnet inspect model FOLDER: what a token of a trained or packed model costs.\n\n"
    "bitnet inspect kernels: the kernels' machine code, counted without a GPU.",
    subcommand_metavar="CONFIG.toml... | COMMAND [ARGS]...",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(inspect_app, name="inspect")
app.add_typer(bench_app, name="bench")
inspect_app.command("kernels")(inspect_kernels)
inspect_app.command("model")(inspect_model)
app.command("convert")(convert_command)
app.command("ptq")(ptq_command)


@app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, globs or folders of .txt .md .py .jsonl(.gz|.xz|.zst) .parquet; "
            "hf:OWNER/NAME[:CONFIG]; python-stdlib. None: those of --config."
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Take [data] from this config file.")] = "",
    path: Annotated[str, typer.Option(help="Folder to write.")] = "",
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train. 0: default.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="A sentencepiece model to use instead.")] = "",
    val_fraction: Annotated[float, typer.Option(help="Of the documents. 0: default.")] = 0.0,
    text_field: Annotated[str, typer.Option(help="Of .jsonl and .parquet rows.")] = "",
) -> None:
    """Turn text into token shards: train a tokenizer, tokenize, split off validation documents.

    The result is checked whole: an interrupted run leaves nothing that loads. train.py does this
    by itself when its config's data.path is missing.

    Example: bitnet prepare my-texts/ --path data/my-texts --vocab-size 8192
    """
    if not sources and not config:
        raise UserError("nothing to prepare: name a source (a folder, say) or --config FILE")
    if sources and not path:
        raise UserError("name the folder to write with --path, such as --path data/my-texts")
    given: dict[str, Any] = {
        "sources": sources,
        "path": path,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "text_field": text_field,
    }
    data = {key: value for key, value in given.items() if value}
    folder = prepare(load_config([config] if config else [], data=data).data)
    table = Table("split", "documents", "tokens", "bytes", "bytes a token", title=str(folder))
    for split in ("train", "val"):
        dataset = TokenDataset(folder, split)
        row = (dataset.n_documents, dataset.n_tokens, dataset.n_bytes)
        table.add_row(split, *(f"{n:,}" for n in row), f"{row[2] / row[1]:.2f}")
    plain_console().print(table)


@inspect_app.command("config")
def inspect_command(
    args: Annotated[list[str], typer.Argument(metavar="CONFIG.toml... [SECTION.KEY=VALUE...]")],
) -> None:
    """Print a config's shapes, parameters, FLOPs, memory and energy, and what model.depth chose.

    Nothing is built or downloaded. Try: bitnet inspect configs/15m.toml model.depth=8
    """
    if folder := next((arg for arg in args if is_file(f"{arg}/{CONFIG}")), ""):
        raise UserError(f"{folder}: is a model folder: bitnet inspect model {folder}")
    for table in tables(load_config(*split_args(args))):
        plain_console().print(table)


@app.command("pack")
def pack_command(
    folder: Folder,
    out: Annotated[str, typer.Option(help="Folder to write. Default: FOLDER-packed.")] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text for the proof; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Greedy tokens a prompt in the proof.", min=0)] = 32,
) -> None:
    """Pack a trained ternary model, or one with a [quant] recipe, and prove that it computes the
    same.

    The packed folder is read back from disk and compared with the trained model: codes, int32
    accumulators, logits and greedy tokens must be equal to the last bit. Exit code 1 if not.
    """
    target = Path(out) if out else beside(folder, "-packed")
    model, tokenizer = load(folder)
    if (target / CONFIG).exists() and read_config(target).weights == "latent":
        raise UserError(f"{target}: holds a trained model, which packing would overwrite")
    config = read_config(folder)
    trained = any(isinstance(module, BitLinear) for module in model.modules())
    if config.weights != "latent":
        raise UserError(f"{folder}: is {config.weights} already; there is nothing to pack")
    if not (trained or config.quant.enabled):
        raise UserError(f"{folder}: is full precision; bitnet ptq, or training, makes integers")
    prompts = prompt or ["", "The ", "def __init__(self"]
    ids = [encode_prompt(tokenizer, text)[: model.config.max_seq_len] for text in prompts]
    room = model.config.max_seq_len - max(len(row) for row in ids)
    packed = copy.deepcopy(model)
    if trained:
        packed = as_transformer(pack(packed))
    if config.quant.enabled:
        try:
            packed = as_transformer(convert(packed))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
    with reporting("packing and proving"):
        save_model(target, packed, tokenizer, config.quant)
        packed, _ = load(target)
        proof = prove(model, packed, ids, min(tokens, room))

    console = plain_console()
    before, after = sizes(target).fp32, sizes(target).stored
    table = Table("weights", "fp32", "packed", "ratio", title=str(target))
    for kind, fp32 in before.items():
        table.add_row(
            kind, human(fp32, "B"), human(after[kind], "B"), f"{fp32 / max(1, after[kind]):.2f}"
        )
    console.print(table)
    console.print(
        f"compared: {proof.matrices} matrices ({proof.weights:,} codes), "
        f"{proof.accumulators:,} int32 accumulators, {proof.logits:,} logits, "
        f"{proof.tokens} greedy tokens"
    )
    if not proof.holds:
        for difference in proof.differences:
            console.print(f"DIFFERS: {difference}")
        raise typer.Exit(1)
    console.print("proof: all equal, bit for bit")


def beside(folder: Path, suffix: str) -> Path:
    """``FOLDER-packed``, say; the folder's own name where it ends in ``.`` or ``..``."""
    if folder.name in ("", ".."):  # Path("x/.") has the name x
        folder = folder.resolve()
    return folder.with_name(folder.name + suffix)


@app.command("generate")
def generate_command(
    folder: Folder,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most, for each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely. 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Among those of this probability. 1: all.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**62)] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text, or a special token's name, that ends a text; repeatable."),
    ] = None,
    device: Device = "auto",
    kernel: Annotated[Kernel, typer.Option(help="Of a packed model's layers.")] = "auto",
    kv: Annotated[CacheDtype, typer.Option(help="Dtype of the cache of keys and values.")] = "auto",
    head: Annotated[HeadDtype, typer.Option(help="Dtype of the output head.")] = "auto",
) -> None:
    """Continue a text, or several at once, with a trained or a packed model.

    Text goes to stdout, the speed to stderr. Ctrl-C ends the text where it is, with exit code 130.

    Example: bitnet generate runs/quickstart/model --prompt "def main" --temperature 0.7
    """
    model, tokenizer = load_for_inference(folder, device, kernel)
    if model.norm.weight.is_cuda and not read_config(folder).quant.enabled:
        model = packed_bf16(model, kernel)
    prompts = [encode_prompt(tokenizer, text) for text in prompt or [""]]
    texts = [""] * len(prompts)
    begun = False

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def begin() -> None:  # not before the first text: an error stands on a line of its own
        nonlocal begun
        if not begun:
            write(tokenizer.decode(prompts[0]))
        begun = True

    def on_text(row: int, text: str) -> None:
        texts[row] += text
        if len(prompts) == 1:
            begin()
            write(text)

    size = size_for(model, prompts, max_new_tokens)
    engine = Engine(model, tokenizer, **size, cache_dtype=kv, head=head, kernel=kernel)
    params = SamplingParams(temperature, top_k, top_p, seed, tokenizer.eos_ids, stop=stop or ())
    interrupted = False
    several = reporting(f"generating {len(prompts)} texts") if len(prompts) > 1 else nullcontext()
    try:
        with several:
            engine.generate(prompts, max_new_tokens, params, on_text=on_text)
    except KeyboardInterrupt:
        interrupted = True
    if len(prompts) == 1:
        begin()
        write("\n")
    else:
        for number, (ids, text) in enumerate(zip(prompts, texts, strict=True), 1):
            write(f"--- {number}\n{tokenizer.decode(ids)}{text}\n")
    stats = engine.stats
    print(
        f"{stats.prompt_tokens} prompt and {stats.new_tokens} new tokens; first after "
        f"{stats.first_token_s:.3f} s, then {stats.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
    if interrupted:
        raise typer.Exit(130)  # 128 + SIGINT, as a shell has it


@app.command("eval")
def eval_command(
    folder: Folder,
    text: Annotated[str, typer.Option(help="A UTF-8 text file to evaluate on.")] = "",
    data: Annotated[str, typer.Option(help="Or a prepared data folder (data.path).")] = "",
    split: Annotated[SplitName, typer.Option(help="Of the data folder.")] = "val",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also what gzip -9 and xz -9 reach on the text.")
    ] = False,
    device: Device = "auto",
    kernel: Annotated[Kernel, typer.Option(help="Of a packed model's layers.")] = "auto",
) -> None:
    """Measure a trained or packed model on a text: loss, perplexity, bits per byte.

    Example: bitnet eval runs/quickstart/model-packed --data data/python-stdlib --baselines
    """
    if bool(text) == bool(data):
        raise UserError("name what to evaluate on: either --text FILE or --data FOLDER")
    model, tokenizer = load_for_inference(folder, device, kernel)
    if text:
        content = read_text(Path(text))
        with reporting(f"evaluating {folder}"):
            result = evaluate_text(model, tokenizer, content)
    else:
        dataset = TokenDataset(Path(data), split)
        if dataset.tokenizer().hash != tokenizer.hash:
            raise UserError(f"{data}: was tokenized with another tokenizer than {folder} has")
        content = ""
        if baselines:
            content = tokenizer.decode(dataset.tokens(0, dataset.n_tokens).tolist())
        windows = sequential_windows(dataset, model.config.max_seq_len)
        with Reports() as bars:
            shown = bars.track(windows, total=None, description=f"evaluating {folder}")
            result = evaluate_windows(model, shown, tokenizer.count_bytes)
    table = Table("", "bits per byte", "loss", "perplexity", title=f"{result.bytes:,} bytes")
    table.add_row(
        str(folder), f"{result.bits_per_byte:.4f}", f"{result.loss:.4f}", f"{result.perplexity:.2f}"
    )
    if baselines:
        with reporting("compressing by gzip and xz"):
            compressed = compressor_baselines(content.encode())
        for name, bits in compressed.items():
            table.add_row(name, f"{bits:.4f}", "", "")
    plain_console().print(table)


def packed_bf16(model: Transformer, kernel: Kernel) -> Transformer:
    """Cast a model to bf16, the dtype of the GPU kernels. Ternary layers are packed before, so that
    their codes and scales are those of the fp32 weights."""
    if model.config.linear == "ternary":
        model = as_transformer(pack(model, kernel))
    return model.to(torch.bfloat16)


def main() -> None:
    """Run the command on ``sys.argv`` and exit."""
    run(app)
