"""What the choices of a ternary model are worth: ablations.csv.

    python docs/results/ablations.py --data TRAIN --held-out TEXT --hours 2   # the missing rows
    python docs/results/ablations.py table                                    # from the CSV

Each variant differs from the ternary model of scaling.py in what its options say, at 0.1M weights
and 20 tokens per weight, with the same tokens in the same order, 3 seeds, and the learning rate of
the base; full precision has its own. Another rate may suit a variant better; none is searched.
Distillation is that of the logits: learning attention relations takes seven times as long here.
"""

import re
import statistics
import sys
from pathlib import Path

import scaling
from study import Job, Rows, main, read, tokens_for

WHERE = ("0.1M", 20.0)
"""Size and tokens per weight."""
CSV = Path(__file__).resolve().parent / "ablations.csv"
QAT = ("model.linear=fp", "quant.weights=absmean", "quant.granularity=tensor")
BASE, TEACHER = "base", "full precision"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    TEACHER: scaling.ARMS["fp"],
    "AdamW": ("optim.optimizer=adamw",),
    "SiLU": ("model.activation=silu",),
    "no weight decay": ("optim.weight_decay=0.0",),
    "full precision for 30%": (*QAT, "qat.start=0.3"),
    "distilled": ("distill.teacher=runs/study/full-precision-0/model", "distill.attention=0.0"),
    "cosine": ("optim.lr_schedule=cosine",),
    "pre-norm": ("model.norm_placement=pre_norm",),
    "scale per row": ("model.granularity=row",),
    "trust mask": ("model.grad_mask=trust",),
    "latents in bf16": (),
    "weight decay throughout": ("optim.wd_schedule=constant",),
    "two-stage": ("optim.lr_schedule=two_stage",),
    "scale per 64": ("model.granularity=group", "model.group_size=64"),
    "clip mask": ("model.grad_mask=clip",),
    "full precision for 10%": (*QAT, "qat.start=0.1"),
    "full precision for 50%": (*QAT, "qat.start=0.5"),
    "norm in each layer": ("model.norm_placement=in_linear",),
    "AdamW's rate x 2": ("optim.lr=8e-3",),
    "AdamW's rate / 2": ("optim.lr=2e-3",),
    "full precision, AdamW's rate x 2": (*scaling.ARMS["fp"], "optim.lr=8e-3"),
    "full precision, AdamW's rate / 2": (*scaling.ARMS["fp"], "optim.lr=2e-3"),
}
"""Name -> what differs from study.toml; the most interesting first. With Muon, AdamW trains
embedding and norms."""
SEEDS = (0, 1, 2)


def jobs(_: Rows) -> list[Job]:
    """All variants, once the sweep of scaling.py at this size is complete."""
    found, size, tokens = read(scaling.CSV), WHERE[0], tokens_for(*WHERE)
    if not scaling.swept(found, size, tokens):
        raise SystemExit("scaling.py comes first: its sweep chooses the learning rates")
    rates = {arm: scaling.lr_of(found, arm, size, tokens) for arm in scaling.ARMS}
    return [
        job(name, rates["fp" if name.partition(",")[0] == TEACHER else "ternary"], seed)
        for name in VARIANTS
        for seed in SEEDS
    ]


def name(variant: str, seed: int) -> str:
    """The name of a run."""
    words = variant.replace("x 2", "double").replace("/ 2", "half").replace(" ", "-")
    return f"{re.sub('[^a-zA-Z0-9-]', '', words)}-{seed}"


def job(variant: str, lr: float, seed: int) -> Job:
    """One run."""
    size, per_weight = WHERE
    adamw, bf16 = variant == "AdamW", variant == "latents in bf16"
    distilled = variant == "distilled"
    return Job(
        name=name(variant, seed),
        arm=variant,
        size=size,
        tokens=tokens_for(size, per_weight),
        lr=4e-3 if adamw else lr,
        seed=seed,
        options=VARIANTS[variant],
        script="docs/results/bf16_latents.py" if bf16 else "train.py",
        steps_as=1.6 if distilled else 1.0,
        after=(name(TEACHER, 0),) if distilled else (),
        rate_key="optim.lr" if adamw else "optim.muon_lr",
    )


def effects(rows: Rows, variant: str) -> list[float]:
    """Loss of a variant minus that of the base of the same seed, in nats, sorted."""
    losses = {row["seed"]: float(row["loss"]) for row in rows if row["arm"] == BASE}
    return sorted(
        float(row["loss"]) - losses[row["seed"]]
        for row in rows
        if row["arm"] == variant and row["seed"] in losses
    )


def table(rows: Rows | None = None) -> str:
    """Markdown: each variant's loss against the base, the median and range of the seeds, and what
    that says beside the spread of the base's seeds."""
    rows = read(CSV) if rows is None else rows
    losses = sorted(float(row["loss"]) for row in rows if row["arm"] == BASE)
    spread = losses[-1] - losses[0]
    lines = [
        "| variant | nats per token against the base | seeds | reading |",
        "|---|---|---|---|",
        f"| base | {statistics.median(losses):.4f} itself ({losses[0]:.4f} to {losses[-1]:.4f}) "
        f"| {len(losses)} | spread of the seeds {spread:.4f} |",
    ]
    found = [(one, effects(rows, one)) for one in VARIANTS if one != BASE]
    for variant, values in sorted(
        (pair for pair in found if pair[1]), key=lambda pair: statistics.median(pair[1])
    ):
        middle = statistics.median(values)
        lines.append(
            f"| {variant} | {middle:+.4f} ({values[0]:+.4f} to {values[-1]:+.4f}) | {len(values)} "
            f"| {reading(values, spread)} |"
        )
    return "\n".join(lines)


def reading(values: list[float], spread: float) -> str:
    """What the differences to the base say, beside the spread of its seeds."""
    if len(values) < len(SEEDS):
        return "too few seeds"
    if values[0] * values[-1] <= 0 or abs(statistics.median(values)) < spread:
        return "smaller than the spread of seeds"
    return "better" if values[0] < 0 else "worse"


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        main(CSV, jobs, __doc__ or "")
