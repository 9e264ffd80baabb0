"""Train a language model from one config, from top to bottom.

    python train.py configs/quickstart.toml
    python train.py configs/15m.toml optim.lr=2e-3 run.name=my-run

The whole run is this file: set up, resume, loop, save. What it calls is in bitnet/, a file a
subject. A run lives in runs/NAME/; the same command again resumes it, from the newest whole
checkpoint, as if it had never stopped: data, schedules and dropout-free model are pure functions of
(seed, step), so the optimizer's state, the weights (learned scales, observers and adapters among
them) and the balance of a distillation are all there is to restore.

A step, in order: set how far it is quantized ([qat]); quantize the weights, once; forward and
backward over the micro-batches; skip if not finite; clip; update; then readings, evaluation, the
line in metrics.jsonl, and last the checkpoint, so that what is in a checkpoint is always in the
metrics too.
"""

from bitnet.cli.shell import run, start

if __name__ == "__main__":  # Ctrl-C during the imports below is no traceback
    start()

import math
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock, Timeout

from bitnet.build import as_saved, build_model
from bitnet.cli.common import config_help, pick_device, split_args
from bitnet.config import Config, differences, load_config, to_dict, to_toml
from bitnet.data.loader import INDEX, Loader, TokenDataset, sequential_windows
from bitnet.data.prepare import prepare
from bitnet.data.tokenizer import Tokenizer
from bitnet.durable import sha256, write_atomic
from bitnet.evaluate import EvalResult, evaluate_windows
from bitnet.export.folder import read_config, save_model
from bitnet.generate import encode_prompt, generate
from bitnet.model import Transformer
from bitnet.progress import reporting
from bitnet.qat.adapters import merge_adapters
from bitnet.qat.recipe import Recipe
from bitnet.qat.schedule import QATConfig, set_step
from bitnet.schema import UserError, check_file, user_input, with_new_keys
from bitnet.signals import drop_closed_terminal, ending_signals
from bitnet.summary import human, one_line, quantization_lines
from bitnet.training import checkpoint
from bitnet.training.distill import Distiller, load_teacher
from bitnet.training.distributed import World
from bitnet.training.metrics import Console, MetricsFile, Tracker
from bitnet.training.optim import build_optimizer
from bitnet.training.step import compiled, cross_entropy, split, train_step
from bitnet.training.telemetry import Telemetry, undisturbed
from bitnet.training.throughput import CoreWatch, Throughput, mfu, peak_flops, peak_memory

FIXED = (
    *("model", "data", "run.seed", "train.batch_tokens", "train.dtype", "train.init_from"),
    *("quant", "qat", "distill", "adapter", "optim.optimizer"),
    *("optim.beta1", "optim.beta2", "optim.eps", "optim.muon_momentum", "optim.muon_ns_steps"),
)
"""What a run keeps for life: changing one of these makes it another run, and resuming refuses."""
FREE = ("data.threads", "distill.device")
"""Keys of those that may change all the same."""


