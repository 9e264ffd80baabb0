"""Configs: every shipped file, strictness, the rules of model.depth, and errors."""

import dataclasses
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bitnet.cli.common import config_help, split_args
from bitnet.config import (
    Config,
    default_batch_tokens,
    default_lr,
    describe,
    differences,
    load_config,
    to_dict,
    to_toml,
)
from bitnet.export.gguf_types import KINDS
from bitnet.export.gguf_write import unfit
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from bitnet.summary import model_bytes, one_line, tables

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = ["quickstart", "15m", "60m", "125m", "350m", "700m"]


@pytest.mark.parametrize("name", SIZES)
def test_shipped_configs_and_their_baselines(name: str) -> None:
    path, baseline_path = CONFIGS / f"{name}.toml", CONFIGS / "fp" / f"{name}.toml"
    config, baseline = load_config([path]).resolve(), load_config([baseline_path]).resolve()
    for file in (path, baseline_path):
        head = file.read_text().splitlines()
        assert head[0].startswith("# "), "a head comment says what the file is"
        comment = "\n".join(line for line in head if line.startswith("#"))
        if name != "quickstart" or file == path:
            for word in ("Time", "Loss"):
                assert word in comment, f"{file} does not say its {word}"
    changed = {line.partition(":")[0] for line in differences(to_dict(config), to_dict(baseline))}
    with_muon = config.optim.optimizer == "muon"  # whose rate both have (docs/evidence.md)
    own = set() if with_muon else {"optim.lr"}
    assert changed == {"run.name", "model.linear"} | own
    assert baseline.run.name == f"{name}-fp"
    assert one_line(config)
    assert len(tables(load_config([path]))) == 5


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_config_computes(path: Path) -> None:
    assert path.read_text().startswith("# "), "a head comment says what the file is"
    config = load_config([path]).resolve()
    assert tomllib.loads(to_toml(config)) == to_dict(config)
    assert config.resolve() == config


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_form_that_gguf_carries(name: str) -> None:
    plain = load_config([CONFIGS / f"{name}.toml"]).resolve().model
    config = load_config([CONFIGS / f"{name}.toml", CONFIGS / "gguf.toml"]).resolve()
    for kind in KINDS:
        assert "activation" in unfit(plain, kind)
        assert unfit(config.model, kind) == ""
    assert config.model.n_layers == plain.n_layers
    assert 0 <= config.model.d_model - plain.d_model < 256
    assert config.model.head_dim == 64
    with torch.device("meta"):
        one = Transformer(dataclasses.replace(config.model, n_layers=1))
    assert one.layers[0].mlp.up_proj.weight.shape == (config.model.d_ff, config.model.d_model)


def test_widths_are_rounded_up() -> None:
    def widths(**fields: int) -> tuple[int, int]:
        resolved = ModelConfig(**fields).resolve(100, 10)  # type: ignore[arg-type]
        return resolved.d_model, resolved.d_ff

    assert widths(depth=10) == (640, 1728)
    assert widths(depth=10, width_multiple=256) == (768, 2048)
    assert widths(depth=4, width_multiple=256) == (256, 768)
    assert widths(d_model=100, d_ff=7, width_multiple=256) == (100, 7)  # what is given stays


@pytest.mark.parametrize(
    ("name", "millions"),
    [("15m", 15), ("60m", 64), ("125m", 125), ("350m", 389), ("700m", 645)],
)
def test_sizes_are_what_the_names_say(name: str, millions: int) -> None:
    model = load_config([CONFIGS / f"{name}.toml"]).resolve().model
    assert model.num_parameters()["total"] / 1e6 == pytest.approx(millions, abs=0.6)
    assert 0.85 < model.num_parameters()["total"] / (float(name[:-1]) * 1e6) < 1.15


def test_resolving_is_idempotent_and_survives_toml() -> None:
    config = load_config([CONFIGS / "60m.toml"], ["model.qk_norm=true"]).resolve()
    assert config.resolve() == config
    again = tomllib.loads(to_toml(config))
    assert again == to_dict(config)


