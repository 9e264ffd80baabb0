"""What ``bitnet inspect CONFIG --world-size`` calculates, against two real processes on gloo."""

import dataclasses
import itertools
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.bitlinear import BitLinear, gather_codes
from bitnet.config import Config
from bitnet.model import ModelConfig, Transformer
from bitnet.ranks import Layout, Traffic, activations, layouts, memory, rank_table, traffic
from bitnet.schema import UserError
from bitnet.training.distributed import exchange, parallel, place
from bitnet.training.optim import build_optimizer
from bitnet.training.step import split, train_step
from tests.helpers.ranks import on_ranks, world_of

N_LAYERS, SEQ_LEN = 3, 16
SCALARS = 256
"""Bytes of the largest exchange that is left out: a number or two for each of 21 matrices."""
SHAPE: dict[str, Any] = {"d_model": 64, "n_layers": N_LAYERS, "n_heads": 4, "n_kv_heads": 2}


def tiny(optimizer: str = "adamw", every: int = 0, tensor: int = 1, **options: Any) -> Config:
    """Two micro-batches of two sequences for each of two processes, with odd numbers of rows."""
    model = ModelConfig(
        **SHAPE | {"d_ff": 81 * tensor, "vocab_size": 51, "max_seq_len": 16} | options
    )
    found = Config()
    parts: dict[str, Any] = {
        "train": {"batch_tokens": 8 * SEQ_LEN, "micro_batch": 2, "device": "cpu"},
        "data": {"seq_len": SEQ_LEN},
        "optim": {"lr": 1e-3, "muon_lr": 0.02, "optimizer": optimizer},
        "distributed": {"activation_checkpointing": every, "tensor_parallel": tensor},
    }
    sections = {k: dataclasses.replace(getattr(found, k), **v) for k, v in parts.items()}
    return dataclasses.replace(found, model=model, **sections)


def either(name: str, old: str) -> str:
    """The name that this version of torch calls."""
    return name if hasattr(dist, name) else old


