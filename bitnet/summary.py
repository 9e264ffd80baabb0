"""What a config comes to, without building it: shapes, parameters, FLOPs, memory, the dial."""

from rich.table import Table

from bitnet.config import Config
from bitnet.model import ModelConfig
from bitnet.optim import warmup_steps
from bitnet_kernels.packing import packed_columns

_DIALED = (
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
    2 bits a weight of the layers' matrices and their fp32 scales, fp32 for all else."""
    count = model.num_parameters()
    sizes = {"fp32": 4 * count["total"], "bf16": 2 * count["total"]}
    if model.linear == "ternary":
        layer = sum(n * packed_columns(k) for n, k in model.matrices().values())
        scales = sum(
            {"tensor": 1, "row": n, "group": n * -(-k // model.group_size)}[model.granularity]
            for n, k in model.matrices().values()
        )
        high_precision = 4 * (count["embedding"] + count["norms"])
        sizes["packed"] = model.n_layers * (layer + 4 * scales) + high_precision
    return sizes


def human(number: float, unit: str = "") -> str:
    """A number a person reads: 15_700_000 -> "15.7M"; with unit "B", "15.7 MB" (powers of 1000)."""
    large = (("E", 1e18), ("P", 1e15), ("T", 1e12))
    for prefix, size in (*large, ("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.4g}{' ' + unit if unit else ''}"


def one_line(config: Config) -> str:
    """A resolved config in a line, for the head of a run."""
    model, train = config.model, config.train
    total = model.num_parameters()["total"]
    return (
        f"{config.run.name}: {model.linear}, {human(total)} parameters ({model.n_layers} layers, "
        f"{model.d_model} wide, {model.n_heads}/{model.n_kv_heads} heads, FFN {model.d_ff}, "
        f"vocabulary {model.vocab_size}); {train.steps} steps of {train.batch_tokens} tokens = "
        f"{human(train.tokens)}; {config.optim.optimizer}, LR {config.optim.lr:g}"
    )


def tables(asked: Config) -> list[Table]:
    """What ``bitnet inspect`` prints for a config as it was asked for (not resolved)."""
    config = asked.resolve()
    return [_dial(asked, config), _shapes(config.model), _costs(config)]


def _dial(asked: Config, config: Config) -> Table:
    table = Table("key", "value", "chosen by", title=f"{config.run.name}: the dial")
    table.add_row("model.depth", str(config.model.depth), "config")
    for section, keys in _DIALED:
        for key in keys:
            value = getattr(getattr(config, section), key)
            given = getattr(getattr(asked, section), key)
            table.add_row(
                f"{section}.{key}",
                f"{value:g}" if isinstance(value, float) else f"{value:,}",
                "config" if given else _TAKEN.get(key, "dial"),
            )
    warmup = warmup_steps(config.train.steps, config.optim)
    table.add_row("warmup", f"{warmup:,} steps", "config" if asked.optim.warmup_steps else "dial")
    return table


def _shapes(model: ModelConfig) -> Table:
    table = Table("matrix", "out", "in", "parameters", "arithmetic", title="Shapes")
    for name, (n, k) in model.matrices().items():
        count = f"{model.n_layers} x {n * k:,}"
        table.add_row(f"layers.*.{name}", f"{n:,}", f"{k:,}", count, model.linear)
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
    table.add_row(f"training FLOPs a token, context {seq_len}", human(flops, "FLOP"))
    table.add_row("training FLOPs, whole run", human(flops * config.train.tokens, "FLOP"))
    table.add_row("inference FLOPs a token", human(flops / 3, "FLOP"))
    for kind, n_bytes in model_bytes(model).items():
        table.add_row(f"weights in {kind}", human(n_bytes, "B"))
    # fp32 weights and gradients, and two fp32 moments of AdamW (one of Muon's) for each
    table.add_row("weights, gradients, AdamW state", human(16 * count["total"], "B"))
    cache = 2 * 2 * model.n_layers * model.n_kv_heads * model.head_dim
    table.add_row("KV cache a token in bf16", human(cache, "B"))
    return table
