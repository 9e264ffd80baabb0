"""One strict config from TOML files and `section.key=value`; `model.depth` gives the rest.

Each section is a dataclass next to the code it configures (``optim`` in optim.py, ...). A value
comes from its default, then from the files in order, then from the command line; later ones win.
A file may begin with ``extends = "other.toml"`` (a path relative to the file), so the
full-precision baselines name only the keys that differ. An unknown key, a wrong type or a value out
of range is an error that names the file, the key and the nearest valid name: no model trains with
a typo.

Zeros are then *resolved*. ``model.depth`` alone gives the shape (model.py), and the shape gives the
number of parameters N. These rules follow:

    learning rate   2.4e-3 * (140M / N)^0.29, at most 4e-3   TriLM's table (arXiv 2407.12327) to 5%
                    1/6 of that for the full-precision baseline (ternary takes 6 to 8 times more)
                    1/10 of either to continue from a saved model (train.init_from): a ternary
                    model, or a full-precision one trained as ternary, with [quant] (QAT takes 1/10
                    to 1/100) or, as the control, without. Muon: 0.02, or 0.002 for a saved model
    batch           262,144 * sqrt(N / 50M) tokens, rounded to a power of two in 16k .. 1M: 262k at
                    50M (QuEST, arXiv 2502.05003), 1M at 700M (b1.58)
    tokens          20 N (Chinchilla, arXiv 2203.15556)

`train.init_from` starts from a saved model. The model's folder then gives the tokenizer, [quant]
and the [model] keys of the architecture that are left at their default. A key that disagrees with
the folder is an error, except model.max_seq_len.

Four sections quantize a full-precision model during training (bitnet/qat/):
    [quant]    which tensors are quantized, and how (recipe.py); needs model.linear = "fp"
    [qat]      when quantization begins and how fast it is phased in (schedule.py)
    [distill]  a teacher to learn from (distill.py)
    [adapter]  low-rank adapters, trained instead of the matrices (adapters.py)

A run prints the resolved config, saves it in its folder and compares it on resume.
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import torch
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from bitnet.data.loader import INDEX, DataConfig, read_index
from bitnet.data.tokenizer_json import load_tokenizer
from bitnet.evaluate import EvalConfig
from bitnet.export.folder import read_config
from bitnet.model import ModelConfig, check_divides
from bitnet.qat.adapters import AdapterConfig
from bitnet.qat.recipe import Recipe
from bitnet.qat.schedule import QATConfig, first_step, lambdas, optimal_share
from bitnet.schema import (
    RENAMED,
    STRICT,
    Count,
    Positive,
    UserError,
    nearest,
    read_file,
    user_input,
    with_new_keys,
)
from bitnet.training.checkpoint import CheckpointConfig
from bitnet.training.distill import DistillConfig
from bitnet.training.distributed import DistributedConfig, Strategy
from bitnet.training.metrics import LogConfig
from bitnet.training.optim import OptimConfig

_LARGE = 10**9
"""Most parameters for which each process keeps a whole model: training takes 16 bytes for each."""
_MAX_BYTES = 2**24
"""Largest config file that is read."""
_Files = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The run's name, folder and seed."""

    name: str = ""
    """Name of the run's folder. "": the name of the (last) config file."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the data order."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """The training loop."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; "auto": a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; "auto": bf16 on a GPU, fp32 on a CPU. Latent weights are always fp32."""
    compile: bool = False
    """Compile forward and loss with torch.compile: minutes at the start, then faster steps."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch. 0: torch's default."""
    batch_tokens: Count = 0
    """Tokens per optimizer step. 0: computed from the model size (top of bitnet/config.py)."""
    micro_batch: Count = 0
    """Sequences per forward; gradients accumulate. 0: about 8,192 tokens, or 2,048 on a CPU."""
    tokens: Count = 0
    """Tokens in the run. 0: 20 per parameter."""
    steps: Count = 0
    """Optimizer steps in the run. 0: tokens / batch_tokens, rounded up."""
    init_from: str = ""
    """Folder of a saved model to start from. It gives the shape, tokenizer and [quant]; the default
    learning rate is then a tenth of the pretraining rate."""
    max_bad_steps: Positive = 10
    """A step with a non-finite loss or gradient is skipped; this many in a row end the run."""


