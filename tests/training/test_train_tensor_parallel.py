"""train.py with distributed.tensor_parallel, on 4 gloo processes, against one process.

In fp64, where no code turns (tests/helpers/double.py), the whole run is that of one process:
losses, norms, evaluations, telemetry, and on from a checkpoint of the other. In fp32 what a run
writes at its end is compared with the folder of the model that it saved.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet.model
from bitnet.bitlinear import BitLinear
from bitnet.build import build_model
from bitnet.config import load_config
from bitnet.data.loader import sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load
from bitnet.generate import encode_prompt, generate
from bitnet.run import locked
from bitnet.training.distributed import World
from tests.helpers.double import rotary64
from tests.helpers.ranks import on_ranks, world_of
from tests.helpers.training_script import Run, read_metrics, torchrun, train

ODD = (
    *("model.d_model=40", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=50"),
    *("optim.lr_schedule=constant", "optim.wd_schedule=constant", "optim.warmup_steps=1"),
    *("eval.every=4", "log.telemetry_every=2", "eval.max_tokens=400"),
)
"""Parts of 25 channels and of 10 rows of k and v, which two shares divide unequally."""
MEASURED = {"tokens_per_second", "data_wait", "mfu", "peak_memory_bytes"}


def train_on(n: int, folder: Path, config_file: Path, *overrides: str) -> None:
    """train.py's ``train`` on ``n`` processes, without the start of an interpreter for each."""
    overrides = (f"run.dir={folder}", *overrides)
    config = load_config([config_file], overrides).resolve()

    def work() -> None:
        world = world_of(config.strategy(n), config.distributed.tensor_parallel)
        with locked(config.run_dir) if world.is_main else nullcontext():
            train.train(config, "the command", world)

    store = folder / "-".join(overrides[1:]).replace("/", "_")[-100:]
    store.mkdir(parents=True)
    on_ranks(work, n, store)


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Numbers to some roundings of fp64, of which telemetry's have 4 digits; all else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - MEASURED:
            assert_close(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, float):
        rough = "ternary/layers" in where
        assert math.isclose(found, expected, rel_tol=2e-3 if rough else 1e-6, abs_tol=1e-6), where
    else:
        assert found == expected, where


@pytest.mark.slow  # twice four processes
def test_tensor_parallelism_one_process_and_back(
    run: Run, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 x 2 with FSDP2, one process, 2 x 2 with ddp, one after the other in one run, have every
    number of a run of one process."""
    monkeypatch.setattr(bitnet.model, "rotary", rotary64)
    monkeypatch.setattr(train, "build_model", lambda *a, **k: build_model(*a, **k).double())
    monkeypatch.setattr(train, "save_model", lambda *_, **__: "nowhere")
    odd = (*ODD, "eval.sample_tokens=0")
    expected = run(*odd, "run.name=one", "train.steps=6")
    both, name = "distributed.tensor_parallel=2", "run.name=both"
    fsdp = ("distributed.strategy=fsdp", "distributed.activation_checkpointing=2")
    train_on(4, tmp_path, config_file, *odd, name, both, *fsdp, "train.steps=2")
    run(*odd, name, "train.steps=4")
    train_on(4, tmp_path, config_file, *odd, name, both, "train.steps=6")
    rows = [row for row in read_metrics(tmp_path / "both") if "val_loss" not in row]
    alone = [row for row in expected if "val_loss" not in row]
    assert len(rows) == len(alone) == 6
    for found, row in zip(rows, alone, strict=True):
        assert_close(found, row, f"step {row['step']}")
    last = read_metrics(tmp_path / "both")[-1]
    assert_close(last, expected[-1], "the last evaluation")


def test_what_a_run_of_two_writes_is_of_the_whole_model(config_file: Path, tmp_path: Path) -> None:
    """The folder, loaded by one process, has the run's last validation loss and sample."""
    documents = ("data.document_mask=true", "model.qk_norm=true", "eval.micro_batch=3")
    options = (*ODD, "distributed.tensor_parallel=2", "train.steps=3", *documents)
    train_on(2, tmp_path, config_file, *options)
    last = read_metrics(tmp_path / "tiny")[-1]
    config = load_config([config_file], options).resolve()
    model, tokenizer = load(tmp_path / "tiny" / "model")
    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 14
    (part,) = train.open_data(config, told=False).parts
    model.document_separator = tokenizer.eos_id
    windows = sequential_windows(part.val, config.data.seq_len, config.eval.max_tokens)
    assert evaluate_windows(model, windows, tokenizer.count_bytes, 3).loss == pytest.approx(
        last["val_loss"], abs=1e-6
    )
    prompt = encode_prompt(tokenizer, "")
    (new,) = generate(model, [prompt], 8, eos_id=tokenizer.eos_ids)
    assert last["sample"] == tokenizer.decode([*prompt, *new])


def shares() -> list[tuple[int, int, float, float]]:
    found = []
    for strategy in ("ddp", "fsdp", "hsdp"):
        world = world_of(strategy, 2)  # type: ignore[arg-type]
        mine = torch.tensor(float(world.data_rank + 1))
        rows = world.share(torch.arange(4)).tolist()
        assert rows == [2 * world.data_rank, 2 * world.data_rank + 1]
        found.append(
            (world.data_rank, world.data_size, float(world.sum(mine)), float(world.mean(mine)))
        )
    return found


def test_neighbours_have_one_share_which_counts_once(tmp_path: Path) -> None:
    for rank, found in enumerate(on_ranks(shares, 4, tmp_path)):
        assert found == 3 * [(rank // 2, 2, 3.0, 1.5)]
    alone = World(torch.device("cpu"))
    assert (alone.tensor_parallel, alone.data_rank, alone.data_size) == (1, 0, 1)


@pytest.mark.slow  # starts 4 + 2 + 1 interpreters
def test_torchrun_starts_it_and_the_run_goes_on(config_file: Path, tmp_path: Path) -> None:
    """Groups of 2 of 4 processes, then of 2, then one process: the losses of one process, until
    the weights of its steps differ by roundings."""
    both, folder = "distributed.tensor_parallel=2", f"run.dir={tmp_path}"
    args = [str(config_file), *ODD, folder]
    out = torchrun(4, *args, both, "distributed.strategy=fsdp", "train.steps=9")
    assert "4 processes in groups of 2, fsdp, 4 sequences per forward of each group" in out
    out = torchrun(2, *args, both, "train.steps=12")
    assert out.count("resumed at step 9") == 1
    out = torchrun(1, *args, "train.steps=14")
    assert "resumed at step 12" in out
    torchrun(1, *args, "train.steps=14", "run.name=one")
    both_losses, losses = (
        {row["step"]: row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row}
        for name in ("tiny", "one")
    )
    assert both_losses.keys() == losses.keys() == set(range(1, 15))
    assert [both_losses[step] for step in (1, 2)] == pytest.approx(
        [losses[step] for step in (1, 2)], abs=1e-5, rel=0
    )
    load(tmp_path / "tiny" / "model")