def count(config: Config, layout: Layout) -> Counter[str]:
    """Bytes of this process in a real step: held, and given to exchanges."""
    world = world_of(layout.strategy, layout.tensor)
    torch.manual_seed(0)
    model = Transformer(config.model)
    place(model, model.layers, world, lambda block: gather_codes(block, layout.as_codes))
    optimizers, stepped = build_optimizer(model, config.optim), parallel(model, world)
    counts = Counter[str]()
    plain: dict[str, Any] = {}

    def watch(name: str, kind: str, given: int) -> None:
        plain[name] = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            n_bytes = [*args, *kwargs.values()][given].nbytes
            counts[kind] += n_bytes if n_bytes > SCALARS else 0
            if kind == "muon":  # bytes for itself do not leave the process
                counts[kind] -= args[3][kwargs["group"].rank()]
            return plain[name](*args, **kwargs)

        setattr(dist, name, counting)

    watch(either("all_gather_single", "all_gather_into_tensor"), "gathered", 0)
    watch(either("reduce_scatter_single", "reduce_scatter_tensor"), "gradients", 1)
    watch("all_to_all_single", "muon", 1)
    if isinstance(stepped, DistributedDataParallel):

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            counts["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        stepped.register_comm_hook(None, hook)
    batch = torch.randint(51, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    if layout.strategy == "hsdp":
        watch("all_reduce", "between", 0)
    parts = split(world.share(batch[:, :-1]), world.share(batch[:, 1:]), 2)
    train_step(stepped, optimizers, parts, 0, 9, config.optim, nullcontext(), world)
    for name, function in plain.items():
        setattr(dist, name, function)

    def local(tensor: Any) -> int:
        return int((tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes)

    counts["parameters"] = sum(map(local, model.parameters()))
    for optimizer in optimizers.optimizers:
        for state in optimizer.state.values():
            counts["optimizer"] += sum(local(t) for t in state.values() if t.dim())
    with exchange(stepped, last=False):
        stepped(*parts[0]).backward()
    for module in model.modules():  # FSDP2 keeps whole gradients until they are exchanged
        if state := getattr(module, "_get_fsdp_state", None):
            for param in state()._fsdp_param_group.fsdp_params:
                counts["whole gradients"] += param.unsharded_param.grad.nbytes
    return counts


CASES = [
    ("ddp", "muon", False, {}),
    ("fsdp", "muon", True, {}),
    ("fsdp", "adamw", False, {}),
    ("fsdp", "adamw", True, {"granularity": "row", "tie_embeddings": False}),
    ("fsdp", "adamw", True, {"granularity": "group", "group_size": 7, "qk_norm": True}),
]


@pytest.mark.parametrize(("strategy", "optimizer", "as_codes", "options"), CASES)
def test_a_real_step(
    strategy: Any, optimizer: str, as_codes: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny(optimizer, **options)
    layout = Layout(strategy, 2, 1 if strategy == "ddp" else 2, as_codes)
    counts = on_ranks(lambda: count(config, layout), 2, tmp_path)
    held, sent = memory(config, layout, 2, bf16=False, kept=0), traffic(config, layout, 2)
    most = {kind: max(c[kind] for c in counts) for kind in counts[0]}
    assert held.parameters == most["parameters"]
    assert held.optimizer == most["optimizer"]
    # of two processes, a ring sends half of what is gathered or scattered, and all of an all-reduce
    assert 2 * sent.gathered == most.get("gathered", 0)
    assert sent.gradients * (1 if strategy == "ddp" else 2) == most["gradients"]
    assert sent.between == 0
    assert sent.muon == pytest.approx(sum(c["muon"] for c in counts) / 2, rel=0.1)
    assert (sent.muon > 0) == (strategy == "fsdp" and optimizer == "muon")
    n_parameters = config.model.num_parameters()["total"]
    if strategy == "fsdp":
        assert most["whole gradients"] == 4 * n_parameters
        assert 4 * n_parameters < held.gradients < 6 * n_parameters
    else:
        assert held.gradients == 2 * 4 * n_parameters  # two micro-batches, and the buckets


def peaks(config: Config, layout: Layout) -> list[int]:
    """Bytes that torch's allocator gave out at the peak of each of two steps, by its own record,
    beyond what a process holds between steps."""
    world = world_of(layout.strategy)
    torch.manual_seed(0)
    model = Transformer(config.model)
    place(model, model.layers, world, lambda block: gather_codes(block, layout.as_codes))
    optimizers, stepped = build_optimizer(model, config.optim), parallel(model, world)
    batch = torch.randint(51, (8, config.data.seq_len + 1))
    parts = split(world.share(batch[:, :-1]), world.share(batch[:, 1:]), 2)
    found = []
    for step in range(3):  # the first makes what is kept
        optimizers.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(stepped, optimizers, parts, step, 9, config.optim, nullcontext(), world)
        events = profiler.profiler.kineto_results.events()
        changes = [e for e in events if e.name() == "[memory]"]
        changes.sort(key=lambda e: e.start_ns())
        found.append(max(itertools.accumulate(e.nbytes() for e in changes)))
    return found[1:]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "as_codes"),
    [
        ("fsdp", "adamw", True),
        pytest.param("fsdp", "muon", True, marks=pytest.mark.slow),
        pytest.param("fsdp", "adamw", False, marks=pytest.mark.slow),
        pytest.param("ddp", "adamw", False, marks=pytest.mark.slow),
    ],
)
def test_the_allocators_peak(strategy: Any, optimizer: str, as_codes: bool, tmp_path: Path) -> None:
    """Within a tenth of what is predicted. The smallest of several peaks counts: what a thread of
    gloo gives back is missing from the record now and then."""
    config = tiny(optimizer, d_model=192, n_layers=4, d_ff=512, vocab_size=1024, max_seq_len=128)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_tokens=8 * 128),
        data=dataclasses.replace(config.data, seq_len=128),
    )
    layout = Layout(strategy, 2, 1 if strategy == "ddp" else 2, as_codes)
    held = memory(config, layout, 2, bf16=False, kept=activations(config, bf16=False))
    kept = held.parameters + held.optimizer
    if strategy == "ddp":
        kept += held.gradients // 2  # its buckets
    peak = min(min(of_rank) for of_rank in on_ranks(lambda: peaks(config, layout), 2, tmp_path))
    assert kept + peak == pytest.approx(sum(held), rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm_placement": "in_linear"}, {"linear": "fp"}], ids=str
)
def test_activations_that_a_real_forward_keeps(options: dict[str, Any], bf16: bool) -> None:
    config = tiny(**options)
    model, kept = Transformer(config.model), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(51, (8, SEQ_LEN))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(tokens, tokens)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    matrices = config.model.num_parameters()["matrices"]
    ternary = any(isinstance(m, BitLinear) for m in model.modules())
    copies = matrices * (1 if ternary else 2 * bf16)  # codes, or autocast's copies
    layout = Layout("ddp", 2, 1, as_codes=False)
    expected = memory(config, layout, 8, bf16, activations(config, bf16))
    assert expected.activations == pytest.approx(sum(kept.values()) - copies, rel=0.03)
    assert expected.buffers == copies


