"""A run and its folder: its lock, stop signals, state on disk, and the keys that may change.

A run lives in ``run.dir/run.name``:

    config.toml       resolved
    metrics.jsonl     one object per logged step or evaluation
    checkpoints/      the state of the run, written by :meth:`Run.save`
    model/            the trained model, when the run is done

The data, the schedules and the model (it has no dropout) are pure functions of (seed, step). So a
checkpoint restores only the weights (including learned scales, observers and adapters), the
optimizers' state, the telemetry's last codes, the balance of a distillation and a few counters.
"""

import dataclasses
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from bitnet.config import Config, differences, to_dict
from bitnet.data.mixture import MAX_EPOCHS
from bitnet.data.parts import Part
from bitnet.export.folder import read_config
from bitnet.model import Transformer
from bitnet.qat.recipe import Recipe
from bitnet.qat.schedule import QATConfig
from bitnet.schema import UserError, check_file, user_input, with_new_keys
from bitnet.signals import drop_closed_terminal, ending_signals
from bitnet.summary import human, one_line, quantization_lines
from bitnet.training import checkpoint
from bitnet.training.checkpoint import Checkpoint, Saver
from bitnet.training.distill import Distiller
from bitnet.training.distributed import World
from bitnet.training.metrics import RunLog
from bitnet.training.optim import Optimizers
from bitnet.training.state import load_optimizer, optimizer_tensors, rng_state, set_rng_state
from bitnet.training.step import StepResult
from bitnet.training.telemetry import Telemetry
from bitnet.training.throughput import Meter

FIXED = (
    *("model", "data", "run.seed", "train.batch_tokens", "train.dtype", "train.init_from"),
    *("quant", "qat", "distill", "adapter", "optim.optimizer"),
    *("optim.beta1", "optim.beta2", "optim.eps", "optim.muon_momentum", "optim.muon_ns_steps"),
)
"""Keys and sections that must not change in a run: a change is an error on resume."""
FREE = ("data.threads", "distill.device")
"""Exceptions: keys in those sections that may change."""


@dataclasses.dataclass
class Run:
    """A run in progress: the trained objects, the counters, and how both are saved and restored."""

    config: Config
    """Resolved."""
    model: Transformer
    optimizers: Optimizers
    telemetry: Telemetry
    distiller: Distiller | None
    data_hash: str
    """Hash of the prepared data's index."""
    teacher_hash: str
    """Hash of the teacher's config; "" without distillation."""
    world: World
    """The processes that train; each has a Run."""
    step: int = 0
    """Steps completed."""
    tokens: int = 0
    """Tokens trained on."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of the latest steps in this process were all skipped."""
    best_loss: float = math.inf
    """Lowest validation loss, in nats."""
    saved_step: int = -1
    """Step of the newest checkpoint; -1: there is none."""

    def __post_init__(self) -> None:
        self.saver = Saver(self.checkpoints, self.config.checkpoint, self.world)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return _checkpoints(self.config)

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: the next step is the same as in an uninterrupted run.

        Raises:
            UserError: the data or the teacher differ from the start of the run.
        """
        state, config = saved.state, self.config
        if state["data"] != self.data_hash:
            raise UserError(
                f"data.path = {config.data.path} was prepared anew since this run began, from "
                "other text; bring the old set back, or give the new run another run.name"
            )
        if self.distiller is not None:
            if state["teacher"] != self.teacher_hash:
                raise UserError(
                    f"distill.teacher = {config.distill.teacher} is another model than when this "
                    "run began; bring the old one back, or give the new run another run.name"
                )
            self.distiller.load_state(state["distill"])
        weights = self.model.state_dict()
        saved.read_into("model", weights)
        self.model.load_state_dict(weights)  # the values are in place; this runs the layers' hooks
        self.telemetry.load_state(saved.read("telemetry"))
        for i, optimizer in enumerate(self.optimizers.optimizers):
            structure = state["optimizers"][i]
            load_optimizer(optimizer, self.model, saved, f"optimizer_{i}", structure)
        ranks = state.get("ranks") or [state]  # older checkpoints have one process's state
        set_rng_state(ranks[self.world.rank % len(ranks)]["rng"])
        self.step = self.saved_step = saved.step
        self.tokens, self.skipped = state["tokens"], state["skipped"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]

    def save(self, log: RunLog, val_loss: float | None) -> None:
        """Write a checkpoint of this step after its metrics are on disk, and delete old ones. All
        processes call it. Training may continue during the writing (:class:`Saver`).

        Arguments:
            val_loss: validation loss of this step, in nats; None if it was not measured.
        """
        log.sync()
        weights = self.model.state_dict(keep_vars=True)  # so that a tied weight is one object
        groups = {"model": weights, "telemetry": self.telemetry.state()}
        structures = []
        for i, optimizer in enumerate(self.optimizers.optimizers):
            groups[f"optimizer_{i}"], structure = optimizer_tensors(optimizer, self.model)
            structures.append(structure)
        state = {
            "config": to_dict(self.config),
            "optimizers": structures,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "data": self.data_hash,
            "teacher": self.teacher_hash,
            "distill": self.distiller.state() if self.distiller is not None else {},
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
        }
        self.saver.save(self.step, groups, state, {"rng": rng_state()}, val_loss)
        self.saved_step = self.step

    def finish_saving(self, log: RunLog) -> None:
        """At the end or stop of a run, save this step if it is not saved yet. Return when its
        checkpoint is on the disk."""
        if self.saved_step != self.step:
            self.save(log, None)
        self.saver.wait()

    def count(self, finite: bool) -> None:
        """Count a step that has just ended."""
        self.step += 1
        self.tokens += self.config.train.batch_tokens
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def check_finite(self, log: RunLog, result: StepResult) -> None:
        """Warn about a step that was not finite.

        Raises:
            UserError: ``train.max_bad_steps`` steps in a row were not finite.
        """
        if result.finite:
            return
        log.warn(f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped")
        if self.skipped_in_a_row >= self.config.train.max_bad_steps:
            kept = f"is kept in {self.checkpoints}" if self.saved_step >= 0 else "was not reached"
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row were not finite (up to step {self.step}); "
                f"a good checkpoint {kept}. A lower optim.lr or optim.grad_clip often helps; both "
                "may change on resume"
            )

    def save_if_due(self, log: RunLog, val_loss: float | None) -> None:
        """Save every ``checkpoint.every`` steps, at the end, and when the validation loss is the
        lowest so far. Do not save after a step that was not finite: the weights may be why."""
        config = self.config
        self.saver.check()
        if self.skipped_in_a_row:
            return
        due = self.step % config.checkpoint.every == 0 or self.step == config.train.steps
        if val_loss is not None and val_loss < self.best_loss:
            self.best_loss = val_loss
            due = due or config.checkpoint.keep_best
        if due:
            self.save(log, val_loss)


def _checkpoints(config: Config) -> Path:
    return config.run_dir / "checkpoints"


def find_saved(config: Config, world: World) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run (None if the run is new), and warnings. All processes
    call it and get the same result.

    Raises:
        UserError: no checkpoint is complete, or the config changes a key that must not change.
    """
    saved = checkpoint.resume(_checkpoints(config), world)
    if saved is None:
        return None, []
    changes = allowed_changes(saved.state["config"], to_dict(config), config.run_dir)
    changed = f"changed since this run was last started: {'; '.join(changes)}"
    return saved, [*saved.damaged, *([changed] if changes else [])]


