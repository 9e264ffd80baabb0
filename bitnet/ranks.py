"""What each of several processes holds and sends in a step of training, from a config alone.

The formulas follow what the code does: :func:`bitnet.training.distributed.place` (FSDP2 gathers
each block by itself, and all else as the root), :func:`bitnet.training.distributed.exchange`
(gradients leave after the last micro-batch only), :mod:`bitnet.gathered` (what is gathered of a
ternary weight) and :mod:`bitnet.training.muon`. Shapes and activations come from the model itself,
run on tensors without memory (torch's FakeTensorMode).

Bytes sent are those of ring algorithms, per process: of G bytes and S processes, an all-gather or a
reduce-scatter sends (S - 1) / S G, an all-reduce twice that (Patarasu and Yuan 2009, "Bandwidth
optimal all-reduce algorithms for clusters of workstations").

Left out: single numbers (scales of tensors, the loss, the norm of the gradient), evaluation,
checkpoints, temporary tensors of an operation or of the optimizer, and what allocators waste.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitnet.bitlinear import BitLinear
from bitnet.config import Config, whole_only
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from bitnet.summary import human
from bitnet.training.distributed import Strategy
from bitnet.training.optim import param_groups
from bitnet_kernels.packing import packed_columns

_FP32, _BF16 = 4, 2


class Layout(NamedTuple):
    """How processes divide a model."""

    strategy: Strategy
    size: int
    """All processes."""
    shard: int
    """Processes over which one copy of the model is divided; ddp: 1."""
    as_codes: bool
    """Ternary weights are gathered as 2-bit codes."""

    def __str__(self) -> str:
        if self.strategy == "ddp":
            return "ddp"
        over = f" over {self.shard}" if self.strategy == "hsdp" else ""
        return f"{self.strategy}{over}\n{'codes' if self.as_codes else 'weights'}"


class Memory(NamedTuple):
    """Bytes per process at the peak of each kind; the process with the largest part of a model."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """Codes, and weights gathered from other processes."""


class Traffic(NamedTuple):
    """Bytes that a process sends in a step."""

    gathered: float
    """Weights, in the forwards and the backwards."""
    gradients: float
    """Inside a group that divides a model; ddp: everywhere."""
    between: float
    """hsdp: gradients between the copies."""
    muon: float
    """Updates to the process that orthogonalizes them and back: the mean over the processes."""

    def seconds(self, layout: Layout, local: int, inside: float, network: float) -> float:
        """Time of the exchanges, one after the other and none hidden behind computing. A ring is as
        fast as its slowest link.

        Arguments:
            local: processes of a machine. inside, network: bytes per second that a process sends to
                another one of its machine, and of another machine.
        """
        group = layout.size if layout.strategy == "ddp" else layout.shard
        speed = inside if group <= local else network
        copies = inside if layout.size <= local else network
        return (self.gathered + self.gradients + self.muon) / speed + self.between / copies


class Weight(NamedTuple):
    """A parameter of a model that is not built."""

    shape: tuple[int, ...]
    ternary: bool
    """The weight of a BitLinear."""
    muon: bool
    """Muon updates it."""

    def part(self, shard: int) -> int:
        """Elements of the largest part: FSDP2 divides rows, ceil(rows / shard) for each process."""
        return -(-self.shape[0] // shard) * math.prod(self.shape[1:])

    def gathered(self, model: ModelConfig, layout: Layout) -> int:
        """Bytes that all processes together give to a gather, rows padded to equal parts. Codes:
        16 bytes per 64 columns, and the fp32 scales of rows or groups
        (:meth:`bitnet.gathered.TernaryShard.fsdp_pre_all_gather`); else fp32."""
        padded = self.part(layout.shard) * layout.shard
        if not (self.ternary and layout.as_codes):
            return _FP32 * padded
        rows, columns = padded // self.shape[1], self.shape[1]
        scales = {"tensor": 0, "row": 1, "group": -(-columns // model.group_size)}
        return rows * (packed_columns(columns) + _FP32 * scales[model.granularity])


def layouts(config: Config, size: int, local: int) -> list[Layout]:
    """What ``size`` processes, ``local`` of them per machine, can choose from. hsdp is there where
    it has copies; codes where BitLinears give them."""
    model, shard = config.model, config.distributed.shard_size or local
    coded = model.linear == "ternary" and model.grad_mask == "none"
    found = [Layout("ddp", size, 1, as_codes=False)]
    for as_codes in (True, False) if coded else (False,):
        found.append(Layout("fsdp", size, size, as_codes))
        if shard < size and size % shard == 0:
            found.append(Layout("hsdp", size, shard, as_codes))
    return found


def weights(config: Config) -> tuple[list[Weight], list[Weight]]:
    """The parameters of a block and those outside of the blocks, of a resolved config."""
    with FakeTensorMode():
        model = Transformer(dataclasses.replace(config.model, n_layers=1))
    ternary = {id(m.weight) for m in model.modules() if isinstance(m, BitLinear)}
    muon = {id(p) for p in param_groups(model, config.optim)["muon"]}
    block, root = list[Weight](), list[Weight]()
    for name, p in model.named_parameters():
        part = block if name.startswith("layers.") else root
        part.append(Weight(tuple(p.shape), id(p) in ternary, id(p) in muon))
    return block, root


def memory(config: Config, layout: Layout, sequences: int, bf16: bool, kept: int) -> Memory:
    """Bytes per process.

    Parameters, gradients and optimizer state are fp32: 4 bytes each, AdamW's state 8, Muon's 4.

    Gradients: a bucket for each of ddp (``gradient_as_bucket_view``). fsdp has its part of all; of
    the group in the backward also the whole and a copy of it that is scattered; and from the head
    on the root's whole. Where a step has several micro-batches, whole gradients of all groups add
    up until the last (``set_requires_gradient_sync``).

    Buffers: int8 codes of all ternary weights under ddp
    (:func:`bitnet.bitlinear.weights_quantized`). Under fsdp the process's own packed codes, the
    root's fp32 weights, the whole weights of a block (int8 codes, twice with ``int8_backward``;
    fp32 where no codes can be gathered), and what is gathered for the next block meanwhile. A
    ``grad_mask`` keeps the codes of all blocks for the backward, as autocast keeps bf16 copies of
    the matrices of the full-precision baseline.

    Activations: those kept, and the gradient of the head's weight, which comes with the loss
    (:func:`bitnet.loss.linear_cross_entropy`).

    Arguments:
        sequences: per micro-batch of a process. bf16: with autocast.
        kept: bytes per sequence, of :func:`activations`.
    """
    model, n, shard = config.model, config.model.n_layers, layout.shard
    block, root = weights(config)
    everything = block * n + root
    elements = {p: p.part(1) for p in (*block, *root)}
    of_block, of_root = (sum(elements[p] for p in part) for part in (block, root))
    parts = sum(p.part(shard) for p in everything)
    state = sum((4 if p.muon else 8) * p.part(shard) for p in everything)
    codes = sum(elements[p] for p in block if p.ternary)
    matrices = sum(elements[p] for p in block if len(p.shape) == 2)
    copies = n * codes * (2 if model.int8_backward != "none" else 1)
    if model.linear == "fp":
        copies = _BF16 * n * matrices if bf16 else 0
    if layout.strategy == "ddp":
        gradients, buffers = _FP32 * parts, copies
    else:
        whole = max(2 * of_root, of_root + 2 * of_block)
        if config.batch_sequences // layout.size > sequences:
            whole = max(2 * of_root, of_root + (n + 1) * of_block - parts)
        gradients = _FP32 * (parts + whole)
        gathered = sum(p.gathered(model, layout) for p in block)
        buffers = _FP32 * of_root + gathered
        if model.linear == "ternary" and model.grad_mask == "none":
            buffers += copies // n + _FP32 * (of_block - codes)
            buffers += n * gathered // shard if layout.as_codes else 0
        else:
            buffers += _FP32 * of_block + copies
    activations = kept * sequences + _FP32 * model.vocab_size * model.d_model
    return Memory(_FP32 * parts, gradients, state, activations, buffers)


def activations(config: Config, bf16: bool) -> int:
    """Bytes per sequence that autograd keeps from the forward to the backward, eager, on a CPU;
    measured on tensors without memory, as the difference between two sequences and one. With
    ``activation_checkpointing`` = k every k-th block keeps its fp32 input, and the one that the
    backward computes again has everything it keeps."""
    one, two = (_kept(config, depth, 2, bf16) - _kept(config, depth, 1, bf16) for depth in (1, 2))
    n, every, block = config.model.n_layers, config.distributed.activation_checkpointing, two - one
    if not every:
        return one + (n - 1) * block
    again = -(-n // every)
    inputs = again * _FP32 * config.model.d_model * config.data.seq_len
    return one + (n - again) * block + inputs


def _kept(config: Config, n_layers: int, sequences: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward with its loss, without the parameters."""
    storages = dict[int, torch.UntypedStorage]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = Transformer(dataclasses.replace(config.model, n_layers=n_layers))
        model.document_separator = 0 if config.data.document_mask else None
        tokens = torch.zeros(sequences, config.data.seq_len, dtype=torch.int64, device="cpu")
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(tokens, tokens)
        return sum(storage.nbytes() for storage in storages.values())


