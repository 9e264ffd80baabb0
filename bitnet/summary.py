"""A config's shapes, parameters, FLOPs, bytes and energy, computed without building the model."""

from pathlib import Path

from rich.table import Table

from bitnet.config import Config, default_lr
from bitnet.data.loader import INDEX, read_index
from bitnet.data.mixture import shares
from bitnet.energy import (
    EXPECTED_ZEROS,
    MATRICES,
    NODES,
    Operation,
    Part,
    arithmetic,
    energy,
    memory,
    packed_matrix_bytes,
    token_cost,
)
from bitnet.model import ModelConfig
from bitnet.training.optim import warmup_steps

_COMPUTED = (
    (
        "model",
        ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "max_seq_len"),
    ),
    ("optim", ("lr",)),
    ("train", ("batch_tokens", "micro_batch", "tokens", "steps")),
)
_TAKEN = {"vocab_size": "tokenizer", "max_seq_len": "data.seq_len"}


def model_bytes(model: ModelConfig) -> dict[str, int]:
    """Bytes of a model's weights in memory: ``fp32``, ``bf16``, and for a ternary model ``packed``:
    2 bits per weight of the layers' matrices, their fp32 scales, and fp32 for the rest."""
    count = model.num_parameters()
    sizes = {"fp32": 4 * count["total"], "bf16": 2 * count["total"]}
    if model.linear == "ternary":
        high_precision = 4 * (count["embedding"] + count["norms"])
        sizes["packed"] = packed_matrix_bytes(model) + high_precision
    return sizes


