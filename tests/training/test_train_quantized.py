"""train.py with [quant], [qat], [distill], [adapter]: it learns, resumes exactly, and says no."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.build import as_saved, build_model
from bitnet.config import Config, default_lr, load_config
from bitnet.durable import sha256
from bitnet.evaluate import evaluation_mode
from bitnet.export.folder import load, load_model, read_config, save_model
from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.layers import QATEmbedding, QATLinear
from bitnet.qat.prepare import prepare as quantize
from bitnet.qat.recipe import Recipe
from bitnet.qat.schedule import optimal_share
from bitnet.schema import UserError
from bitnet.summary import one_line
from bitnet.training.distributed import World
from bitnet.training.optim import OptimConfig, param_groups
from tests.helpers.shared import Shared
from tests.helpers.training_script import Run, exact, kill_at, read_metrics, spawn, train

FP = ("model.linear=fp", "log.telemetry_every=0")
LSQ = (*FP, "quant.weights=lsq", "quant.activations=static", "qat.start=0.5")
RAMPS = ("qat.weight_warmup=0.2", "qat.activation_warmup=0.1", "qat.freeze_observers=0.9")
BITNET = (*FP, "quant.weights=absmean", "quant.granularity=tensor")


@pytest.fixture(scope="session")
def pretrained(config_file: Path, shared: Shared) -> Path:
    """A full-precision model folder."""

    def make(folder: Path) -> None:
        config = load_config([config_file], [f"run.dir={folder}", "run.name=fp", *FP]).resolve()
        with train.locked(config.run_dir):
            train.train(config, "the command", World(torch.device("cpu")))

    return shared("pretrained", make) / "fp" / "model"


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_pretraining_that_becomes_quantized(run: Run, tmp_path: Path) -> None:
    rows = [row for row in run(*LSQ, *RAMPS) if "loss" in row]
    plain = run("run.name=plain", *FP, "optim.decay_fraction=0.33")
    half = [row["loss"] for row in rows[:20]]
    assert half == losses(plain)[:20], "until it begins, it is the full-precision run"
    assert rows[-1]["loss"] < 4.5
    assert [row["lambda_w"] for row in rows[19:29]] == pytest.approx(
        [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1]
    )
    assert [row["lambda_a"] for row in rows[19:26]] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    folder = tmp_path / "tiny" / "model"
    model, _ = load(folder)
    assert read_config(folder).quant.weights == "lsq"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QATLinear)}
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.weight_step is not None
        assert layer.input_observer is not None
        assert int(layer.input_observer.n_seen) == 36 * 2, "2 micro-batches, frozen at step 36"
    assert [row for row in read_metrics(tmp_path / "tiny") if "val_loss" in row]


def test_bitnets_own_recipe_trains_and_saves_the_ternary_model(run: Run, tmp_path: Path) -> None:
    """The same numbers as model.linear = "ternary", to the last bit."""
    ternary = run("run.name=ternary", "log.telemetry_every=0")
    rows = run(*BITNET, "optim.lr=3e-3")
    assert losses(rows) == losses(ternary)
    folder = tmp_path / "tiny" / "model"
    assert not read_config(folder).quant.enabled
    model, _ = load(folder)
    assert model.config.linear == "ternary"
    assert isinstance(model.layers[1].mlp.up_proj, BitLinear)
    twin, _ = load(tmp_path / "ternary" / "model")
    tokens = torch.randint(320, (2, 16))
    with evaluation_mode(model), evaluation_mode(twin):
        assert torch.equal(model(tokens), twin(tokens))


def test_a_partial_bitnet_recipe_keeps_its_recipe(run: Run, tmp_path: Path) -> None:
    run(*BITNET, "quant.skip=*.v_proj", "train.steps=2")
    assert read_config(tmp_path / "tiny" / "model").quant.skip == ["*.v_proj"]


# -- From a folder -------------------------------------------------------------------------------


def test_the_folder_gives_shape_and_tokenizer(
    pretrained: Path, config_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bare.toml"
    path.write_text(f'[train]\ninit_from = "{pretrained}"\nbatch_tokens = 2560\nsteps = 3\n')
    here = ["data.seq_len=32", f"data.path={tmp_path}/new"]
    config = load_config([path], here).resolve()
    saved = read_config(pretrained).model
    assert (config.model.d_model, config.model.n_layers, config.model.d_ff) == (32, 2, 64)
    assert config.model.max_seq_len == saved.max_seq_len
    assert config.data.tokenizer == str(pretrained / "tokenizer.model")
    assert config.resolve() == config
    sources = load_config([config_file]).data
    same = [f"data.path={sources.path}", *here[:1]]
    data = load_config([path], same).resolve().data
    assert (data.tokenizer, data.vocab_size) == ("", 320), "the set's own is the same"


def test_fine_tuning_starts_from_the_folder_and_ends_quantized(
    run: Run, pretrained: Path, tmp_path: Path
) -> None:
    rows = run(*BITNET, f"train.init_from={pretrained}", "train.steps=10")
    assert losses(rows)[0] < 5
    learned = (*LSQ[:-1], "optim.lr=1e-3")
    run("run.name=lsq", *learned, f"train.init_from={pretrained}", "train.steps=10")
    folder = tmp_path / "lsq" / "model"
    again = f"train.init_from={folder}"
    run("run.name=again", *FP, again, "train.steps=1", "optim.lr=1e-30", "quant.weights=none")
    before, after = (load(path)[0].state_dict() for path in (folder, tmp_path / "again/model"))
    assert before.keys() == after.keys(), "the recipe came with the folder"
    for name, tensor in before.items():
        moves = name.endswith(("low", "high", "n_seen"))  # one batch more was seen
        assert torch.equal(tensor, after[name]) != moves, name
    seen = "layers.0.self_attn.q_proj.input_observer.n_seen"
    assert int(after[seen]) == int(before[seen]) + 2
    other = ("quant.weights=int", "quant.bits=8", "quant.activations=none")
    run("run.name=other", *FP, *other, again, "train.steps=1", "optim.lr=1e-30")
    model, _ = load(tmp_path / "other" / "model")
    assert torch.equal(model.embed_tokens.weight, before["embed_tokens.weight"])
    assert not any("weight_step" in name for name in model.state_dict())


def test_adapters_train_alone_and_are_merged(
    run: Run, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, _ = load(pretrained)
    for kind, more in (("lora", BITNET), ("lora", FP), ("qlora", FP)):
        name = f"run.name={kind}{len(more)}"
        options = (*more, f"train.init_from={pretrained}", f"adapter.kind={kind}", "optim.lr=3e-3")
        rows = run(name, *options, "adapter.rank=4", "train.steps=12", "eval.every=6")
        first, *_, last = (row["val_loss"] for row in rows if "val_loss" in row)
        assert last < first
        assert "layers merged" in capsys.readouterr().out
        model, _ = load(tmp_path / name.partition("=")[2] / "model")
        assert torch.equal(model.embed_tokens.weight, start.embed_tokens.weight)
        a, b = (m.layers[0].mlp.up_proj.weight for m in (model, start))
        assert not torch.equal(a, b)


def test_learned_scales_are_not_decayed() -> None:
    recipe = {"weights": "lsq", "granularity": "group", "group_size": 8}
    values = {"model": {"linear": "fp", "depth": 1, "vocab_size": 300, "max_seq_len": 8}}
    model = quantize(Transformer(ModelConfig(**values["model"])), Recipe(**recipe))
    for optimizer in ("adamw", "muon"):
        groups = param_groups(model, OptimConfig(optimizer=optimizer))
        ids = {key: {id(p) for p in group} for key, group in groups.items()}
        steps = [p for name, p in model.named_parameters() if name.endswith("weight_step")]
        assert steps
        assert all(step.ndim == 2 and id(step) in ids["no_decay"] for step in steps)
        assert sum(map(len, groups.values())) == len(list(model.parameters()))


# -- Killed --------------------------------------------------------------------------------------


def test_killed_and_resumed_is_bit_identical(
    run: Run, config_file: Path, pretrained: Path, tmp_path: Path
) -> None:
    teach = (f"distill.teacher={pretrained}", "distill.relation_heads=4", "distill.balance_every=7")
    args = [str(config_file), *LSQ, *RAMPS, *teach, "optim.optimizer=muon", "train.steps=20"]
    expected = run(*args[1:], f"run.dir={tmp_path / 'whole'}")

    args.append(f"run.dir={tmp_path / 'killed'}")
    metrics = tmp_path / "killed" / "tiny" / "metrics.jsonl"
    kill_at(spawn(args), metrics, 10, 0.01)  # at the switch; the test below resumes around it
    final = spawn(args)
    assert final.wait(120) == 0, final.communicate()
    final.communicate()
    assert exact(read_metrics(tmp_path / "killed" / "tiny")) == exact(expected)
    whole, killed = (load(tmp_path / f"{name}/tiny/model")[0] for name in ("whole", "killed"))
    for (name, a), b in zip(whole.state_dict().items(), killed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


INT4 = ("quant.weights=int", "quant.granularity=group", "quant.group_size=16")
STEPWISE = {
    "learned steps": (*LSQ, "quant.granularity=group", "quant.observer=percentile"),
    "affine, mse": (
        *(*FP, *INT4, "quant.symmetric=false", "qat.start=0.5", "quant.observer=mse"),
        *("quant.activations=static", "quant.activation_symmetric=false"),
    ),
    "adapters": (*FP, *INT4, "adapter.kind=lora", "train.init_from={pretrained}"),
}


@pytest.mark.parametrize("options", STEPWISE.values(), ids=STEPWISE)
def test_every_step_around_the_switch_resumes_exactly(
    options: tuple[str, ...], run: Run, pretrained: Path, tmp_path: Path
) -> None:
    """From each checkpoint in turn, the rest of the run is what it was."""
    options = tuple(option.format(pretrained=pretrained) for option in options)
    options += (f"distill.teacher={pretrained}", "distill.relation_heads=4", "train.steps=6")
    options += ("distill.balance_every=2", "eval.every=6", "model.n_layers=2")
    options += ("checkpoint.every=1", "checkpoint.keep_last=9")
    expected = run(*options)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    model = (tmp_path / "tiny" / "model" / "model.safetensors").read_bytes()
    observed = "quant.activations=static" in options
    assert observed == (b"input_observer.n_seen" in model)
    for step in (4, 3, 2):  # the switch is at 3
        for path in checkpoints.glob("step_*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        assert exact(run(*options)) == exact(expected)
        assert (tmp_path / "tiny" / "model" / "model.safetensors").read_bytes() == model


def test_a_begun_run_refuses_other_sections(run: Run, pretrained: Path, tmp_path: Path) -> None:
    begun = (*LSQ, "train.steps=4", f"distill.teacher={pretrained}", "distill.relation_heads=4")
    run(*begun)
    for change in ("quant.bits=8", "qat.start=0.25", "distill.logits=2.0"):
        key = change.partition("=")[0]
        with pytest.raises(UserError, match=rf"another config: {key}: .* -> "):
            run(*begun, change)
    with pytest.raises(UserError, match=r"another config: .*train.init_from: '' -> "):
        run(*begun, f"train.init_from={pretrained}")
    run(*begun, "distill.device=cpu")  # this may change
    with pytest.raises(UserError, match=r"^train.steps = 8: .* a run of 4 steps, and qat.start"):
        run(*begun, "train.steps=8")


def test_learned_scales_come_only_with_their_recipe(pretrained: Path, tmp_path: Path) -> None:
    """Steps of 4 bits say nothing about 3 bits, though names and shapes are the same."""
    model, tokenizer = load(pretrained)
    recipe = Recipe(weights="lsq", bits=4)
    quantize(model, recipe)
    for layer in (m for m in model.modules() if isinstance(m, QATLinear)):
        layer.weight_step.data.fill_(0.123)  # type: ignore[union-attr]
    save_model(tmp_path / "lsq", model, tokenizer, quant=recipe)
    start = [f"train.init_from={tmp_path / 'lsq'}", "model.linear=fp", "data.seq_len=32"]
    for bits in (4, 3):
        options = [*start, "quant.weights=lsq", f"quant.bits={bits}"]
        config = load_config([], options).resolve()
        built = build_model(config, tokenizer.hash, fresh=True)
        layers = [m for m in built.modules() if isinstance(m, QATLinear)]
        assert len(layers) == 14
        for layer in layers:
            assert layer.weight_step is not None
            wanted = config.quant.quantizer.initial_step(layer.weight)
            assert torch.equal(layer.weight_step, wanted if bits == 3 else wanted.fill_(0.123))


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head_is_saved_as_it_trained(tied: bool, tmp_path: Path) -> None:
    """A ternary model's head is in full precision, so it is not one."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "vocab_size": 300}
    config = ModelConfig(linear="fp", max_seq_len=16, tie_embeddings=tied, **shape)  # type: ignore[arg-type]
    recipe = Recipe(weights="absmean", granularity="tensor", keep_first_last=False)
    model = quantize(Transformer(config), recipe).eval()
    assert isinstance(model.get_submodule("lm_head"), QATLinear)
    assert isinstance(model, Transformer)
    trained, quant = as_saved(model, recipe)
    save_model(tmp_path / "model", trained, None, quant=quant)
    again = load_model(tmp_path / "model").eval()
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(again(tokens), model(tokens))
    assert isinstance(again.lm_head, QATLinear)