def announce(
    log: RunLog,
    run: Run,
    warnings: list[str],
    meter: Meter,
    parts: Sequence[Part],
    epochs: Sequence[float],
) -> None:
    """Print the first lines of a run, with warnings.

    Arguments:
        warnings: from :func:`find_saved`.
        parts: of the data. epochs: how often the whole run reads each part.
    """
    config, total_steps = run.config, run.config.train.steps
    log.print(one_line(config))
    train_tokens = sum(part.train.n_tokens for part in parts)
    log.print(
        f"on {meter.device}, {'bf16 autocast' if meter.bf16 else 'fp32'}; "
        f"{human(train_tokens)} training tokens, so "
        f"{config.train.tokens / train_tokens:.2g} epochs; "
        f"MFU against {human(meter.peak, 'FLOP/s')} ({meter.peak_source})"
    )
    if config.data.document_mask:
        log.print("the documents of a sequence are kept apart (data.document_mask)")
    if len(parts) > 1:
        log.print("\n".join(mixture_lines(parts, epochs)))
        for part, times in zip(parts, epochs, strict=True):
            if times > MAX_EPOCHS:
                log.warn(
                    f"data.sources: {part.name} is read {times:.1f} times: beyond {MAX_EPOCHS} a "
                    "repeated text teaches much less than a new one; lower its weight"
                )
    if run.step:
        nothing = "" if run.step < total_steps else f" of {total_steps}: nothing is left to train"
        log.print(f"resumed at step {run.step}{nothing}")
    for warning in warnings:
        log.warn(warning)
    for line in quantization_lines(config):
        log.print(line)
    if config.train.compile:
        log.print("the first step compiles, which takes minutes; its tokens/s and ETA too")
    if config.train.init_from and run.saved_step < 0:
        source = read_config(Path(config.train.init_from)).quant
        if source.enabled and source != config.quant:
            log.warn(
                f"[quant] is not that of {config.train.init_from} ({source}), whose learned "
                "scales and ranges are therefore left behind"
            )
    for part in parts:
        if part.val.n_tokens < 10_000:
            which, name = (f" of {part.name}", f"/{part.name}") if len(parts) > 1 else ("", "")
            log.warn(
                f"only {part.val.n_tokens} validation tokens{which}: val_loss{name} will be noisy; "
                "a larger data.val_fraction, in another data.path, steadies it"
            )


def mixture_lines(parts: Sequence[Part], epochs: Sequence[float]) -> list[str]:
    """One line per part: its share of the sequences, its size, and how often the run reads it."""
    total = sum(part.weight for part in parts)
    return [
        f"  {part.name}: {part.weight / total:.1%} of the sequences, "
        f"{human(part.train.n_tokens)} tokens, {times:.2g} epochs"
        for part, times in zip(parts, epochs, strict=True)
    ]


def allowed_changes(old: dict[str, Any], new: dict[str, Any], run_dir: Path) -> list[str]:
    """The changes from the config of an existing run to a new one; UserError for a key in
    :data:`FIXED`.

    A key that did not exist when the run began counts as its default.
    """
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


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the run folder: two processes training in one would destroy each other's work."""
    lock = run_dir / ".lock"
    with user_input(f"run.dir: {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.touch()  # raises for an unwritable folder, on which the code below would wait
        check_file(lock)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{run_dir}: another process is training in this folder") from None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which the first SIGINT, SIGTERM or SIGHUP is added. A second SIGINT or
    SIGTERM ends the process at once."""
    stop: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        drop_closed_terminal()
        if stop and number != signal.SIGHUP:  # a shell may send SIGHUP twice
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.append(number)

    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, *ending_signals())}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