@dataclass(frozen=True, config=STRICT)
class Config:
    """Everything a run needs."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    quant: Recipe = Recipe()
    qat: QATConfig = QATConfig()
    distill: DistillConfig = DistillConfig()
    adapter: AdapterConfig = AdapterConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.dir) / self.run.name

    @property
    def batch_sequences(self) -> int:
        """Sequences per optimizer step (of a resolved config)."""
        return self.train.batch_tokens // self.data.seq_len

    def shares(self, n_processes: int) -> int:
        """Number of shares of a batch: one per process, or with ``distributed.tensor_parallel`` one
        per group of processes that divides the matrices.

        Raises:
            UserError: the processes do not form whole groups.
        """
        size = self.distributed.tensor_parallel
        if n_processes % size:
            key, fits = f"distributed.tensor_parallel = {size}", math.gcd(size, n_processes)
            raise UserError(
                f"{key} does not divide the number of processes, {n_processes}: start torchrun "
                f"with a multiple of {size}, or set it to {fits}"
            )
        return n_processes // size

    def micro_batch(self, n_processes: int) -> int:
        """Sequences per forward of each process (of a resolved config): ``train.micro_batch``, or
        a divisor of it that divides the share of a process.

        Raises:
            UserError: the processes cannot share the batch equally.
        """
        shares, tensor = self.shares(n_processes), self.distributed.tensor_parallel
        share, rest = divmod(self.batch_sequences, shares)
        if rest:
            tokens = math.lcm(shares, self.train.micro_batch) * self.data.seq_len
            who = "processes" if tensor == 1 else f"groups of {tensor} processes"
            raise UserError(
                f"train.batch_tokens = {self.train.batch_tokens} is {self.batch_sequences} "
                f"sequences of data.seq_len = {self.data.seq_len}, which {shares} {who} "
                "cannot share equally; the nearest that they can: "
                f"{max(1, round(self.train.batch_tokens / tokens)) * tokens}"
            )
        return math.gcd(share, self.train.micro_batch)

    def strategy(self, n_processes: int) -> Strategy:
        """How the processes train one model (of a resolved config): ``distributed.strategy``, where
        "auto" is ddp, or fsdp if several processes would hold more than 1B parameters each."""
        chosen, counts = self.distributed.strategy, self.model.num_parameters()
        if chosen != "auto":
            return chosen
        tensor = self.distributed.tensor_parallel
        held = counts["total"] - counts["matrices"] + counts["matrices"] // tensor
        several = self.shares(n_processes) > 1
        return "fsdp" if several and held > _LARGE and not whole_only(self) else "ddp"

    def resolve(self) -> "Config":
        """Fill every 0 that has a rule. Raises UserError for an impossible config."""
        _check_name(self.run.name)
        _check_encoding(self)
        folder = self.train.init_from
        with user_input(f"train.init_from = {folder}"):
            config = _from_folder(self, Path(folder)) if folder else self
        with user_input("the config cannot be computed"):
            return config._resolve()

    def _resolve(self) -> "Config":
        self.data.mixture()  # checks the mixture's tables
        vocab_size = self.data.vocab_size
        if self.data.tokenizer:
            with user_input(f"data.tokenizer = {self.data.tokenizer}"):
                vocab_size = load_tokenizer(Path(self.data.tokenizer)).vocab_size
        model = self.model.resolve(vocab_size, self.data.seq_len)
        rows_to_spare = self.train.init_from and model.vocab_size > vocab_size
        if model.vocab_size != vocab_size and not rows_to_spare:
            raise UserError(
                f"model.vocab_size = {model.vocab_size} differs from the tokenizer's {vocab_size}; "
                "leave it at 0 to take the tokenizer's"
            )
        if model.max_seq_len < self.data.seq_len:
            raise UserError(
                f"model.max_seq_len = {model.max_seq_len} is less than data.seq_len = "
                f"{self.data.seq_len}"
            )
        n_parameters = model.num_parameters()["total"]
        saved = bool(self.train.init_from)
        lr = self.optim.lr or default_lr(n_parameters, model.linear, saved)
        muon_lr = self.optim.muon_lr or (0.002 if saved else 0.02)
        optim = dataclasses.replace(self.optim, lr=lr, muon_lr=muon_lr)
        train = self._resolve_train(n_parameters)
        config = dataclasses.replace(self, model=model, optim=optim, train=train)
        _check_combination(config)
        return _resolve_qat(config, n_parameters) if config.quant.enabled else config

    def _resolve_train(self, n_parameters: int) -> TrainConfig:
        train, seq_len = self.train, self.data.seq_len
        asked = train.batch_tokens or default_batch_tokens(n_parameters)
        micro = train.micro_batch or max(1, min(8192, asked) // seq_len)
        batch = max(1, round(asked / (micro * seq_len))) * micro * seq_len
        if train.batch_tokens and batch != asked:
            raise UserError(
                f"train.batch_tokens = {asked} is not a multiple of train.micro_batch * "
                f"data.seq_len = {micro} * {seq_len}; the nearest that is: {batch}"
            )
        tokens = train.tokens or (train.steps or math.ceil(20 * n_parameters / batch)) * batch
        steps = train.steps or math.ceil(tokens / batch)
        if math.ceil(tokens / batch) != steps:
            raise UserError(
                f"train.tokens = {tokens} and train.steps = {steps} disagree at {batch} tokens per "
                "step; set one of them and leave the other 0"
            )
        cpu = train.device == "cpu" or (train.device == "auto" and not torch.cuda.is_available())
        if cpu and not train.micro_batch:  # a divisor, so CPU and GPU have the same batch
            micro = math.gcd(micro, max(1, 2048 // seq_len))
        return dataclasses.replace(
            train, batch_tokens=batch, micro_batch=micro, tokens=tokens, steps=steps
        )


def _check_encoding(config: "Config") -> None:
    """Raise UserError for text that config.toml and checkpoints cannot store, such as a file name
    that is not UTF-8 (`bitnet prepare` accepts one)."""
    for section, table in to_dict(config).items():
        for key, value in table.items():
            with user_input(f"{section}.{key}"):
                "".join(_texts(value)).encode()


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value, including those in lists and tables."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _check_name(name: str) -> None:
    """Raise UserError unless the name is a valid folder name everywhere and a word of a command."""
    a_path = Path(name).name != name or name == ".."
    if a_path or name.startswith("-") or not name.isprintable() or len(name.encode()) > 200:
        raise UserError(
            f"run.name = {name[:80]!r}: expected a folder's name: no path (see run.dir), no dash "
            "in front, printable, at most 200 bytes"
        )


_ADOPTED = {field.name for field in dataclasses.fields(ModelConfig)} - {
    *("linear", "granularity", "group_size", "grad_mask", "grad_mask_c")  # arithmetic, not shape
}


def _from_folder(config: Config, folder: Path) -> Config:
    """Return the config with the values of ``train.init_from`` in place of defaults."""
    try:
        saved, default = read_config(folder), ModelConfig()
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    where = f"train.init_from = {folder}"
    if saved.weights != "latent":
        raise UserError(f"{where}: its weights are {saved.weights}; training needs latent ones")
    adopted: dict[str, Any] = {}
    for key in sorted(_ADOPTED):
        ours, theirs = getattr(config.model, key), getattr(saved.model, key)
        if ours == getattr(default, key):
            adopted[key] = theirs
        elif ours != theirs and key != "max_seq_len":
            raise UserError(
                f"{where}: has model.{key} = {theirs!r}, this config {ours!r}; leave the key out "
                "to take the folder's"
            )
    files = [folder / name for name in saved.sha256 if Path(name).stem == "tokenizer"]
    data = config.data
    if files and not data.tokenizer:
        data = _with_tokenizer(data, files[0])
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **adopted),
        data=data,
        quant=config.quant if config.quant.enabled else saved.quant,
    )


def _with_tokenizer(data: DataConfig, tokenizer: Path) -> DataConfig:
    """Make the data use a model's tokenizer. Data whose own tokenizer is this one stays usable."""
    if (Path(data.path) / INDEX).is_file():
        index = read_index(Path(data.path))
        its_own = not index.settings.get("tokenizer")
        if its_own and index.tokenizer_sha256 == load_tokenizer(tokenizer).hash:
            return dataclasses.replace(data, vocab_size=index.vocab_size)
    return dataclasses.replace(data, tokenizer=str(tokenizer))