def traffic(config: Config, layout: Layout, sequences: int) -> Traffic:
    """Bytes that a process sends in a step.

    fsdp gathers a block twice per micro-batch, for the forward and for the backward, and the root
    once (:func:`bitnet.training.distributed.place`); fp32 gradients are reduce-scattered once per
    step, hsdp's parts of them all-reduced between the copies; ddp all-reduces all. Muon sends the
    rows of each matrix to one process and back, in bf16
    (:func:`bitnet.training.muon.ShardedMuon.step`).

    Arguments:
        sequences: per micro-batch of a process.
    """
    block, root = weights(config)
    n, shard = config.model.n_layers, layout.shard
    everything, copies = block * n + root, layout.size // shard
    reduced = _FP32 * sum(p.part(shard) for p in everything)
    if layout.strategy == "ddp":
        return Traffic(0, 2 * (layout.size - 1) / layout.size * reduced, 0, 0)
    micro_batches = config.batch_sequences // layout.size // sequences
    of_block, of_root = (sum(p.gathered(config.model, layout) for p in g) for g in (block, root))
    others = (shard - 1) / shard
    muon = sum(p.part(1) for p in everything if p.muon) / shard
    return Traffic(
        gathered=others * micro_batches * (2 * n * of_block + of_root),
        gradients=others * shard * reduced,
        between=2 * (copies - 1) / copies * reduced,
        muon=2 * others * _BF16 * muon,
    )