def test_runs_from_before_keys_were_renamed_go_on(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    """config.toml and state.json as they were written when ``grad_mask`` was ``gradient``."""
    options = (*BITNET, "quant.grad_mask=clip", "quant.grad_mask_c=2.5", "train.steps=9")
    expected = run(*options, "checkpoint.every=4", "eval.every=9")
    run_dir = tmp_path / "tiny"
    shutil.rmtree(run_dir / "checkpoints" / "step_00000009")
    checkpoint = run_dir / "checkpoints" / "step_00000008"
    record, state = run_dir / "config.toml", checkpoint / "state.json"
    for path in (record, state):
        text = path.read_text()
        assert text.count("grad_mask") == 4  # those of [model] stay
        section = text.index("[quant]" if path == record else '"quant"')
        old = text[section:].replace("grad_mask", "gradient")
        path.write_text(text[:section] + old)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = state.read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": sha256(state)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))

    assert load_config([record]).quant == load_config([config_file], options).quant
    assert exact(run(*options, "checkpoint.every=4", "eval.every=9")) == exact(expected)
    with pytest.raises(UserError, match=r"another config: quant.grad_mask: 'clip' -> 'trust'"):
        run(*options, "quant.grad_mask=trust")


def test_another_teacher_in_the_same_folder_is_refused(run: Run, tmp_path: Path) -> None:
    run("run.name=teacher", *FP, "train.steps=2")
    teacher = f"distill.teacher={tmp_path / 'teacher/model'}"
    options = (*FP, teacher, "distill.relation_heads=4", "train.steps=3")
    rows = run(*options)
    assert {"distill/logits", "distill/attention_scale"} <= set(rows[0])
    run("run.name=teacher", *FP, "train.steps=4")
    with pytest.raises(UserError, match="is another model than when this run began"):
        run(*options)


# -- The config ----------------------------------------------------------------------------------


def resolved(*overrides: str) -> Config:
    return load_config([], ["model.linear=fp", "quant.weights=absmean", *overrides]).resolve()


def test_auto_start_and_the_fused_cooldown() -> None:
    config = resolved("model.depth=4", "qat.start=auto")
    n = config.model.num_parameters()["total"]
    share = optimal_share(config.train.tokens, n, 1.58)
    assert config.qat.start == 1 - share
    assert share == pytest.approx(0.233, abs=0.002)  # 20 tokens a parameter
    assert config.optim.decay_fraction == pytest.approx(share)
    assert config.resolve() == config
    assert resolved("qat.start=0.5").optim.decay_fraction == 0.33
    assert resolved("qat.start=0.9").optim.decay_fraction == pytest.approx(0.1)
    assert resolved("qat.start=0.9", "qat.fused_cooldown=false").optim.decay_fraction == 0.33
    assert resolved("qat.start=0.9", "optim.lr_schedule=cosine").optim.decay_fraction == 0.33


def test_the_dial_takes_a_tenth_for_a_saved_model_and_for_its_control(pretrained: Path) -> None:
    start = [f"train.init_from={pretrained}", "model.linear=fp", "data.seq_len=32"]
    control = load_config([], start).resolve()
    n = control.model.num_parameters()["total"]
    assert control.optim.lr == pytest.approx(default_lr(n, "fp") / 10, rel=0.05)
    assert load_config([], [*start, "quant.weights=int"]).resolve().optim.lr == control.optim.lr
    ternary = load_config([], [*start, "model.linear=ternary"]).resolve()
    assert ternary.optim.lr == pytest.approx(default_lr(n, "ternary") / 10, rel=0.05)
    assert {one.optim.muon_lr for one in (control, ternary)} == {0.002}
    assert (
        load_config([], ["model.depth=1", "model.vocab_size=64"]).optim.muon_lr == 0
    )  # unresolved
    asked = load_config([], [*start, "optim.lr=1e-3"]).resolve()
    assert asked.optim.lr == 1e-3
    assert one_line(ternary).endswith(f"LR {ternary.optim.lr:g}, a tenth of pretraining's")
    assert one_line(asked).endswith("LR 0.001")


MISTAKES = [
    (["model.linear=ternary", "quant.weights=int"], 'set model.linear = "fp" with it'),
    (["quant.weights=integer"], "quant.weights = 'integer': expected .*; the nearest is"),
    (["quant.bit=4"], "unknown key quant.bit; the nearest is quant.bits"),
    (["quant.bits=1"], "quant.bits = 1: expected greater than or equal to 2"),
    (["quant.modules=linaer"], "quant.modules = 'linaer': expected .*; the nearest is 'linear'"),
    (["quant.weights=int", "quant.skip=qproj"], r"\[quant\]: .*'qproj'.*nearest is 'q_proj'"),
    (["quant.weights=int", "quant.include=nothing"], r"\[quant\]: .*'nothing'"),
    (["quant.weights=int", "model.norm_placement=in_linear"], "model.norm_placement"),
    (["quant.weights=int", "train.compile=true"], "train.compile = true does not go with"),
    (["qat.start=soon"], "qat.start = 'soon': expected a valid number or 'auto'"),
    (["qat.start=1.0"], "qat.start = 1.0: expected less than 1"),
    (["qat.strt=0.1"], "unknown key qat.strt; the nearest is qat.start"),
    (["qat.weight_ramp=line"], "qat.weight_ramp = 'line': .*the nearest is 'linear'"),
    (["quant.weights=int", "qat.start=auto"], 'qat.start = "auto": .*give a share'),
    (["quant.weights=int", "qat.start=0.5", "qat.weight_warmup=0.6"], "qat.weight_warmup = 0.6"),
    (
        ["quant.weights=int", "qat.start=auto", "train.init_from={pretrained}"],
        'qat.start = "auto" plans a run that pretrains',
    ),
    (["train.init_from={pretrained}", "model.d_model=64"], "has model.d_model = 32, this"),
    (["train.init_from={pretrained}", "model.activation=silu"], "has model.activation = 'relu2'"),
    (["train.init_from={pretrained}", "data.seq_len=64"], "model.max_seq_len = 32 is less than"),
    (["distill.teacher={tmp}/none"], "none: no such model folder"),
    (["distill.teacher={pretrained}", "distill.device=tpu"], "'tpu' cannot be used here"),
    (["distill.teacher={pretrained}", "distill.relation_heads=5"], "distill.relation_heads = 5"),
    (["distill.teacher={pretrained}", "distill.temperature=0"], "distill.temperature = 0"),
    (["distill.attention_layer=1"], "distill.attention_layer = 1: expected less than 0"),
    (["adapter.kind=lora"], "set train.init_from"),
    (["adapter.kind=dora"], "adapter.kind = 'dora': .*the nearest is 'lora'"),
    (
        ["adapter.kind=lora", "train.init_from={pretrained}", "adapter.targets=q_prj"],
        r"\[adapter\]: targets: .*'q_prj'.*nearest is 'q_proj'",
    ),
    (
        ["adapter.kind=qlora", "train.init_from={pretrained}", "quant.weights=int"],
        'adapter.kind = "qlora" quantizes its base by itself',
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    overrides: list[str],
    message: str,
    config_file: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [o.format(pretrained=pretrained, tmp=tmp_path) for o in overrides]
    monkeypatch.setattr(
        sys, "argv", ["train.py", str(config_file), "model.linear=fp", f"run.dir={tmp_path}", *args]
    )
    with pytest.raises(SystemExit) as caught:
        train.command()
    assert caught.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    with pytest.raises(UserError, match=message):
        raise UserError(error)
    if "no such model folder" in message:
        assert not (tmp_path / "tiny").exists(), "no run folder is left behind"


def test_packed_folders_do_not_train(run: Run, pretrained: Path, tmp_path: Path) -> None:
    run("train.steps=1")
    model, tokenizer = load(tmp_path / "tiny" / "model")
    save_model(tmp_path / "packed", pack(model), tokenizer)
    with pytest.raises(UserError, match="its weights are packed; training needs latent ones"):
        run("run.name=second", f"train.init_from={tmp_path / 'packed'}")


EMBEDDED = (
    *(*FP, "quant.weights=int", "quant.bits=4", "quant.keep_first_last=false"),
    'quant.modules=["linear","embedding"]',
)


def test_a_recipe_with_embeddings_trains_resumes_and_teaches(run: Run, tmp_path: Path) -> None:
    """Evaluations write a sample, so the engine reads the embedding in training, too."""
    expected = run("run.name=whole", "train.steps=12", *EMBEDDED)
    run("train.steps=12", *EMBEDDED)
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step_00000012")
    assert exact(run("train.steps=12", *EMBEDDED)) == exact(expected)
    assert all("no sample" not in row.get("sample", "") for row in expected)
    folder = tmp_path / "tiny" / "model"
    assert isinstance(load(folder)[0].embed_tokens, QATEmbedding)
    assert run("run.name=begun", "train.steps=3", *FP, f"train.init_from={folder}")
    taught = run("run.name=taught", "train.steps=3", *FP, f"distill.teacher={folder}")
    assert len(losses(taught)) == 3
