"""``bitnet plan``: what to train in so many hours, and what is known about such runs."""

import shlex
from typing import Annotated

import typer

from bitnet.cli.common import split_args
from bitnet.config import Config, load_config
from bitnet.plan import (
    MEASURED,
    STUDY_BATCH,
    Cell,
    Plan,
    Study,
    all_depths,
    load_study,
    measured_speed,
    nearest,
    propose,
    shape_words,
)
from bitnet.progress import plain_console, reporting
from bitnet.summary import human


def plan_command(
    hours: Annotated[
        float, typer.Option(help="Hours of training on this machine's CPU.", min=0.001, max=1e5)
    ],
    args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]... [SECTION.KEY=VALUE]...",
            help="What to train, at a depth to be found. Default: quickstart.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens of the run. 0: 20 per parameter.", min=0, max=10**13),
    ] = 0,
) -> None:
    """Propose depth, batch and tokens for some hours of training.

    Trains four small models for some seconds each, on random tokens, to measure this CPU; half
    a minute in all, and longer with large batches. Then proposes the largest model.depth whose
    20 tokens per parameter fit into the time, with the command that trains it. Larger depths
    are assumed to reach the FLOP/s of the largest measured one. Other programs on the machine
    slow the measurement as they would the run.

    It also names the nearest run of the scaling study (docs/evidence.md), whose best rate for
    Muon the command takes unless you set one, and predicts the loss on the study's books and
    the cost of ternary weights, with 95% intervals; other text has other losses. The study
    predicts ternary models trained with Muon at about 2,048 tokens per step, up to a doubling
    outside its range of weights and its range of tokens per weight. Nothing is said of others.

    Example: bitnet plan --hours 2

    Example: bitnet plan --hours 8 --tokens 100000000 15m
    """
    words = args or ["quickstart"]
    paths, overrides = split_args(words)
    if not paths:
        words = ["quickstart", *words]
        paths, overrides = split_args(words)
    configs = all_depths(paths, overrides)
    speeds = []
    for depth in MEASURED:
        with reporting(f"measuring depth {depth}"):
            speeds.append(measured_speed(configs[depth - 1], 6.0))
    plan = propose(configs, speeds, hours, tokens)
    config = plan.config
    console = plain_console(highlight=False, soft_wrap=True)
    how = "measured" if plan.measured else f"at the FLOP/s of depth {MEASURED[-1]}"
    console.print(
        f"depth {config.model.depth}: {human(config.model.num_parameters()['total'])} parameters; "
        f"{config.train.steps:,} steps of {config.train.batch_tokens:,} tokens = "
        f"{human(config.train.tokens)}; about {plan.hours:.3g} hours, "
        f"{plan.tokens_per_second:,.0f} tokens/s ({how})"
    )
    study = load_study()
    cell = nearest(study.cells, plan.weights, config.train.tokens)
    given = load_config(paths, overrides).optim.muon_lr
    length = ("train.steps", "train.tokens")
    own = [word for word in words if word.partition("=")[0].strip() not in length]
    command = [*own, *shape_words(paths, overrides, config.model.depth)]
    if is_known(config) and cell and not given:
        command.append(f"optim.muon_lr={cell.muon_lr:g}")
    if load_config(paths).train.tokens:
        command.append("train.tokens=0")
    command.append(f"train.steps={config.train.steps}")
    console.print(f"  bitnet train {shlex.join(command)}")
    console.print(expectation(plan, study, cell, given))


def is_known(config: Config) -> bool:
    """Whether the study trained such runs: ternary, Muon, batches within a factor of 4 of its."""
    return (
        config.model.linear == "ternary"
        and config.optim.optimizer == "muon"
        and STUDY_BATCH / 4 <= config.train.batch_tokens <= STUDY_BATCH * 4
    )


def expectation(plan: Plan, study: Study, cell: Cell | None, given: float) -> str:
    """What the study says of a plan.

    Arguments:
        cell: the nearest; None: the plan is too far from all.
        given: ``optim.muon_lr`` as the user set it; 0: not set.
    """
    config, cells, tokens = plan.config, study.cells, plan.config.train.tokens
    if not is_known(config):
        return (
            "The scaling study predicts ternary models trained with Muon at about "
            f"{STUDY_BATCH:,} tokens per step. This run has "
            f'model.linear = "{config.model.linear}", '
            f'optim.optimizer = "{config.optim.optimizer}" and '
            f"train.batch_tokens = {config.train.batch_tokens}: no loss is predicted for it."
        )
    if cell is None:
        sizes = [human(pick(cell.weights for cell in cells)) for pick in (min, max)]
        lengths = [f"{pick(cell.tokens_per_weight for cell in cells):.0f}" for pick in (min, max)]
        covered = [" to ".join(dict.fromkeys(ends)) for ends in (sizes, lengths)]
        return (
            f"The study covers {covered[0]} weights in matrices at {covered[1]} "
            f"tokens per weight. This run has {human(plan.weights)} and "
            f"{tokens / plan.weights:.0f}: too far to say what ternary costs or which "
            "optim.muon_lr is best."
        )
    if study.gap is None or study.bits_per_byte is None:
        said = "The scaling study has too few tuned runs to predict how such a run would end."
    else:
        gap, about = study.gap.predict(plan.weights, tokens)
        bits, near = study.bits_per_byte.predict(plan.weights, tokens)
        said = (
            "On the books of the scaling study, at its best Muon rate, such a run would end at "
            f"{bits:.2f} bits per byte ({bits - near:.2f} to {bits + near:.2f}), "
            f"{gap:+.3f} nats per token from full precision "
            f"({gap - about:+.3f} to {gap + about:+.3f})."
        )
    spread = f"{cell.low:+.3f} to {cell.high:+.3f}, {cell.seeds} seeds"
    spread = spread if cell.seeds > 1 else "one seed"
    rate = f"optim.muon_lr={cell.muon_lr:g}"
    rate += f" (this run has {given:g})" if given and given != cell.muon_lr else ""
    return (
        f"{said} Nearest run that was measured: {human(cell.weights)} weights in matrices, "
        f"{cell.tokens_per_weight:.0f} tokens per weight, {cell.gap:+.3f} nats per token from full "
        f"precision ({spread}). It was best at {rate}, with {STUDY_BATCH:,} tokens per step."
    )