def test_checkpointed_blocks_keep_their_input() -> None:
    plain, all_of, some = (activations(tiny(every=every), bf16=False) for every in (0, 1, 2))
    deeper = activations(tiny(every=1, n_layers=4), bf16=False)
    assert deeper - all_of == 4 * 64 * SEQ_LEN
    assert all_of < some < plain


class Exchanges(TorchDispatchMode):
    """Counts the bytes of this process that the layers' exchanges take, without the scales of all
    weights (84 bytes of maxima, and sums of integers)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {
            "all_reduce": "reduced",
            "allreduce_": "reduced",
            "all_gather_into_tensor": "gathered",
        }
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in kinds:
            given = args[0][0] if isinstance(args[0], list) else args[0]
            scales = given.dtype == torch.int64 or given.nbytes == 84
            self.counts[kinds[func._opname]] += 0 if scales else given.nbytes
        return func(*args, **(kwargs or {}))


def count_layers(config: Config, bf16: bool) -> tuple[Counter[str], int, Counter[str]]:
    """What the layers exchange in a step, what a forward keeps for the backward, and what a process
    holds."""
    layout = Layout("ddp", 2, 1, as_codes=False, tensor=2)
    with Exchanges() as seen:
        torch.manual_seed(0)
        world, model, kept = world_of("ddp", 2), Transformer(config.model), dict[int, int]()
        place(model, model.layers, world)
        optimizers = build_optimizer(model, config.optim)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)

        def keep(tensor: Tensor) -> Tensor:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = torch.randint(51, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
        seen.counts.clear()  # what divides the model
        parts = split(world.share(batch[:, :-1]), world.share(batch[:, 1:]), 2)
        train_step(model, optimizers, parts, 0, 9, config.optim, nullcontext(), world)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(*parts[0])
    for p in model.parameters():
        kept.pop(p.to_local().untyped_storage().data_ptr(), None)  # type: ignore[attr-defined]
    return seen.counts, sum(kept.values()), count(config, layout)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        pytest.param({"linear": "fp"}, marks=pytest.mark.slow),
        pytest.param({"norm_placement": "in_linear"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_real_step_of_tensor_parallelism(options: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tensor=2, **options)
    counts, kept, real = on_ranks(lambda: count_layers(config, bf16=False), 2, tmp_path)[0]
    layout = layouts(config, 2, 2)[0]
    assert layout == Layout("ddp", 2, 1, as_codes=False, tensor=2)
    held = memory(config, layout, 2, bf16=False, kept=activations(config, bf16=False))
    assert (held.parameters, held.optimizer) == (real["parameters"], real["optimizer"])
    whole = memory(
        tiny(**options | {"d_ff": 162}), Layout("ddp", 1, 1, as_codes=False), 2, False, 0
    )
    assert held.parameters < 0.6 * whole.parameters
    assert held.activations == pytest.approx(kept - held.buffers, rel=0.05)
    # of two processes, a ring sends all of an all-reduce, and half of what an all-to-all takes; for
    # which gloo gathers
    sent = traffic(config, layout, 2)
    assert sent.tensor == counts["reduced"] + counts["gathered"] / 2
    assert sent == Traffic(0, 0, 0, 0, sent.tensor)


@pytest.mark.slow  # four processes
def test_a_real_step_of_groups_that_fsdp_divides(tmp_path: Path) -> None:
    config, layout = tiny(tensor=2), Layout("fsdp", 4, 2, as_codes=True, tensor=2)
    assert layout in layouts(config, 4, 4)
    counts = on_ranks(lambda: count(config, layout), 4, tmp_path)
    most = {kind: max(c[kind] for c in counts) for kind in counts[0]}
    sent, held = traffic(config, layout, 2), memory(config, layout, 2, bf16=False, kept=0)
    assert held.parameters == most["parameters"]
    assert held.optimizer == most["optimizer"]
    assert 2 * sent.gathered == most["gathered"]
    assert 2 * sent.gradients == most["gradients"]


@pytest.mark.slow  # four processes
def test_a_real_step_of_copies(tmp_path: Path) -> None:
    config, layout = tiny("muon"), Layout("hsdp", 4, 2, as_codes=True)
    counts = on_ranks(lambda: count(config, layout), 4, tmp_path)
    sent, held = traffic(config, layout, 2), memory(config, layout, 2, bf16=False, kept=0)
    assert held.parameters == counts[0]["parameters"]
    assert 2 * sent.gathered == counts[0]["gathered"]
    assert 2 * sent.gradients == counts[0]["gradients"]
    assert sent.between == counts[0]["between"]  # 2 (R - 1) / R = 1
    assert sent.muon == pytest.approx(sum(c["muon"] for c in counts) / 4, rel=0.1)


def test_copies_of_a_divided_model() -> None:
    config = tiny()
    names = [str(layout) for layout in layouts(config, 4, 2)]
    assert names[1:3] == ["fsdp\ncodes", "hsdp over 2\ncodes"]
    hsdp = next(layout for layout in layouts(config, 4, 2) if layout.strategy == "hsdp")
    sent, held = traffic(config, hsdp, 2), memory(config, hsdp, 2, bf16=False, kept=0)
    assert sent.between == held.parameters  # 2 (R - 1) / R = 1 of a process's gradients
    assert len(layouts(config, 4, 4)) == 3, "one machine has no copies"
    assert len(layouts(tiny(grad_mask="clip"), 4, 4)) == 2, "without codes to gather"
    times = Traffic(30.0, 20.0, 8.0, 0.0)
    assert times.seconds(hsdp, 2, inside=10.0, network=2.0) == 5 + 4
    assert times.seconds(Layout("fsdp", 4, 4, True), 2, inside=10.0, network=2.0) == 25 + 4
    assert times.seconds(Layout("fsdp", 4, 4, True), 4, inside=10.0, network=2.0) == 5 + 0.8
    groups, layout = Traffic(30.0, 20.0, 0.0, 0.0, 6.0), Layout("fsdp", 8, 4, True, tensor=2)
    assert groups.seconds(layout, 4, inside=10.0, network=2.0) == 25 + 0.6
    assert groups.seconds(layout, 1, inside=10.0, network=2.0) == 25 + 3


def test_what_is_refused() -> None:
    config = tiny()
    assert rank_table(config, 4, 2, 10, 1).row_count == 6 + 6 + 1
    assert rank_table(config, 4, 2, 0, 0).row_count == 6 + 6
    for arguments, said in (
        ((4, 3, 0, 0), "--local-size"),
        ((4, 4, 0, 1), "--network needs"),
        ((4, 4, float("nan"), 1), "expected numbers"),
        ((3, 3, 0, 0), "cannot share equally"),
    ):
        with pytest.raises(UserError, match=said):
            rank_table(config, *arguments)
    adapted = dataclasses.replace(config.adapter, kind="lora")
    with pytest.raises(UserError, match=r"\[adapter\]"):
        rank_table(dataclasses.replace(config, adapter=adapted), 2, 2, 0, 0)