def _check_combination(config: Config) -> None:
    """Raise UserError, in one line that names the key to change, for sections that conflict."""
    model, quant, train = config.model, config.quant, config.train
    for change in differences(to_dict(Config()), to_dict(config)):
        key, section = change.partition(":")[0], change.partition(".")[0]
        switch = {"qat": "quant.weights", "distill": "distill.teacher", "adapter": "adapter.kind"}
        used = {"qat": quant.enabled, "distill": bool(config.distill.teacher)}
        if section in switch and not used.get(section, config.adapter.kind != "none"):
            raise UserError(f"{key} has no effect: {switch[section]} is not set")
    if config.qat.freeze_observers < 1 and not quant.static:
        raise UserError('qat.freeze_observers has no effect: quant.activations is not "static"')
    if quant.enabled and model.linear == "ternary":
        raise UserError(
            f'quant.weights = "{quant.weights}" quantizes full-precision matrices: set '
            'model.linear = "fp" with it, or leave [quant] out for model.linear = "ternary"'
        )
    if quant.enabled and model.norm_placement == "in_linear":
        raise UserError(
            'model.norm_placement = "in_linear" puts norms inside the matrices, which [quant] '
            'cannot replace; "sub_norm" and "pre_norm" can'
        )
    if config.distributed.strategy in ("fsdp", "hsdp") and (section := whole_only(config)):
        raise UserError(
            f'distributed.strategy = "{config.distributed.strategy}" divides weights, which '
            f'[{section}] needs whole: take "ddp"'
        )
    if (size := config.distributed.tensor_parallel) > 1:
        key = f"distributed.tensor_parallel = {size}"
        if section := whole_only(config):
            raise UserError(f"{key} divides matrices, which [{section}] needs whole: set it to 1")
        if config.optim.optimizer == "muon":
            raise UserError(
                f'{key} does not go with optim.optimizer = "muon", which needs whole matrices: '
                'take "adamw", or divide the model by distributed.strategy = "fsdp" instead'
            )
        if train.compile:
            raise UserError(f"{key} does not go with train.compile = true: set that to false")
        check_divides(model, size)
    if config.distributed.shard_size and config.distributed.strategy != "hsdp":
        raise UserError('distributed.shard_size has no effect: distributed.strategy is not "hsdp"')
    if train.compile and (quant.enabled or config.distill.teacher):
        raise UserError("train.compile = true does not go with [quant] and distill.teacher")
    if (kind := config.adapter.kind) != "none" and not train.init_from:
        raise UserError(f'adapter.kind = "{kind}" corrects a saved model: set train.init_from')
    if kind == "qlora" and quant.enabled:
        raise UserError(
            'adapter.kind = "qlora" quantizes its base by itself (adapter.base): leave [quant] '
            'out, or take "lora", whose base [quant] quantizes'
        )