def rank_table(config: Config, size: int, local: int, bandwidth: float, network: float) -> Table:
    """The table of ``bitnet inspect CONFIG --world-size``, of a resolved config.

    Arguments:
        local: processes per machine; 0: all.
        bandwidth, network: GB/s inside a machine and between machines; 0: no times, and
            ``network`` as ``bandwidth``.
    Raises:
        UserError: the config or the processes are of a kind that is not counted here.
    """
    if section := whole_only(config):
        raise UserError(f"--world-size: does not count what [{section}] adds to a step")
    local = local or size
    if size % local:
        raise UserError(f"--local-size = {local} does not divide --world-size = {size}")
    if math.isnan(bandwidth + network):
        raise UserError("--bandwidth and --network: expected numbers")
    if network and not bandwidth:
        raise UserError("--network needs --bandwidth")
    inside, between = 1e9 * bandwidth, 1e9 * (network or bandwidth)
    cuda = config.train.device != "cpu" and torch.cuda.is_available()
    bf16 = config.train.dtype == "bf16" or (config.train.dtype == "auto" and cuda)
    sequences = config.micro_batch(size)
    choices = layouts(config, size, local)
    kept = activations(config, bf16)
    held = [memory(config, layout, sequences, bf16, kept) for layout in choices]
    sent = [traffic(config, layout, sequences) for layout in choices]
    table = Table(
        "per process",
        *map(str, choices),
        title=f"{size} processes, {config.batch_sequences // size // sequences} micro-batches of "
        f"{sequences} x {config.data.seq_len} tokens each, {'bf16 autocast' if bf16 else 'fp32'}",
        caption="memory: each kind at its peak; sent: in a step, by rings; seconds: if no exchange "
        "is hidden behind computing. codes: distributed.gather. See docs/distributed.md.",
    )
    for kind, rows in (("memory", held), ("sent", sent)):
        for name in rows[0]._fields:
            table.add_row(f"{kind}: {name}", *(human(getattr(row, name), "B") for row in rows))
        table.add_row(f"{kind}: all", *(human(sum(row), "B") for row in rows))
        table.add_section()
    if inside:
        times = (
            row.seconds(a, local, inside, between) for a, row in zip(choices, sent, strict=True)
        )
        table.add_row("seconds", *(f"{time:.3g}" for time in times))
    return table
