"""Train a language model from one config, from top to bottom.

    python train.py configs/quickstart.toml
    python train.py configs/15m.toml optim.lr=2e-3 run.name=my-run
    bitnet train 15m                    this file and that config, from an installed package
    torchrun --nproc-per-node 2 train.py configs/15m.toml

This file is the whole run: set up, resume, loop, save. The functions that it calls are in bitnet/,
one subject per file. A run lives in runs/NAME/. The same command resumes it from the newest
complete checkpoint, as if it had never stopped (bitnet/run.py).

A step, in order: set how far the model is quantized ([qat]); quantize each weight once; forward
and backward over the micro-batches; clip the gradient; update, unless a number is not finite
(bitnet/training/step.py). Telemetry, the line in metrics.jsonl and evaluation follow. The
checkpoint comes last, so metrics.jsonl is never behind it.

Under torchrun each process runs this file (bitnet/training/distributed.py). The processes share
each batch and each evaluation. The main process prepares the data, writes the files and prints.
"""

from bitnet.cli.shell import run, start

if __name__ == "__main__":  # Ctrl-C during the imports below shows no traceback
    start()

import dataclasses
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.distributed.elastic.multiprocessing.errors import record

from bitnet.bitlinear import gather_codes
from bitnet.build import as_saved, build_model, undivided
from bitnet.cli.common import config_help, pick_device, split_args
from bitnet.config import Config, load_config, to_dict, to_toml
from bitnet.data.loader import Loader, sequential_windows
from bitnet.data.parts import Part, hash_of, loader_of, open_parts
from bitnet.data.prefetch import Prefetcher
from bitnet.data.tokenizer import Tokenizer
from bitnet.durable import write_atomic
from bitnet.evaluate import EvalResult, evaluate_windows, evaluation_mode, mixed
from bitnet.export.folder import chat_template_of, read_config, save_model
from bitnet.generate import encode_prompt, generate
from bitnet.model import KVCache, Transformer
from bitnet.progress import reporting
from bitnet.qat.adapters import merge_adapters
from bitnet.qat.schedule import set_step
from bitnet.run import Run, announce, find_saved, locked, stop_signals
from bitnet.schema import UserError
from bitnet.training.distill import Distiller, load_teacher
from bitnet.training.distributed import (
    Launch,
    World,
    joined,
    one_report,
    parallel,
    place,
    recompute,
)
from bitnet.training.metrics import RunLog
from bitnet.training.optim import build_optimizer
from bitnet.training.start import facts_of
from bitnet.training.step import compile_blocks, compiled, cross_entropy, split, train_step
from bitnet.training.telemetry import Telemetry, undisturbed
from bitnet.training.throughput import CoreWatch, Meter