def whole_only(config: Config) -> str:
    """The section that needs whole weights on each process; "" if there is none."""
    used = {
        "quant": config.quant.enabled,
        "distill": bool(config.distill.teacher),
        "adapter": config.adapter.kind != "none",
    }
    return next((section for section, there in used.items() if there), "")


def _resolve_qat(config: Config, n_parameters: int) -> Config:
    """Turn ``qat.start`` into a number, and fuse the cooldown with quantization."""
    qat, train, optim = config.qat, config.train, config.optim
    if qat.start == "auto":
        if train.init_from:
            raise UserError(
                'qat.start = "auto" plans a run that pretrains; with train.init_from give a share, '
                "such as 0"
            )
        share = optimal_share(train.tokens, n_parameters, config.quant.weight_bits)
        if first_step(1 - share, train.steps) >= train.steps:
            raise UserError(
                f'qat.start = "auto": for {train.tokens} tokens and {n_parameters} parameters it '
                f"quantizes {share:.1g} of the {train.steps} steps, not one; give a share, as 0.5"
            )
        qat = dataclasses.replace(qat, start=1 - share)
    assert qat.start != "auto"
    if lambdas(train.steps - 1, train.steps, qat) != (1.0, 1.0):
        raise UserError(
            f"qat.start = {qat.start:.4g}: with qat.weight_warmup = {qat.weight_warmup:g} and "
            f"qat.activation_warmup = {qat.activation_warmup:g} the run of {train.steps} steps "
            f"ends before quantization is complete; each sum may be {1 - 1 / train.steps:.4g}"
        )
    if qat.fused_cooldown and optim.lr_schedule == "wsd":
        decay_fraction = min(optim.decay_fraction, 1 - qat.start)
        optim = dataclasses.replace(optim, decay_fraction=decay_fraction)
    return dataclasses.replace(config, qat=qat, optim=optim)


