"""A step of training takes the fast paths, in wrappers too, and is the same on more processes.

The fast paths: each weight quantized once for all micro-batches, one quantization of an input that
several layers share, no logits. Calls are counted.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bitnet.model
import bitnet.quant
from bitnet.model import ModelConfig, Transformer
from bitnet.quant import absmean_ternary
from bitnet.training.distributed import World
from bitnet.training.optim import OptimConfig, build_optimizer
from bitnet.training.step import StepResult, split, train_step
from tests.helpers.double import rotary64
from tests.helpers.fast_paths import counting

CPU = torch.device("cpu")
LAYERS, MICRO_BATCHES, STEPS, RANKS = 2, 2, 3, 2
FAST = {
    "weights quantized": 7 * LAYERS,
    "inputs quantized": 4 * LAYERS * MICRO_BATCHES,  # of q, k and v; o; gate and up; down
    "losses without logits": MICRO_BATCHES,
}
"""Calls in a step."""


def small() -> Transformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 24, "n_layers": LAYERS, "n_heads": 2, "d_ff": 40}
    return Transformer(ModelConfig(vocab_size=50, max_seq_len=16, **shape))


def train(model: nn.Module, world: World) -> list[StepResult]:
    """STEPS steps on 8 sequences each, whatever the number of processes."""
    config = OptimConfig(lr=4e-3)
    optimizers, results = build_optimizer(model, config), []
    for step in range(STEPS):
        batch = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
        tokens, targets = world.share(batch[:, :-1]), world.share(batch[:, 1:])
        micro_batches = split(tokens, targets, len(tokens) // MICRO_BATCHES)
        here = nullcontext(), world
        results.append(train_step(model, optimizers, micro_batches, step, STEPS, config, *here))
    return results


class Wrapper(nn.Module):
    """Owns a model and calls it, as wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper])
def test_a_step_takes_the_fast_paths(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(small())
    with counting() as calls:
        train(model, World(CPU))
    assert calls == {what: n * STEPS for what, n in FAST.items()}


def test_what_is_no_fast_path_is_counted_too() -> None:
    model = small()
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with counting() as calls:
        train(model, World(CPU))
    hook.remove()
    inputs = (FAST["inputs quantized"] + 2 * MICRO_BATCHES) * STEPS
    assert calls["losses without logits"] == 0
    assert calls["losses of logits"] == MICRO_BATCHES * STEPS
    assert calls["inputs quantized"] == inputs


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_step_takes_the_fast_paths() -> None:
    """Only weights are quantized outside of the graph, whose operations are counted."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(small(), fullgraph=True, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        calls: list[Tensor] = []

        def absmean(weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
            calls.append(weight)
            return absmean_ternary(weight, *options)

        patch.setattr(bitnet.quant, "absmean_ternary", absmean)
        train(model, World(CPU))
    assert len(calls) == FAST["weights quantized"] * STEPS
    (graph,) = graphs
    operations = Counter(
        str(node.target)
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    )
    assert operations["bitnet.int8_linear.default"] == 7 * LAYERS
    assert operations["round_"] == 4 * LAYERS  # of the inputs: weights would have theirs
    assert operations["scatter_add_"] == 1  # of the loss without logits
    assert not any("cross_entropy" in name for name in operations)


def in_fp64() -> Transformer:
    """Weights in fp64, so that only sums of gradients in another order differ."""
    return small().double()


def work(rank: int, folder: Path) -> None:
    """A process of two: trains, and leaves what it counted and computed."""
    torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork: it would wait for them
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = in_fp64()
    with counting() as calls:
        results = train(DistributedDataParallel(model), World(CPU, rank, RANKS))
    told = {"calls": dict(calls), "results": [tuple(result) for result in results]}
    torch.save(told | {"weights": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each batch per process, wrapped in DistributedDataParallel.

    Sums in another order move a gradient of fp64 by some 1e-15 of values near 1. AdamW multiplies
    that by at most lr / eps = 4e5, where a gradient is 0: 4e-10 per step. Without the mean over
    processes a weight would move by lr = 4e-3.
    """
    monkeypatch.setattr(bitnet.model, "rotary", rotary64)
    fork = multiprocessing.get_context("fork")  # torch is imported already
    processes = [fork.Process(target=work, args=(rank, tmp_path)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * RANKS
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert first["results"] == second["results"]
    assert first["calls"] == second["calls"] == {what: n * STEPS for what, n in FAST.items()}
    model = in_fp64()
    for (name, ours), theirs in zip(
        first["weights"].items(), second["weights"].values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for result, expected in zip(first["results"], train(model, World(CPU)), strict=True):
        assert result == pytest.approx(tuple(expected), abs=1e-8, rel=0)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-8, rtol=0)