def train(config: Config, command: str, world: World) -> None:
    """Train by ``config`` (resolved) to the last step, or until SIGINT, SIGTERM or SIGHUP.

    Arguments:
        command: the command that resumes the run, shown when the run stops early.
        world: this process among all the processes of the run.
    Raises:
        typer.Exit: a signal arrived and the run is saved; the code is 128 + the signal's number.
    """
    # -- Set up: device, data, model, optimizer -----------------------------------------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device, micro_batch = world.device, config.micro_batch(world.size)
    bf16 = config.train.dtype == "bf16" or (config.train.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with world.main_first("data"):
        data = open_data(config, told=world.is_main)

    saved, warnings = find_saved(config, world)
    torch.manual_seed(config.run.seed)
    model = build_model(config, data.tokenizer.hash, fresh=saved is None)
    model.document_separator = data.tokenizer.eos_id if config.data.document_mask else None
    if config.train.compile and world.mesh is not None:
        compile_blocks(model.layers)
    recompute(model.layers, config.distributed.activation_checkpointing)
    prepare = partial(gather_codes, as_codes=config.distributed.gather == "codes")
    place(model, model.layers, world, prepare)
    optimizers, telemetry = build_optimizer(model, config.optim), Telemetry(model)
    distiller, teacher_hash = open_teacher(config, model, data.tokenizer, bf16, world)
    stepped = compiled(model) if config.train.compile and world.mesh is None else model
    stepped = parallel(stepped, world, idle_parameters=config.quant.enabled)
    losses = cross_entropy if distiller is None else distiller.losses

    # -- Resume, if this run has begun ---------------------------------------------------------
    run = Run(config, model, optimizers, telemetry, distiller, data.hash, teacher_hash, world)
    if saved is not None:
        run.restore(saved)
    first_step, total_steps = run.step, config.train.steps
    resumed_at = saved.step if saved is not None else None
    log = RunLog(config.log, config.run_dir, resumed_at, total_steps, silent=not world.is_main)
    # a finished run keeps the record of what it was trained with
    if run.step < total_steps and world.is_main:
        write_atomic(config.run_dir / "config.toml", to_toml(config).encode())

    watch, flops_per_token = CoreWatch(), config.model.flops_per_token(config.data.seq_len)
    meter = Meter(device, bf16, flops_per_token / world.size)

    make = partial(data.loader.batch, rank=world.data_rank, world_size=world.data_size)
    batches = Prefetcher(make, device, run.step, total_steps)
    with batches, log, run.saver, stop_signals() as stop:
        announce(log, run, warnings, meter, data.parts, data.loader.epochs(total_steps))
        if world.size > 1:
            groups = f" in groups of {n}" if (n := world.tensor_parallel) > 1 else ""
            log.print(
                f"{world.size} processes{groups}, {config.strategy(world.size)}, {micro_batch} "
                f"sequences per forward of each{' group' if groups else ''}"
            )
        log.track(config.run.name, to_dict(config))

        # -- The loop ---------------------------------------------------------------------------
        while run.step < total_steps and not (ended := world.maximum(max(stop, default=0))):
            compiles = config.train.compile and run.step == first_step
            log.doing(f"step {run.step + 1}{', which compiles' if compiles else ''}")
            watch.begin()
            micro_batches = split(*batches.take(run.step), micro_batch)
            sample = micro_batches[0][0]
            model.train()
            schedule = {}
            if config.quant.enabled:
                lambda_w, lambda_a = set_step(model, run.step, total_steps, config.qat)
                schedule = {"lambda_w": lambda_w, "lambda_a": lambda_a}
            if distiller is not None:
                distiller.begin(run.step)
            when = run.step, total_steps, config.optim
            result = train_step(stepped, optimizers, micro_batches, *when, autocast, world, losses)
            run.count(result.finite)
            meter.step(config.train.batch_tokens, batches.waited)
            row: dict[str, Any] = {
                "step": run.step,
                "tokens": run.tokens,
                "loss": result.loss,
                "lr": config.optim.lr * result.lr_factor,
                "wd": result.weight_decay,
                "grad_norm": result.grad_norm,
                **meter.readings(),
                "skipped": run.skipped,
                **schedule,
                **(distiller.readings() if distiller is not None else {}),
            }

            # -- Read, evaluate, save -----------------------------------------------------------
            last = run.step == total_steps
            with meter.pause():
                forward = partial(forward_only, model, sample, autocast)
                alone = device.type == "cpu" and world.size == 1
                if alone and (hint := watch.end(forward)):
                    log.warn(hint)
                if config.log.telemetry_every and run.step % config.log.telemetry_every == 0:
                    with autocast:
                        row |= telemetry.read(sample)
                due = last or run.step % config.log.every == 0
                log.row(row, record=due or not result.finite or "ternary/zeros" in row)
                run.check_finite(log, result)
                val_loss = None
                if last or run.step % config.eval.every == 0:
                    val_loss = validate(log, run, data, autocast, world)
                run.save_if_due(log, val_loss)

        # -- Done, or asked to stop --------------------------------------------------------------
        run.finish_saving(log)
        if run.step < total_steps:
            log.print(f"stopped at step {run.step} and saved; resume with\n  {command}")
        else:
            save_trained(log, run, data, autocast, world)
    with world.main_first("end"):  # the others wait: torchrun might end the main one as it writes
        pass
    if run.step < total_steps:
        raise typer.Exit(128 + ended)


class Data(NamedTuple):
    """The prepared data of a run."""

    parts: list[Part]
    """One part, or the parts of a mixture."""
    loader: Loader
    tokenizer: Tokenizer
    hash: str
    """The hash of the parts."""
    sample_prompt: list[int]
    """``eval.sample_prompt`` as tokens."""


def open_data(config: Config, told: bool) -> Data:
    """Open the prepared data. Prepare it first if it is missing; ``told``: show the progress."""
    parts = open_parts(config.data, progress=told)
    loader = loader_of(parts, config.data.seq_len, config.batch_sequences, config.run.seed)
    tokenizer = parts[0].train.tokenizer()
    prompt = encode_prompt(tokenizer, config.eval.sample_prompt)
    if len(prompt) >= config.model.max_seq_len:
        raise UserError(
            f"eval.sample_prompt has {len(prompt)} tokens, which leaves no room in the "
            f"context of {config.model.max_seq_len}"
        )
    return Data(parts, loader, tokenizer, hash_of(parts), prompt)


def open_teacher(
    config: Config, model: Transformer, tokenizer: Tokenizer, bf16: bool, world: World
) -> tuple[Distiller | None, str]:
    """Load ``distill.teacher``: the distiller and the hash of the teacher's config. Without a
    teacher: None and ""."""
    if not config.distill.teacher:
        return None, ""
    device = model.norm.weight.device
    if config.distill.device:
        device = pick_device(config.distill.device, "distill.device")
    with reporting("loading the teacher"):
        teacher = load_teacher(config.distill, model, tokenizer.hash, config.data.seq_len, device)
    teacher.document_separator = model.document_separator
    teacher_hash = read_config(Path(config.distill.teacher)).config_sha256
    return Distiller(teacher, model, config.distill, bf16, world), teacher_hash


def forward_only(model: Transformer, tokens_BT: torch.Tensor, autocast: torch.autocast) -> None:
    """Run a forward without side effects, for timing."""
    with undisturbed(model, tokens_BT.device), torch.no_grad(), autocast:
        model(tokens_BT)


def evaluate(run: Run, data: Data, autocast: torch.autocast, world: World) -> list[EvalResult]:
    """Evaluate the model on the validation split of each part."""
    config, results = run.config, []
    for part in data.parts:
        windows = sequential_windows(part.val, config.data.seq_len, config.eval.max_tokens)
        measure, batch = data.tokenizer.count_bytes, config.eval.micro_batch
        with autocast:
            results.append(evaluate_windows(run.model, windows, measure, batch, world))
    return results


def overall(data: Data, results: list[EvalResult]) -> EvalResult:
    """Return one result for all parts, weighted as in training."""
    return mixed(results, [part.weight for part in data.parts])


def validate(log: RunLog, run: Run, data: Data, autocast: torch.autocast, world: World) -> float:
    """Evaluate, sample and log; returns the validation loss, in nats."""
    log.doing(f"step {run.step}: evaluation")
    results = evaluate(run, data, autocast, world)
    result = overall(data, results)
    with autocast:
        sample = sample_text(run.model, data, run.config.eval.sample_tokens, world)
    row = {
        "step": run.step,
        "tokens": run.tokens,
        "val_loss": result.loss,
        "val_bpb": result.bits_per_byte,
        "sample": sample,
    }
    each = ""
    if len(data.parts) > 1:
        for part, of_part, epochs in zip(
            data.parts, results, data.loader.epochs(run.step), strict=True
        ):
            row[f"val_loss/{part.name}"] = of_part.loss
            row[f"val_bpb/{part.name}"] = of_part.bits_per_byte
            row[f"epochs/{part.name}"] = epochs
            each += f"\n  {part.name} {of_part.loss:.4f}, {of_part.bits_per_byte:.4f} bits per byte"
    log.row(row, record=True)
    log.print(
        f"step {run.step}: validation loss {result.loss:.4f}, "
        f"{result.bits_per_byte:.4f} bits per byte{each}" + (f"\n{sample}" if sample else "")
    )
    return result.loss


def sample_text(model: Transformer, data: Data, n_tokens: int, world: World) -> str:
    """Continue ``eval.sample_prompt`` greedily, to show what text a loss corresponds to."""
    if not n_tokens:
        return ""
    if world.mesh is not None:
        new = continued(model, data.sample_prompt, n_tokens, data.tokenizer.eos_ids, world)
        return data.tokenizer.decode([*data.sample_prompt, *new])
    try:
        (new,) = generate(model, [data.sample_prompt], n_tokens, eos_id=data.tokenizer.eos_ids)
    except UserError as error:  # logits that are not finite: the loss says so too
        return f"(no sample: {error})"
    return data.tokenizer.decode([*data.sample_prompt, *new])


def continued(
    model: Transformer, prompt: list[int], n_tokens: int, eos_ids: Any, world: World
) -> list[int]:
    """Return greedy tokens from the model's own forward, in which all processes gather its
    weights. An engine needs a whole model."""
    device, new = model.norm.weight.device, list[int]()
    with evaluation_mode(model):
        own_heads = model.config.n_kv_heads // world.tensor_parallel
        config = dataclasses.replace(model.config, n_kv_heads=own_heads)
        cache = KVCache(config, 1, config.max_seq_len, device)
        tokens = prompt
        while len(new) < n_tokens and cache.length + len(tokens) < cache.max_len:
            logits_1TV = model(
                torch.tensor([tokens], device=device, dtype=torch.int64), cache=cache
            )
            tokens = [int(logits_1TV[0, -1].argmax())]
            if tokens[0] in eos_ids:
                break
            new += tokens
    return new


def save_trained(log: RunLog, run: Run, data: Data, autocast: torch.autocast, world: World) -> None:
    """Write the model folder of a finished run, with the adapters merged."""
    config = run.config
    if config.adapter.kind != "none":
        before = overall(data, evaluate(run, data, autocast, world)).loss
        report = merge_adapters(run.model)
        after = overall(data, evaluate(run, data, autocast, world)).loss
        log.print(f"{report}\nvalidation loss {before:.4f} adapted, {after:.4f} merged")
    model = undivided(run.model)
    if not world.is_main:
        return
    trained, quant = as_saved(model, config.quant)
    data.tokenizer.chat_template = chat_template_of(config.train.init_from)
    folder = save_model(config.run_dir / "model", trained, data.tokenizer, quant=quant)
    integers = quant.enabled or trained.config.linear == "ternary"
    then = f"pack {folder}" if integers else f"ptq {folder} --data {data.parts[0].train.path}"
    log.print(
        f"done: the model is in {folder}\n"
        f"  bitnet generate {folder} --prompt TEXT      bitnet {then}"
    )


def main(
    args: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [SECTION.KEY=VALUE...]", show_default=False),
    ],
) -> None:
    """Train a model from TOML configs. Later configs override earlier ones; keys override configs.

    A config is a file or the name of a config in the package: quickstart, 15m, fp/15m.

    The same command resumes the run from its newest complete checkpoint. Ctrl-C, SIGTERM or a
    closed terminal saves a checkpoint and ends the run with exit code 130, 143 or 129.
    """
    paths, overrides = split_args(args)
    if not paths:
        raise UserError("no config given: bitnet train quickstart")
    launch = Launch.from_environment()
    with one_report(launch):
        config = load_config(paths, overrides).resolve()
        if config.distill.teacher:  # report a wrong path before a run folder is made
            read_config(Path(config.distill.teacher))
        config.micro_batch(launch.size)
        device = pick_device(launch.device_name(config.train.device), "train.device")
        strategy = config.strategy(launch.size)
        facts = facts_of(to_dict(config), device) if launch.size > 1 else {}
        with (
            joined(config.distributed, strategy, launch, device, facts) as world,
            locked(config.run_dir) if world.is_main else nullcontext(),
        ):
            train(config, launch.command(sys.orig_argv[1:]), world)


def command() -> None:
    """The command line; bitnet/cli/shell.py handles errors and exit codes."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=config_help())(main)
    several = "TORCHELASTIC_ERROR_FILE" in os.environ
    run(record(app) if several else app)  # record: torchrun's table then has each traceback


if __name__ == "__main__":
    command()