def default_lr(n_parameters: int, linear: str, saved: bool = False) -> float:
    """The peak learning rate (AdamW) by the rule of the module's docstring, to two digits.

    ``saved``: whether the run starts from a saved model.
    """
    lr = min(4e-3, 2.4e-3 * (140e6 / n_parameters) ** 0.29)
    lr /= 1 if linear == "ternary" else 6
    return float(f"{lr / 10 if saved else lr:.1e}")


def default_batch_tokens(n_parameters: int) -> int:
    """Tokens per step by the rule of the module's docstring."""
    exponent = round(math.log2(2**18 * math.sqrt(n_parameters / 50e6)))
    return int(2 ** min(20, max(14, exponent)))


def load_config(
    paths: Sequence[Path | str],
    overrides: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
) -> Config:
    """Read, merge and check; nothing is resolved yet.

    Arguments:
        paths: TOML files; later ones win. overrides: ``section.key=value``, which win over files.
            The value is read as TOML (``3e-4``, ``true``, ``["a", "b"]``) if all of it is valid,
            else as a plain string.
        data: values of ``[data]`` keys, not parsed; they win over all others.
    Raises:
        UserError: one line that names the file or argument, the key and the nearest valid name.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in paths:
        _merge(values, origins, _read_toml(Path(path)))
    for override in overrides:
        _override(values, origins, override)
    for key, value in (data or {}).items():
        values.setdefault("data", {})[key] = value
        origins["data"] = origins[f"data.{key}"] = "command line"
    if paths and not values.get("run", {}).get("name"):
        values.setdefault("run", {})["name"] = Path(paths[-1]).stem
    return _validate(values, origins)


def load_recipe(settings: Sequence[str]) -> Recipe:
    """Build the recipe from ``quant.KEY=VALUE`` settings. No settings: full precision.

    Raises:
        UserError: another section; an unknown key; a value out of range; settings without
            quant.weights, which would have no effect.
    """
    for setting in settings:
        if not setting.startswith("quant."):
            raise UserError(f"{setting!r}: expected quant.KEY=VALUE, such as quant.weights=int")
    recipe = load_config([], settings).quant
    if settings and not recipe.enabled:
        raise UserError(
            f"{' '.join(settings)}: quantizes nothing without quant.weights, such as "
            "quant.weights=int"
        )
    return recipe


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain dictionaries: section -> key -> value."""
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """Write the config as TOML that reads back as the same config."""
    return tomli_w.dumps(to_dict(config))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that differ between two results of :func:`to_dict`: ``"model.d_model: 64 -> 128"``."""
    changed = []
    for section in sorted(old.keys() | new.keys()):
        before, after = old.get(section, {}), new.get(section, {})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                changed.append(f"{section}.{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return changed


def describe() -> Iterator[tuple[str, str, object, str]]:
    """List every key for ``--help``: section, key, default, documentation."""
    for section in dataclasses.fields(Config):
        config_class = get_type_hints(Config)[section.name]
        for key, info in config_class.__pydantic_fields__.items():
            default = getattr(config_class(), key)
            yield section.name, key, default, " ".join((info.description or "").split())


def _read_toml(path: Path, extending: tuple[Path, ...] = ()) -> _Files:
    """Read a file's tables, after those of the file that it extends."""
    with user_input(str(path)):
        found = path.exists()
    if not found:
        near = nearest(path.name, (p.name for p in path.parent.glob("*.toml")))
        hint = f"; the nearest is {path.parent / near}" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
    text = read_file(path, _MAX_BYTES)
    with user_input(f"{path}: not valid TOML"):
        values = tomllib.loads(text.decode("utf-8"))
    if path.name == "config.toml" and (path.parent / "checkpoints").is_dir():
        values = with_new_keys(values)  # a run wrote the file, maybe before a key was renamed
    base = values.pop("extends", None)
    if base is None:
        return [(str(path), values)]
    extending = (*extending, path.resolve())
    with user_input(f"{path}: extends"):
        if not isinstance(base, str) or (path.parent / base).resolve() in extending:
            raise UserError(
                f"{path}: extends = {base!r} must name another config file, not a circle"
            )
    return [*_read_toml(path.parent / base, extending), (str(path), values)]