def test_files_in_order_then_the_command_line(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "sub" / "two.toml"
    two.parent.mkdir()
    one.write_text("[model]\ndepth = 2\nqk_norm = true\n[optim]\nlr = 1e-3\n")
    two.write_text('extends = "../one.toml"\n[model]\ndepth = 3\n')
    config = load_config([two], ["optim.lr=2e-3"])
    assert (config.model.depth, config.model.qk_norm, config.optim.lr) == (3, True, 2e-3)
    assert config.run.name == "two"
    assert load_config([two, one]).model.depth == 2
    assert load_config([one], ["run.name=12"]).run.name == "12"
    assert load_config([one], ["data.sources=texts"]).data.sources == ["texts"]
    assert load_config([one], ['data.sources=["a", "b"]']).data.sources == ["a", "b"]


MISTAKES = [
    (["optim.lrr=1"], "command line: unknown key optim.lrr; the nearest is optim.lr"),
    (["quant.gradient=clip"], "command line: quant.gradient is now called quant.grad_mask$"),
    (["quant.gradient_c=2"], "command line: quant.gradient_c is now called quant.grad_mask_c$"),
    (["optm.lr=1"], "optm is no section.*did you mean 'optim'"),
    (["optim.lr=fast"], "command line: optim.lr = 'fast': expected a valid number"),
    (["train.steps=1.5"], "train.steps = 1.5: expected a valid integer"),
    (["model.depth=0"], "model.depth = 0: expected greater than or equal to 1"),
    (["model.linear=ternry"], "the nearest is 'ternary'"),
    (["train.compile=1"], "train.compile = 1: expected a valid boolean"),
    (["data.sources=[]"], "data.sources"),
    (["quant.modules=linaer"], "quant.modules = 'linaer': expected .*the nearest is 'linear'"),
    (['quant.modules=["linear", 3]'], "quant.modules = 3: expected"),
    (["qat.start=soon"], "qat.start = 'soon': expected a valid number or 'auto'"),
    (["qat.start=-1"], "qat.start = -1: expected greater than or equal to 0 or 'auto'"),
    (["distributed.timeout=40000000"], "distributed.timeout = 40000000: expected less than"),
    (["verbose"], "expected section.key=value"),
    (["=3"], "expected section.key=value"),
    (["model.n_heads=5"], "model.n_heads = 5 does not divide model.d_model = 384"),
    (["train.batch_tokens=1000"], "train.batch_tokens = 1000 is not a multiple of"),
    (["train.tokens=1000", "train.steps=7"], "train.tokens = 1000 and train.steps = 7 disagree"),
    (["model.vocab_size=77"], "model.vocab_size = 77 differs from the tokenizer's 8192"),
    (["model.max_seq_len=8"], "model.max_seq_len = 8 is less than data.seq_len = 512"),
    (["data.tokenizer=no/such.model"], "no/such.model"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config([], overrides).resolve()
    assert "\n" not in str(caught.value)


def test_mistakes_in_files_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, message in (
        ("[model]\ndepht = 3\n", "mine.toml: unknown key model.depht; the nearest is model.depth"),
        (
            '[quant]\ngradient = "clip"\n',
            "mine.toml: quant.gradient is now called quant.grad_mask$",
        ),
        ("depth = 3\n", "mine.toml: depth is outside any section"),
        ("[model\n", "mine.toml: not valid TOML"),
        ('extends = "mine.toml"\n', "mine.toml: extends = 'mine.toml' must name another"),
        ('extends = "base.toml"\n', "base.toml: no such config file"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config([path])
    with pytest.raises(UserError, match=r"mne.toml: no such config file; the nearest is .*mine"):
        load_config([tmp_path / "mne.toml"])
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text('extends = "b.toml"\n')
    b.write_text('extends = "a.toml"\n')
    with pytest.raises(UserError, match="not a circle"):
        load_config([a])


def test_dial_rules_meet_the_published_tables() -> None:
    # TriLM (arXiv 2407.12327): 99-190M 2.4e-3, 390M 1.8e-3, 830M 1.5e-3, 1.5B and more 1.2e-3
    for n, lr in ((140e6, 2.4e-3), (390e6, 1.8e-3), (830e6, 1.5e-3), (1.5e9, 1.2e-3)):
        assert default_lr(int(n), "ternary") == pytest.approx(lr, rel=0.07)
        ratio = default_lr(int(n), "ternary") / default_lr(int(n), "fp")
        assert ratio == pytest.approx(6, rel=0.05)  # each is rounded to two digits
    assert default_lr(1_000_000, "ternary") == 4e-3
    for linear in ("fp", "ternary"):
        tenth = default_lr(1_000_000, linear) / 10
        assert default_lr(1_000_000, linear, saved=True) == pytest.approx(tenth, rel=0.01)
    assert default_batch_tokens(50_000_000) == 2**18  # QuEST
    assert default_batch_tokens(700_000_000) == 2**20  # b1.58
    assert default_batch_tokens(1000) == 2**14


def test_the_dial_sets_the_token_budget() -> None:
    config = load_config([], ["model.depth=4"]).resolve()
    n = config.model.num_parameters()["total"]
    assert config.train.tokens == pytest.approx(20 * n, rel=0.01)
    assert config.train.steps * config.train.batch_tokens == config.train.tokens
    assert config.batch_sequences % config.train.micro_batch == 0
    longer = load_config([], ["model.depth=4", "train.steps=7"]).resolve()
    assert longer.train.tokens == 7 * longer.train.batch_tokens


@pytest.mark.parametrize(
    ("seq_len", "gpu", "cpu"),
    [(512, 16, 4), (1024, 8, 2), (256, 32, 8), (4096, 2, 1), (384, 21, 1)],
)
def test_a_cpu_takes_smaller_micro_batches_of_the_same_batch(
    seq_len: int, gpu: int, cpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    common = ["model.depth=4", f"data.seq_len={seq_len}"]
    large, small, auto = (
        load_config([], [*common, f"train.device={device}"]).resolve()
        for device in ("cuda:1", "cpu", "auto")
    )
    assert [c.train.micro_batch for c in (large, small, auto)] == [gpu, cpu, cpu]
    assert large.train.batch_tokens == small.train.batch_tokens == auto.train.batch_tokens
    assert small.batch_sequences % cpu == 0
    assert small.resolve() == small
    asked = load_config([], [*common, "train.device=cpu", "train.micro_batch=2"]).resolve()
    assert asked.train.micro_batch == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert load_config([], common).resolve().train.micro_batch == gpu


def test_model_bytes_are_those_of_a_packed_model() -> None:
    from bitnet.linear import pack
    from bitnet.model import ModelConfig, Transformer

    for granularity in ("tensor", "row", "group"):
        config = ModelConfig(
            depth=1, vocab_size=100, max_seq_len=8, granularity=granularity
        ).resolve()
        model = Transformer(config)
        assert sum(p.nbytes for p in model.parameters()) == model_bytes(config)["fp32"]
        packed = pack(model)
        total = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
        assert total == model_bytes(config)["packed"]
    assert "packed" not in model_bytes(dataclasses.replace(config, linear="fp"))


def test_every_key_is_documented_in_help() -> None:
    keys = list(describe())
    assert len(keys) > 50
    text = config_help()
    for section, key, _, documentation in keys:
        assert len(documentation) > 5, f"{section}.{key} has no documentation"
        assert f"  {key} = " in text
    for section in dataclasses.fields(Config):
        assert f"[{section.name}]" in text


HEADS = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2"]
TENSOR_PARALLEL = {
    "1": "",
    "0": "expected greater than or equal to 1",
    "3": "= 3 does not divide model.n_heads = 4; for this model it can be 2 or a divisor",
    "4": "= 4 does not divide model.n_kv_heads = 2",
    "2 model.d_ff=171": "= 2 does not divide model.d_ff = 171",
    "2": "",
    "2 distributed.strategy=fsdp": "",
    "2 optim.optimizer=muon": 'does not go with optim.optimizer = "muon"',
    "2 train.compile=true": "does not go with train.compile = true",
    "2 model.granularity=group": 'the columns of model.granularity = "group"',
    "2 model.linear=fp quant.weights=int": r"which \[quant\] needs whole: set it to 1",
    "2 distill.teacher=x": r"which \[distill\] needs whole: set it to 1",
    "2 model.linear=fp model.norm_placement=in_linear": "the full-precision matrices",
}


@pytest.mark.parametrize("setting", TENSOR_PARALLEL)
def test_what_tensor_parallelism_can_divide(setting: str) -> None:
    overrides = f"distributed.tensor_parallel={setting}".split()
    message = TENSOR_PARALLEL[setting]
    refused = pytest.raises(UserError, match=f"distributed.tensor_parallel.*{message}")
    with refused if message else nullcontext():
        load_config([], [*HEADS, *overrides]).resolve()


def test_shares_of_a_batch_are_of_groups() -> None:
    config = load_config(
        [],
        [
            *(*HEADS, "data.seq_len=128", "train.batch_tokens=1536", "train.micro_batch=4"),
            "distributed.tensor_parallel=2",
        ],
    ).resolve()
    assert [config.shares(n) for n in (2, 4, 6)] == [1, 2, 3]
    assert [config.micro_batch(n) for n in (2, 4, 6)] == [4, 2, 4]  # of 12 sequences
    for n, said in ((1, "set it to 1"), (3, "set it to 1"), (5, "a multiple of 2")):
        with pytest.raises(
            UserError, match=f"tensor_parallel = 2 does not divide .*, {n}: .*{said}"
        ):
            config.micro_batch(n)
    with pytest.raises(UserError, match="5 groups of 2 processes cannot share equally"):
        config.micro_batch(10)
    assert config.strategy(4) == "ddp"
    large = dataclasses.replace(config.model, d_model=4096, n_layers=24, d_ff=16384)
    config = dataclasses.replace(config, model=large)
    assert large.num_parameters()["total"] > 6e9
    assert [config.strategy(n) for n in (2, 4)] == ["ddp", "fsdp"], "several shares are divided"
    spread = dataclasses.replace(config.distributed, tensor_parallel=8)
    config = dataclasses.replace(config, distributed=spread)
    assert config.strategy(16) == "ddp", "less than 1B parameters for each process"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("qat.start=0.5", "qat.start has no effect: quant.weights is not set"),
        ("distill.attention=2.0", "distill.attention has no effect: distill.teacher is not set"),
        ("distributed.shard_size=2", "distributed.shard_size has no effect: distributed.strategy"),
        ("adapter.rank=8", "adapter.rank has no effect: adapter.kind is not set"),
        ("quant.weights=int qat.freeze_observers=0.5", 'quant.activations is not "static"'),
    ],
)
def test_keys_without_effect_are_mistakes(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([CONFIGS / "quickstart.toml"], ["model.linear=fp", *override.split()]).resolve()


@pytest.mark.parametrize("path", ["é/😀", 'a"b', "a\\b", "a=b#c", " a ", "a\nb", "'a'", "[1]"])
def test_data_values_reach_the_config_as_they_are(path: str) -> None:
    config = load_config([], data={"path": path, "sources": [path]})
    assert (config.data.path, config.data.sources) == (path, [path])


@pytest.mark.parametrize("text", ["[" * 5000, "1" * 5000, "a = 1e400\n" * 2, "\0"])
def test_hostile_toml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"[train]\nsteps = {text}\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config([path])


@pytest.mark.parametrize(
    "override",
    ["train.tokens=1" + "0" * 400, "train.batch_tokens=1" + "0" * 30, "train.steps=1" + "0" * 5000,
     "data.seq_len=1" + "0" * 400, "data.tokenizer=" + "a" * 4000, "train.init_from=.",
     "optim.lr=1e400", "train.steps=" + "[" * 5000, "train.steps=true", "optim.lr=nan",
     "data.sources=\udcff", "data.text_field=\udcff", "train.init_from=\udcff"],
    ids=lambda override: ascii(override[:24]),
)  # fmt: skip
def test_absurd_values_are_one_line(override: str) -> None:
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}|not a model folder"):
        load_config([], [override]).resolve()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=a#b", "a#b"),
        ('run.dir="a" # b', '"a" # b'),
        ('run.dir="a#b"', "a#b"),
        ("run.dir=a\nseed=3", "a\nseed=3"),
        ('run.dir="a"\n', "a"),
        ("run.dir=", ""),
        ("run.dir=a=b", "a=b"),
        ("run.dir=1,", "1,"),
        ("run.dir=1]\nx=[2", "1]\nx=[2"),
        ('run.dir="""a\nb"""', "a\nb"),
        ("data.sources=2024", ["2024"]),
        ("data.sources=a#b", ["a#b"]),
        ("data.sources=[", ["["]),
        ('data.sources=["a",\n"b"]', ["a", "b"]),
    ],
)
def test_an_override_is_taken_whole(override: str, value: object) -> None:
    config = load_config([], [override])
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(config, section), key) == value
    assert config.run.seed == 0


@pytest.mark.parametrize(
    "override", ["train.steps=5 # five", "train.steps=5\nseed=3", "train.steps=5\n[run]\nseed=3"]
)
def test_more_than_a_value_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"train\.steps = '5.*': expected a valid integer"):
        load_config([], [override])


