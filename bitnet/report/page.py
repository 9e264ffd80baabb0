"""The page: one HTML file without scripts and without requests, in light and dark, narrow and wide.

It gives the answer first and the evidence afterwards: a headline in words, four figures, then
curves, heat maps, samples, sizes, speeds and the differences between the configs. Names and samples
come from files that anybody may have written, so every text is escaped. In case one is not, a
Content-Security-Policy forbids the browser to load or run anything.
"""

import statistics
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import zip_longest

from bitnet.config import to_dict
from bitnet.report import verdict
from bitnet.report.charts import Line, heat_map, line_chart
from bitnet.report.runs import RunRecord
from bitnet.report.verdict import Comparison
from bitnet.summary import human, model_bytes

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML of a report on ``runs[0]``, which is compared with the other runs."""
    run, others = runs[0], runs[1:]
    comparisons = [one for other in others if (one := verdict.compare(run, other))]
    style = files("bitnet.report").joinpath("style.css").read_text(encoding="utf-8")
    title = " and ".join(record.name for record in runs)
    body = [
        f"<header><p>{escape(title)}</p>"
        f"<h1>{escape(verdict.headline(run, comparisons))}</h1></header>",
        _cards(run, comparisons),
        _section("Loss", _loss(runs)),
        _section("Ternary weights", _ternary(runs)),
        _section("Samples", _samples(runs)),
        _section("Size and speed", _sizes(runs)),
        _section("Config", _config(runs)),
        _section("How to read this page", _explanation(runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _card(title: str, figure: str, text: str, mood: str = "") -> str:
    return (
        f'<div class="card {mood}"><h3>{escape(title)}</h3><p class="figure">{escape(figure)}</p>'
        f"<p>{escape(text)}</p></div>"
    )


MOODS = {"better": "good", "as good": "good", "settled": "good", "worse": "bad", "frozen": "bad"}


def _cards(run: RunRecord, comparisons: Sequence[Comparison]) -> str:
    cards = []
    for one in comparisons:
        text = (
            f"{one.unit}: {one.ours:.3f} against {one.theirs:.3f} on validation text, at step "
            f"{one.step:,}. Less is better."
        )
        caveats = f" Compare with care: measured {', '.join(one.caveats)}." if one.caveats else ""
        figure = f"{one.gap:+.3f} ({one.share:+.1%}), {one.verdict}"
        cards.append(
            _card(f"Against {one.other.name}", figure, text + caveats, MOODS.get(one.verdict, ""))
        )
    if not comparisons:
        name, unit = verdict.evaluations(run)
        value = run.last(name)
        cards.append(
            _card(
                "Validation loss",
                "none yet" if value is None else f"{value:.3f} {unit}",
                "Less is better. Name the full-precision baseline as a second folder to see the "
                "gap.",
            )
        )
    if judged := verdict.settling(run):
        figure = verdict.WORDS[judged.state].removeprefix("have ").removeprefix("are ")
        cards.append(
            _card(
                "Ternary weights",
                figure.capitalize(),
                f"{judged.reason}.",
                MOODS.get(judged.state, ""),
            )
        )
    steps = run.config.train.steps
    share = (
        f"{min(run.step / steps, 1):.0%} of {steps:,} steps, {human(run.tokens(run.step))} tokens."
    )
    skipped = f" {run.last('skipped'):.0f} steps were skipped." if run.last("skipped") else ""
    unread = f" {run.unread} lines of metrics.jsonl could not be read." if run.unread else ""
    cards.append(
        _card(
            "Progress",
            "Finished" if run.finished else f"At step {run.step:,}",
            share + skipped + unread,
        )
    )
    sizes = model_bytes(run.config.model)
    if "packed" in sizes:
        cards.append(
            _card(
                "Size",
                f"{sizes['bf16'] / sizes['packed']:.1f} times smaller",
                f"{human(sizes['packed'], 'B')} packed, {human(sizes['bf16'], 'B')} in 16 bits.",
            )
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _axis(runs: Sequence[RunRecord]) -> tuple[str, list[int]]:
    """The x axis: steps, or tokens if the runs differ in tokens per step; and each run's units per
    step."""
    batches = [record.config.train.batch_tokens for record in runs]
    if len(set(batches)) == 1:
        return "steps", [1] * len(runs)
    return "tokens", batches


def _loss(runs: Sequence[RunRecord]) -> str:
    axis, scales = _axis(runs)
    name, unit = verdict.evaluations(runs[0])

    def lines(number: str, style: str = "") -> list[Line]:
        return [
            Line([(step * scale, y) for step, y in run.points(number)], color, run.name, style)
            for color, (run, scale) in enumerate(zip(runs, scales, strict=True))
        ]

    val = lines(name, "dots")
    gaps = []
    for other in val[1:]:
        theirs = dict(other.points)
        shared = [(x, y - theirs[x]) for x, y in val[0].points if x in theirs]
        gaps.append(Line(shared, other.color, f"less {other.label}", "dots"))
    below = f"{runs[0].name} less baseline, in {unit}; below 0 is better"
    charts = (
        line_chart("Validation loss", val, axis, note=f"in {unit}; less is better"),
        line_chart("Gap", gaps, axis, note=below, zero=True),
        line_chart("Training loss", lines("loss"), axis, note="in nats per token"),
        line_chart("Learning rate", lines("lr"), axis, zero=True),
    )
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _ternary(runs: Sequence[RunRecord]) -> str:
    telling = [(n, record) for n, record in enumerate(runs) if record.points("ternary/zeros")]
    if not telling:
        return ""
    charts = ""
    for name, title, note in (
        ("ternary/flip_rate", "Flip rate", "share of codes changed between readings, in percent"),
        ("ternary/zeros", "Zeros", "share of codes that are 0, in percent"),
    ):
        lines = [
            Line([(x, 100 * y) for x, y in record.points(name)], color, record.name, "dots")
            for color, record in telling
        ]
        charts += line_chart(title, lines, "steps", note=note, zero=name == "ternary/flip_rate")
    for _, record in telling:
        of = f" of {record.name}" if len(telling) > 1 else ""
        for name, title in (("flip_rate", "Flip rate by layer"), ("zeros", "Zeros by layer")):
            rows = {layer: curve.points() for layer, curve in record.layers.get(name, {}).items()}
            charts += heat_map(title + of, rows, "steps", "over time")
    reasons = "".join(
        f"<p><b>{escape(record.name)}</b>: {escape(judged.reason)}.</p>"
        for _, record in telling
        if (judged := verdict.settling(record))
    )
    return f'{reasons}<div class="charts">{charts}</div>'


def _samples(runs: Sequence[RunRecord]) -> str:
    """The last sample of each run; earlier samples are collapsed."""
    with_samples = [record for record in runs if record.samples]
    columns = ""
    for record in with_samples:
        step, text = record.samples[-1]
        columns += _sample(record.name, step, text)
    if not columns:
        return ""
    older = ""
    for row in zip_longest(*(record.samples[-2::-1] for record in with_samples)):
        cells = "".join(
            _sample(record.name, *sample)
            for record, sample in zip(with_samples, row, strict=True)
            if sample
        )
        older += f'<div class="samples">{cells}</div>'
    if older:
        older = f"<details><summary>Earlier samples</summary>{older}</details>"
    return f'<div class="samples">{columns}</div>{older}'


def _sample(name: str, step: int, text: str) -> str:
    return f"<div><h3>{escape(name)}, step {step:,}</h3><pre>{escape(text)}</pre></div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def _sizes(runs: Sequence[RunRecord]) -> str:
    columns = [_figures(record) for record in runs]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in columns[0]]
    return _table(["", *(record.name for record in runs)], rows)


def _figures(record: RunRecord) -> dict[str, str]:
    sizes = model_bytes(record.config.model)
    speeds = [value for _, value in record.points("tokens_per_second")]
    mfu, memory = record.last("mfu"), record.last("peak_memory_bytes")
    stored = [f"{name}/ {human(size, 'B')}" for name, size in record.stored.items()]
    return {
        "parameters": human(record.config.model.num_parameters()["total"]),
        "weights in 16 bits": human(sizes["bf16"], "B"),
        "weights packed": human(sizes["packed"], "B") if "packed" in sizes else "not ternary",
        "weights on the disk": ", ".join(stored) or "not saved yet",
        "tokens per second (median)": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "MFU": f"{mfu:.1%}" if mfu is not None else "",
        "peak memory": human(memory, "B") if memory is not None else "",
    }


def _config(runs: Sequence[RunRecord]) -> str:
    """The keys that differ between the runs; for a single run, short values that differ from the
    default."""
    flat = [
        {
            f"{section}.{key}": value
            for section, table in to_dict(record.config).items()
            for key, value in table.items()
        }
        for record in runs
    ]
    if len(runs) == 1:
        chosen: tuple[str, ...] = (
            "model.linear",
            "model.d_model",
            "model.n_layers",
            "data.path",
            "data.seq_len",
        )
        chosen += ("optim.optimizer", "optim.lr", "train.batch_tokens", "train.steps", "run.seed")
        return _table(["key", runs[0].name], [[key, str(flat[0][key])] for key in chosen])
    keys = [key for key in flat[0] if any(one[key] != flat[0][key] for one in flat)]
    keys = [key for key in keys if key not in ("run.name", "run.dir")]
    if not keys:
        return "<p>The configs are the same but for their names.</p>"
    rows = [[key, *(str(one[key])[:200] for one in flat)] for key in keys]
    return _table(["key that differs", *(record.name for record in runs)], rows)


def _explanation(runs: Sequence[RunRecord]) -> str:
    every = runs[0].config.log.telemetry_every
    return (
        "<dl><dt>Bits per byte</dt><dd>The loss on text that the model was not trained on, divided "
        "by the bytes of that text, so that tokenizers can be compared. Differences under "
        f"{verdict.CHANCE:.1%} are within what another seed changes.</dd>"
        "<dt>Flip rate</dt><dd>The share of the ternary codes (-1, 0, +1) that changed between two "
        f"readings, which are {every:,} steps apart. It falls as training settles.</dd>"
        "<dt>Settled</dt><dd>The flip rate has fallen to "
        f"{verdict.FALLEN:.0%} of its highest value, and the share of zeros has moved by less than "
        f"{100 * verdict.STABLE:g} point over the last quarter of the readings.</dd>"
        "<dt>Zeros</dt><dd>0.31 of random Gaussian weights round to 0; trained models mostly have "
        "0.31 to 0.45.</dd></dl>"
    )