def _merge(values: dict[str, Any], origins: dict[str, str], files: _Files) -> None:
    for origin, tables in files:
        for section, table in tables.items():
            if not isinstance(table, dict):
                _unknown(origin, section, "is outside any section; sections are", _sections())
            for key, value in table.items():
                values.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = origin
            origins[section] = origin


def _override(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise UserError(
            f"{override!r}: expected section.key=value (such as optim.lr=1e-3) or a .toml file"
        )
    hint = get_type_hints(_sections()[section]).get(key) if section in _sections() else None
    value = _toml_value(text)
    if hint is str and not isinstance(value, str):
        value = text
    lists = [get_origin(kind) is list for kind in (hint, *get_args(hint))]
    if any(lists) and not isinstance(value, list):  # all lists are of strings, or may be
        value = [value if isinstance(value, str) else text]
    values.setdefault(section, {})[key] = value
    origins[section] = origins[f"{section}.{key}"] = "command line"


def _toml_value(text: str) -> Any:
    """Parse the text as one TOML value. Return the text itself if it is not valid TOML, or is more
    than a value: a second key, or a comment, which hides the bracket after it."""
    try:
        tomllib.loads(f"value = {text}")
        (value,) = tomllib.loads(f"value = [{text}]")["value"]
    except (ValueError, RecursionError):  # invalid TOML, too many digits, too many brackets
        return text
    return value


def _sections() -> dict[str, type]:
    return dict(get_type_hints(Config))


def _unknown(origin: str, name: str, problem: str, valid: Sequence[str] | dict[str, type]) -> None:
    near = nearest(name.rpartition(".")[2], valid, 0.5)
    hint = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"{origin}: {name} {problem} {', '.join(valid)}{hint}")


def _validate(values: dict[str, Any], origins: dict[str, str]) -> Config:
    """Build the config; turn the first of pydantic's errors into one line."""
    sections = _sections()
    built: dict[str, Any] = {}
    for section, table in values.items():
        if section not in sections:
            _unknown(origins[section], section, "is no section; sections are", sections)
        with user_input(f"{origins.get(section, section)}: [{section}]"):
            try:
                built[section] = sections[section](**table)
            except ValidationError as error:
                raise UserError(_one_line(error, section, origins)) from None
    return Config(**built)


def _one_line(error: ValidationError, section: str, origins: dict[str, str]) -> str:
    errors = error.errors(include_url=False)
    first, name = errors[0], errors[0]["loc"][0]
    origin = origins.get(f"{section}.{name}", section)
    hints = get_type_hints(_sections()[section], include_extras=True)
    if name not in hints:
        if new_name := RENAMED.get(f"{section}.{name}"):
            return f"{origin}: {section}.{name} is now called {new_name}"
        near = nearest(str(name), hints, 0.5)
        hint = f"the nearest is {section}.{near}" if near else "valid are " + ", ".join(hints)
        return f"{origin}: unknown key {section}.{name}; {hint}"
    # a union (a number or a word) gives one error per type; a list gives one per item
    value = repr(first["input"])  # NaN does not equal itself
    same = [e for e in errors if e["loc"][0] == name and repr(e["input"]) == value]
    message = " or ".join(e["msg"].replace("Input should be ", "") for e in same)
    message = f"expected {message}" if "Input should be" in first["msg"] else message
    message = message.removeprefix("Value error, ")  # pydantic puts this before a validator's text
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        valid = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        near = nearest(first["input"], valid, 0.4)
        message += f"; the nearest is {near!r}" if near else ""
    more = f" (and {len(errors) - len(same)} more)" if len(errors) > len(same) else ""
    shown = value if len(value) <= 100 else f"{value[:97]}..."  # a mixture has long tables
    return f"{origin}: {section}.{name} = {shown}: {message}{more}"