def train(config: Config, command: str) -> None:
    """Run ``config`` (resolved) to its end, or until SIGINT, SIGTERM or SIGHUP, which after the
    checkpoint raises ``typer.Exit`` with 128 + its number. ``command`` resumes the run."""
    # -- Set up: device, data, model, optimizer -----------------------------------------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device, "train.device")
    world = World(device)
    bf16 = config.train.dtype == "bf16" or (config.train.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    data_path = prepare(config.data)
    train_set, val_set = TokenDataset(data_path, "train"), TokenDataset(data_path, "val")
    tokenizer, data_hash = train_set.tokenizer(), sha256(data_path / INDEX)
    sample_prompt = encode_prompt(tokenizer, config.eval.sample_prompt)
    if len(sample_prompt) >= config.model.max_seq_len:
        raise UserError(
            f"eval.sample_prompt has {len(sample_prompt)} tokens, which leaves no room in the "
            f"context of {config.model.max_seq_len}"
        )
    seq_len, total_steps = config.data.seq_len, config.train.steps
    loader = Loader(train_set, seq_len, config.batch_sequences, config.run.seed)

    run_dir, checkpoints = config.run_dir, config.run_dir / "checkpoints"
    saved = checkpoint.resume(checkpoints)
    changes: list[str] = []
    if saved is not None:
        changes = allowed_changes(saved.state["config"], to_dict(config), run_dir)

    torch.manual_seed(config.run.seed)
    model = build_model(config, tokenizer.hash, fresh=saved is None)
    model.to(device)
    trained = compiled(model) if config.train.compile else model
    optimizers = build_optimizer(model, config.optim)
    telemetry = Telemetry(model)
    distiller, teacher_hash = None, ""
    if config.distill.teacher:
        teacher_device = device
        if config.distill.device:
            teacher_device = pick_device(config.distill.device, "distill.device")
        with reporting("loading the teacher"):
            teacher = load_teacher(config.distill, model, tokenizer.hash, seq_len, teacher_device)
        teacher_hash = read_config(Path(config.distill.teacher)).config_sha256
        distiller = Distiller(teacher, model, config.distill, bf16)

    # -- Resume, if this run has begun ---------------------------------------------------------
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    step, tokens, skipped, skipped_in_a_row, best_loss = 0, 0, 0, 0, math.inf
    if saved is not None:
        if saved.state["data"] != data_hash:
            raise UserError(
                f"data.path = {data_path} was prepared anew since this run began, from other text; "
                "bring the old set back, or give the new run another run.name"
            )
        if distiller is not None:
            if saved.state["teacher"] != teacher_hash:
                raise UserError(
                    f"distill.teacher = {config.distill.teacher} is another model than when this "
                    "run began; bring the old one back, or give the new run another run.name"
                )
            distiller.load_state(saved.state["distill"])
        model.load_state_dict(saved.tensors["model"])
        telemetry.load_state(saved.tensors["telemetry"])
        for i, optimizer in enumerate(optimizers.optimizers):
            structure = saved.state["optimizers"][i]
            checkpoint.load_optimizer(optimizer, saved.tensors[f"optimizer_{i}"], structure)
        checkpoint.set_rng_state(saved.state["rng"])
        step, tokens = saved.step, saved.state["tokens"]
        skipped = saved.state["skipped"]
        best_loss = saved.state["best_loss"] if saved.state["best_loss"] is not None else math.inf
    metrics.rewind(step if saved is not None else -1)
    if step < total_steps:  # a finished run keeps the record of what it was trained with
        write_atomic(run_dir / "config.toml", to_toml(config).encode())

    def save_checkpoint(val_loss: float | None) -> None:
        metrics.sync()
        groups = {"model": model.state_dict(), "telemetry": telemetry.state()}
        structures = []
        for i, optimizer in enumerate(optimizers.optimizers):
            groups[f"optimizer_{i}"], structure = checkpoint.optimizer_tensors(optimizer)
            structures.append(structure)
        state = {
            "config": to_dict(config),
            "optimizers": structures,
            "rng": checkpoint.rng_state(),
            "tokens": tokens,
            "skipped": skipped,
            "data": data_hash,
            "teacher": teacher_hash,
            "distill": distiller.state() if distiller is not None else {},
            "best_loss": best_loss if math.isfinite(best_loss) else None,
        }
        checkpoint.save(checkpoints, step, groups, state, val_loss)
        checkpoint.prune(checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best)

    def validate() -> EvalResult:
        windows = sequential_windows(val_set, seq_len, config.eval.max_tokens)
        with autocast:
            return evaluate_windows(model, windows, tokenizer.count_bytes, config.eval.micro_batch)

    def forward(inputs_BT: torch.Tensor) -> None:
        with undisturbed(model, device), torch.no_grad(), autocast:
            model(inputs_BT)

    throughput, watch = Throughput(), CoreWatch()
    peak, peak_source = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
    flops_per_token = config.model.flops_per_token(seq_len)

    with Console(total_steps, step, every=config.log.every) as console, stop_signals() as stop:
        saved_step = step if saved is not None else -1
        for message in saved.damaged if saved is not None else []:
            console.warn(message)
        console.print(one_line(config))
        console.print(
            f"on {device}, {'bf16 autocast' if bf16 else 'fp32'}; "
            f"{human(train_set.n_tokens)} training tokens, so "
            f"{config.train.tokens / train_set.n_tokens:.2g} epochs; "
            f"MFU against {human(peak, 'FLOP/s')} ({peak_source})"
        )
        if step:
            nothing = "" if step < total_steps else f" of {total_steps}: nothing is left to train"
            console.print(f"resumed at step {step}{nothing}")
        if changes:
            console.warn(f"changed since this run was last started: {'; '.join(changes)}")
        for line in quantization_lines(config):
            console.print(line)
        if config.train.compile:
            console.print("the first step compiles, which takes minutes; its tokens/s and ETA too")
        if config.train.init_from and saved is None:
            source = read_config(Path(config.train.init_from)).quant
            if source.enabled and source != config.quant:
                console.warn(
                    f"[quant] is not that of {config.train.init_from} ({source}), whose learned "
                    "scales and ranges are therefore left behind"
                )
        if val_set.n_tokens < 10_000:
            console.warn(
                f"only {val_set.n_tokens} validation tokens: val_loss will be noisy; a larger "
                "data.val_fraction, in another data.path, steadies it"
            )
        tracker = Tracker(config.log, run_dir, config.run.name, to_dict(config), console.warn)

        # -- The loop ---------------------------------------------------------------------------
        compiles = config.train.compile
        while step < total_steps and not stop:
            console.doing(f"step {step + 1}{', which compiles' if compiles else ''}")
            compiles = False
            watch.begin()
            inputs, targets = (world.share(t) for t in loader.batch(step))
            model.train()
            schedule = {}
            if config.quant.enabled:
                lambda_w, lambda_a = set_step(model, step, total_steps, config.qat)
                schedule = {"lambda_w": lambda_w, "lambda_a": lambda_a}
            micro_batches = split(inputs, targets, config.train.micro_batch)
            if distiller is not None:
                distiller.begin(step)
            done = train_step(
                trained,
                optimizers,
                micro_batches,
                step,
                total_steps,
                config.optim,
                autocast,
                world,
                cross_entropy if distiller is None else distiller.losses,
            )
            finite = done.finite
            step, tokens = step + 1, tokens + config.train.batch_tokens
            skipped, skipped_in_a_row = (
                (skipped, 0) if finite else (skipped + 1, skipped_in_a_row + 1)
            )
            throughput.step(config.train.batch_tokens)

            # -- Look at what came of it --------------------------------------------------------
            last = step == total_steps
            row: dict[str, Any] = {
                "step": step,
                "tokens": tokens,
                "loss": done.loss,
                "lr": config.optim.lr * done.lr_factor,
                "wd": done.weight_decay,
                "grad_norm": done.grad_norm,
                "tokens_per_second": throughput.tokens_per_second,
                "mfu": mfu(flops_per_token, throughput.tokens_per_second, peak),
                "peak_memory_bytes": peak_memory(device),
                "skipped": skipped,
                **schedule,
                **(distiller.readings() if distiller is not None else {}),
            }
            val_loss = None
            with throughput.pause():
                if device.type == "cpu" and (
                    hint := watch.end(partial(forward, micro_batches[0][0]))
                ):
                    console.warn(hint)
                if config.log.telemetry_every and step % config.log.telemetry_every == 0:
                    with autocast:
                        row |= telemetry.read(micro_batches[0][0])
                if step % config.log.every == 0 or last or not finite or "ternary/zeros" in row:
                    metrics.append(row)
                    tracker.log(row, step)
                console.progress(step, row)
                if not finite:
                    console.warn(
                        f"step {step}: loss {done.loss}, gradient norm {done.grad_norm}: skipped"
                    )
                    if skipped_in_a_row >= config.train.max_bad_steps:
                        tracker.finish(1)
                        kept = f"is kept in {checkpoints}" if saved_step >= 0 else "was not reached"
                        raise UserError(
                            f"{skipped_in_a_row} steps in a row were not finite (up to step "
                            f"{step}); a good checkpoint {kept}. A lower optim.lr or "
                            "optim.grad_clip often helps; both may change on resume"
                        )
                if step % config.eval.every == 0 or last:
                    console.doing(f"step {step}: evaluation")
                    result = validate()
                    with autocast:
                        sample = sample_text(model, tokenizer, sample_prompt, config)
                    val_loss = result.loss
                    evaluation = {
                        "step": step,
                        "tokens": tokens,
                        "val_loss": val_loss,
                        "val_bpb": result.bits_per_byte,
                        "sample": sample,
                    }
                    metrics.append(evaluation)
                    tracker.log(evaluation, step)
                    console.progress(step, row | evaluation)
                    console.print(
                        f"step {step}: validation loss {val_loss:.4f}, "
                        f"{result.bits_per_byte:.4f} bits per byte"
                        + (f"\n{sample}" if sample else "")
                    )
                improved = val_loss is not None and val_loss < best_loss
                if improved and val_loss is not None:
                    best_loss = val_loss
                due = step % config.checkpoint.every == 0 or (
                    improved and config.checkpoint.keep_best
                )
                if (due or last) and finite:  # in a streak of bad steps the weights may be why
                    save_checkpoint(val_loss)
                    saved_step = step

        # -- Done, or asked to stop --------------------------------------------------------------
        if saved_step != step:
            save_checkpoint(None)
        tracker.finish()
        if step < total_steps:
            console.print(f"stopped at step {step} and saved; resume with\n  {command}")
            raise typer.Exit(128 + stop[0])
        if config.adapter.kind != "none":
            before, report = validate().loss, merge_adapters(model)
            after = validate().loss
            console.print(f"{report}\nvalidation loss {before:.4f} adapted, {after:.4f} merged")
        saved_model, quant = as_saved(model, config.quant)
        folder = save_model(run_dir / "model", saved_model, tokenizer, quant=quant)
        integers = quant.enabled or saved_model.config.linear == "ternary"
        then = f"pack {folder}" if integers else f"ptq {folder} --data {config.data.path}"
        console.print(
            f"done: the model is in {folder}\n"
            f"  bitnet generate {folder} --prompt TEXT      bitnet {then}"
        )


def allowed_changes(old: dict[str, Any], new: dict[str, Any], run_dir: Path) -> list[str]:
    """How the config of a begun run differs; raises UserError for what cannot change. A key that
    did not exist when it began had its default."""
    defaults, old = to_dict(Config()), with_new_keys(old)
    steps = old["train"]["steps"], new["train"]["steps"]
    quantized = Recipe(**new["quant"]).enabled and QATConfig(**new["qat"]).depends_on_length
    if quantized and steps[0] != steps[1]:
        raise UserError(
            f"train.steps = {steps[1]}: {run_dir} holds a run of {steps[0]} steps, and qat.start "
            "with the rest of [qat] are shares of them: what is quantized already would be full "
            "precision again. Change it back; or go on from its model with train.init_from, under "
            "another run.name"
        )
    old = {section: defaults.get(section, {}) | old.get(section, {}) for section in defaults | old}
    keys = {change.partition(":")[0]: change for change in differences(old, new)}
    fixed = [
        change
        for key, change in keys.items()
        if (key in FIXED or key.partition(".")[0] in FIXED) and key not in FREE
    ]
    if fixed:
        raise UserError(
            f"{run_dir} holds a run with another config: {'; '.join(fixed)}. Change it back, or "
            "give the new run another run.name"
        )
    return list(keys.values())


def sample_text(model: Transformer, tokenizer: Tokenizer, prompt: list[int], config: Config) -> str:
    """A greedy continuation of ``eval.sample_prompt``, to see what a loss means."""
    n_tokens = config.eval.sample_tokens
    if not n_tokens:
        return ""
    try:
        (new,) = generate(model, [prompt], n_tokens, eos_id=tokenizer.eos_ids)
    except UserError as error:  # logits that are not finite: the loss says so too
        return f"(no sample: {error})"
    return tokenizer.decode([*prompt, *new])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT, SIGTERM or SIGHUP is added to. A second SIGINT or SIGTERM
    ends the process at once."""
    stop: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        drop_closed_terminal()
        if stop and number != signal.SIGHUP:  # of which shells send two
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.append(number)

    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, *ending_signals())}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder: two processes that train in one would destroy each other's work."""
    lock = run_dir / ".lock"
    with user_input(f"run.dir: {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.touch()  # an unwritable folder is an error here, and not a wait below
        check_file(lock)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{run_dir}: another process is training in this folder") from None


def main(
    args: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.toml... [SECTION.KEY=VALUE...]", show_default=False),
    ],
) -> None:
    """Train a model from TOML configs, later ones winning, and single keys, which win over them.

    The same command again resumes the run from its newest whole checkpoint. Ctrl-C, SIGTERM
    or a closed terminal saves one and ends with exit code 130, 143 or 129.
    """
    paths, overrides = split_args(args)
    if not paths:
        raise UserError("no config given: python train.py configs/quickstart.toml")
    config = load_config(paths, overrides).resolve()
    if config.distill.teacher:  # a mistake shows before a run folder is made
        read_config(Path(config.distill.teacher))
    with locked(config.run_dir):
        train(config, shlex.join(["python", *sys.argv]))


def command() -> None:
    """The command line, which ends as bitnet/cli/shell.py says."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=config_help())(main)
    run(app)


if __name__ == "__main__":
    command()