@pytest.mark.parametrize(
    "name",
    ["\0", "a\nb", "\x1b[31m", "a/b", "..", ".", "/", "/a", "n" * 300, "é" * 101, "-x", "\udcff"],
)
def test_a_run_has_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name = .*expected a folder's name") as caught:
        load_config([], ["train.steps=9", f"run.name={name}"]).resolve()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "é😀", "[b]", "a b", "a=b#c", ".x", "n" * 200])
def test_other_names_are_kept(name: str) -> None:
    assert load_config([], [f"run.name={name}"]).resolve().run.name == name


def test_every_count_has_a_limit() -> None:
    for section, key, default, _ in describe():
        if type(default) is int:
            for value in ("1" + "0" * 30, "-1" + "0" * 30):
                with pytest.raises(UserError, match=f"{section}.{key} = -?10"):
                    load_config([], [f"{section}.{key}={value}"])


@pytest.mark.parametrize("base", ["\\u0000", "x" * 5000, "", "."])
def test_a_hostile_extends_is_one_line(tmp_path: Path, base: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'extends = "{base}"\n')
    with pytest.raises(UserError, match=str(tmp_path)):
        load_config([path])


def test_a_config_file_with_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "lr=3e-4.toml"
    path.write_text("[model]\ndepth = 3\n")
    words = [str(path), "run.dir=x.toml", "optim.lr=1e-3", "data.path=" + "a" * 5000 + ".toml"]
    assert split_args(words) == (words[:1], words[1:])
    assert load_config(*split_args(words[:3])).model.depth == 3