def human(number: float, unit: str = "") -> str:
    """Format a number: 15_700_000 -> "15.7M"; with unit "B", "15.7 MB" (powers of 1000)."""
    large = (("E", 1e18), ("P", 1e15), ("T", 1e12))
    for prefix, size in (*large, ("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.4g}{' ' + unit if unit else ''}"


def one_line(config: Config) -> str:
    """A resolved config in one line, for the start of a run's output."""
    model, train = config.model, config.train
    total = model.num_parameters()["total"]
    arithmetic = str(config.quant) if config.quant.enabled else model.linear
    lr, default = config.optim.lr, default_lr(total, model.linear, saved=True)
    tenth = ", a tenth of pretraining's" if train.init_from and lr == default else ""
    return (
        f"{config.run.name}: {arithmetic}, {human(total)} parameters ({model.n_layers} layers, "
        f"{model.d_model} wide, {model.n_heads}/{model.n_kv_heads} heads, FFN {model.d_ff}, "
        f"vocabulary {model.vocab_size}); {train.steps} steps of {train.batch_tokens} tokens = "
        f"{human(train.tokens)}; {config.optim.optimizer}, LR {lr:g}{tenth}"
    )


def quantization_lines(config: Config) -> list[str]:
    """Lines on [qat], [adapter] and [distill] of a resolved config, as far as the run uses them."""
    quant, qat, lines = config.quant, config.qat, list[str]()
    if quant.enabled:
        ramps = [f"{name} over {share:.0%}" for name, share in _warmups(config) if share]
        frozen = f"ranges frozen at {qat.freeze_observers:.0%}" if qat.freeze_observers < 1 else ""
        begins = f"quantization: {quant}, from {qat.start:.0%} of the run"
        lines.append(", ".join([begins, *ramps, *filter(None, [frozen])]))
    if config.adapter.kind != "none":
        adapter = config.adapter
        base = f" beside a base in {adapter.base}" if adapter.kind == "qlora" else ""
        lines.append(f"adapters: {adapter.kind} of rank {adapter.rank}{base}")
    if config.distill.teacher:
        distill = config.distill
        weights = f"logits {distill.logits:g}, attention {distill.attention:g}"
        lines.append(f"distillation: teacher {distill.teacher}, weights {weights}")
    return lines


def _warmups(config: Config) -> tuple[tuple[str, float], tuple[str, float]]:
    qat = config.qat
    return ("weights' warm-up", qat.weight_warmup), ("activations' warm-up", qat.activation_warmup)


def tables(asked: Config) -> list[Table]:
    """The tables of ``bitnet inspect`` for a config as given (not resolved)."""
    config = asked.resolve()
    found = [_settings(asked, config), _shapes(config), _costs(config)]
    if config.data.is_mixture:
        found.insert(1, _mixture(config))
    if config.quant.enabled and not config.quant.quantizer.ternary:
        return found  # there is no table for multiplications of other widths
    return found + energy_tables(config.model, config.data.seq_len)


def _settings(asked: Config, config: Config) -> Table:
    table = Table("key", "value", "chosen by", title=f"{config.run.name}: settings")
    table.add_row("model.depth", str(config.model.depth), "config")
    for section, keys in _COMPUTED:
        for key in keys:
            value = getattr(getattr(config, section), key)
            given = getattr(getattr(asked, section), key)
            table.add_row(
                f"{section}.{key}",
                f"{value:g}" if isinstance(value, float) else f"{value:,}",
                "config" if given else _TAKEN.get(key, "model.depth"),
            )
    warmup = warmup_steps(config.train.steps, config.optim)
    chosen_by = "config" if asked.optim.warmup_steps else "model.depth"
    table.add_row("warmup", f"{warmup:,} steps", chosen_by)
    return table


def _mixture(config: Config) -> Table:
    table = Table(
        *("source", "folder", "share", "tokens of the run", "epochs"),
        title="Mixture",
        caption="epochs: how often the run reads the source, where it is prepared",
    )
    sources = config.data.mixture()
    for source, share in zip(sources, shares([source.weight for source in sources]), strict=True):
        tokens, epochs = float(share) * config.train.steps * config.train.batch_tokens, ""
        if (Path(source.path) / INDEX).is_file():
            epochs = f"{tokens / read_index(Path(source.path)).splits['train'].n_tokens:.3g}"
        table.add_row(source.name, source.path, f"{float(share):.2%}", human(tokens), epochs)
    return table


def _shapes(config: Config) -> Table:
    model = config.model
    arithmetic = str(config.quant) if config.quant.enabled else model.linear
    table = Table("matrix", "out", "in", "parameters", "arithmetic", title="Shapes")
    for name, (n, k) in model.matrices().items():
        count = f"{model.n_layers} x {n * k:,}"
        table.add_row(f"layers.*.{name}", f"{n:,}", f"{k:,}", count, arithmetic)
    tied = " (= lm_head)" if model.tie_embeddings else " and lm_head"
    rows, columns = model.vocab_size, model.d_model
    table.add_row(
        f"embed_tokens{tied}", f"{rows:,}", f"{columns:,}", f"{rows * columns:,}", "high precision"
    )
    return table


def _costs(config: Config) -> Table:
    model, seq_len = config.model, config.data.seq_len
    count = model.num_parameters()
    flops = model.flops_per_token(seq_len)
    table = Table("what", "value", title="Costs")
    for kind, n in count.items():
        table.add_row(f"parameters: {kind}", f"{n:,}")
    table.add_row(f"training FLOPs per token, context {seq_len}", human(flops, "FLOP"))
    table.add_row("training FLOPs, whole run", human(flops * config.train.tokens, "FLOP"))
    table.add_row("inference FLOPs per token", human(flops / 3, "FLOP"))
    for kind, n_bytes in model_bytes(model).items():
        table.add_row(f"weights in {kind}", human(n_bytes, "B"))
    # fp32 weights and gradients, and two fp32 moments of AdamW (one of Muon's) for each
    table.add_row("weights, gradients, AdamW state", human(16 * count["total"], "B"))
    cache = 2 * 2 * model.n_layers * model.n_kv_heads * model.head_dim
    table.add_row("KV cache per token in bf16", human(cache, "B"))
    return table


def energy_tables(model: ModelConfig, context: int, zeros: float | None = None) -> list[Table]:
    """The cost of a generated token: the 16-bit model beside W1.58A8 (bitnet/energy.py).

    Arguments:
        model: resolved. context: positions attended to. zeros: counted share of zero codes; None:
            the expected share.
    """
    return [_operations(model, context, zeros), _energy(model, context, zeros)]


def _share(zeros: float | None) -> float:
    return EXPECTED_ZEROS if zeros is None else zeros


def _operations(model: ModelConfig, context: int, zeros: float | None) -> Table:
    source = "expected" if zeros is None else "counted from the codes"
    table = Table(
        *("part", "FP16: multiply", "add", "W1.58A8: multiply", "add", "skipped"),
        title=f"Operations per generated token, batch 1, context {context:,}",
        caption=f"skipped: additions that codes of 0 save; {_share(zeros):.1%} of the codes "
        f"({source}). Attention, head and the parts below are the same in both.",
    )
    fp16 = token_cost(model, context, ternary=False)
    ternary = token_cost(model, context, ternary=True, zeros=_share(zeros))
    for a, b in zip(fp16.parts, ternary.parts, strict=True):
        skipped = human(b.skipped) if b.skipped else ""
        table.add_row(a.name, *_counts(a), *_counts(b), skipped)
    return table


def _counts(part: Part) -> tuple[str, str]:
    """The multiplications and the additions, with their dtype."""

    def cell(kind: str) -> str:
        found: dict[Operation, int] = {o: n for o, n in part.operations.items() if kind in o}
        return ", ".join(f"{human(n)} {o.partition('_')[0]}" for o, n in found.items() if n)

    return cell("mul"), cell("add")


def _energy(model: ModelConfig, context: int, zeros: float | None) -> Table:
    table = Table(
        *("energy per generated token", "FP16", "W1.58A8", "ratio"),
        title=f"Energy by published constants, batch 1, context {context:,}",
        caption="Estimates from the energy of single operators, not measurements: 45 nm by "
        "Horowitz (ISSCC 2014), 7 nm from arXiv 2112.00133; adders as wide as the accumulator "
        "(fp32, int32); DRAM 1.3 nJ per 64 bits at both, several times that of HBM; SRAM, wires "
        "and idle hardware left out. 'as published' counts the layers' matrices alone, one INT8 "
        "addition per weight, no zero skipped, no accumulator, no scale and no memory traffic: "
        "the 71.4 times of arXiv 2402.17764 is its ratio at 7 nm, not the saving of a machine. At "
        "batch 1 the saving is about the ratio of the bytes.",
    )
    fp16 = token_cost(model, context, ternary=False)
    ternary = token_cost(model, context, ternary=True, zeros=_share(zeros))
    dense = token_cost(model, context, ternary=True, zeros=0.0)
    moved = [sum(cost.traffic.values()) for cost in (fp16, ternary)]
    for name, bytes_16 in fp16.traffic.items():
        bytes_2 = ternary.traffic[name]
        ratio = f"{bytes_16 / bytes_2:.1f}"
        table.add_row(f"bytes: {name}", human(bytes_16, "B"), human(bytes_2, "B"), ratio)
    table.add_row("bytes: all", *(human(n, "B") for n in moved), f"{moved[0] / moved[1]:.1f}")
    for node, prices in NODES.items():
        table.add_section()
        published = [energy(cost.part(MATRICES), prices, "narrow") for cost in (fp16, dense)]
        matrices = [energy(cost.part(MATRICES), prices) for cost in (fp16, ternary)]
        computed = [arithmetic(cost, prices) for cost in (fp16, ternary)]
        fetched = [memory(cost) for cost in (fp16, ternary)]
        total = [a + b for a, b in zip(computed, fetched, strict=True)]
        for what, (a, b) in (
            ("layers' matrices, as published", published),
            ("layers' matrices", matrices),
            ("all arithmetic", computed),
            ("memory traffic", fetched),
            ("all", total),
        ):
            table.add_row(f"{node}: {what}", _joules(a), _joules(b), f"{a / b:.1f}")
        shares = (f"{f / t:.1%}" for f, t in zip(fetched, total, strict=True))
        table.add_row(f"{node}: share of memory traffic", *shares, "")
    return table


def _joules(picojoules: float) -> str:
    prefix, size = ("m", 1e9) if picojoules >= 1e9 else ("u", 1e6)
    return f"{picojoules / size:.4g} {prefix}J"
