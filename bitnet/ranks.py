"""Memory and traffic of each process in a training step, computed from a config alone.

The formulas follow the code: :func:`bitnet.training.distributed.place` (FSDP2 gathers each block
separately, and the rest as the root), :func:`bitnet.training.distributed.exchange` (gradients are
sent only after the last micro-batch), :mod:`bitnet.gathered` (how a ternary weight is gathered),
:mod:`bitnet.training.muon` and :mod:`bitnet.training.tensor_parallel`. Shapes and activations come
from the model itself, run on tensors without memory (torch's FakeTensorMode); tensor parallelism
runs in a group of processes that do not exist (torch's backend "fake").

Sent bytes are per process and for ring algorithms. For G bytes and S processes, an all-gather or a
reduce-scatter sends (S - 1) / S G, an all-reduce twice that (Patarasu and Yuan 2009, "Bandwidth
optimal all-reduce algorithms for clusters of workstations").

Left out: single numbers (scales of tensors, the loss, the norm of the gradient), evaluation,
checkpoints, temporary tensors of an operation or of the optimizer, and memory wasted by allocators.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
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
    """Number of all processes."""
    shard: int
    """Processes over which one copy of the model is divided; ddp: 1."""
    as_codes: bool
    """Ternary weights are gathered as 2-bit codes."""
    tensor: int = 1
    """Processes that divide the matrices of each layer (``distributed.tensor_parallel``)."""

    @property
    def shares(self) -> int:
        """Number of shares of a batch."""
        return self.size // self.tensor

    @property
    def in_fsdp(self) -> bool:
        """Whether FSDP2 averages the gradients. It does so under ddp too, for several groups of
        tensor parallelism (:func:`bitnet.training.distributed.place`)."""
        return self.strategy != "ddp" or (self.tensor > 1 and self.shares > 1)

    def __str__(self) -> str:
        if self.strategy == "ddp":
            return "ddp"
        over = f" over {self.shard}" if self.strategy == "hsdp" else ""
        return f"{self.strategy}{over}\n{'codes' if self.as_codes else 'weights'}"


class Memory(NamedTuple):
    """Peak bytes of each kind, for the process with the largest part of a model."""

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
    """Gradients inside a group that divides a model; ddp: among all processes."""
    between: float
    """hsdp: gradients between the copies."""
    muon: float
    """Updates to the process that orthogonalizes them, and back; the mean over the processes."""
    tensor: float = 0
    """Tensor parallelism: inside the layers, in forwards and backwards."""

    def seconds(self, layout: Layout, local: int, inside: float, network: float) -> float:
        """Time of all exchanges, one after the other, with none hidden behind computation. A ring
        is as fast as its slowest link.

        Arguments:
            local: processes per machine. inside, network: bytes per second from a process to one on
                the same machine, and to one on another machine.
        """
        group = layout.size if layout.strategy == "ddp" else layout.shard * layout.tensor
        speed = inside if group <= local else network
        copies = inside if layout.size <= local else network
        layers = inside if local % layout.tensor == 0 else network
        sent = self.gathered + self.gradients + self.muon
        return sent / speed + self.between / copies + self.tensor / layers


class Weight(NamedTuple):
    """A parameter of a model that is not built."""

    shape: tuple[int, ...]
    """Shape; with tensor parallelism, of a process's part of a matrix."""
    ternary: bool
    """Whether it is the weight of a BitLinear."""
    muon: bool
    """Whether Muon updates it."""

    def part(self, shard: int) -> int:
        """Elements of the largest part: FSDP2 gives each process ceil(rows / shard) rows."""
        return -(-self.shape[0] // shard) * math.prod(self.shape[1:])

    def gathered(self, model: ModelConfig, layout: Layout) -> int:
        """Bytes that all processes together contribute to a gather; rows are padded to equal parts.
        Codes: 16 bytes per 64 columns, and the fp32 scales of rows or groups
        (:meth:`bitnet.gathered.TernaryShard.fsdp_pre_all_gather`). Otherwise fp32."""
        padded = self.part(layout.shard) * layout.shard
        if not (self.ternary and layout.as_codes):
            return _FP32 * padded
        rows, columns = padded // self.shape[1], self.shape[1]
        scales = {"tensor": 0, "row": 1, "group": -(-columns // model.group_size)}
        return rows * (packed_columns(columns) + _FP32 * scales[model.granularity])


def layouts(config: Config, size: int, local: int) -> list[Layout]:
    """The layouts available to ``size`` processes, ``local`` of them per machine. hsdp is listed if
    it has several copies; codes are listed if BitLinears give them."""
    model, tensor = config.model, config.distributed.tensor_parallel
    shares, shard = config.shares(size), config.distributed.shard_size or max(1, local // tensor)
    coded = model.linear == "ternary" and model.grad_mask == "none"
    whole = Layout("ddp", size, 1, as_codes=False, tensor=tensor)
    chosen = coded and config.distributed.gather == "codes"
    found = [whole._replace(as_codes=whole.in_fsdp and chosen)]
    for as_codes in (True, False) if coded else (False,):
        found.append(Layout("fsdp", size, shares, as_codes, tensor))
        if shard < shares and shares % shard == 0:
            found.append(Layout("hsdp", size, shard, as_codes, tensor))
    return found


def weights(config: Config) -> tuple[list[Weight], list[Weight]]:
    """The parameters of one block and the parameters outside the blocks, of a resolved config. If
    tensor parallelism divides a matrix, a process's part of it."""
    tensor = config.distributed.tensor_parallel
    with FakeTensorMode():
        model = Transformer(dataclasses.replace(config.model, n_layers=1))
    ternary = {id(m.weight) for m in model.modules() if isinstance(m, BitLinear)}
    muon = {id(p) for p in param_groups(model, config.optim)["muon"]}
    block, root = list[Weight](), list[Weight]()
    for name, p in model.named_parameters():
        part, shape = block if name.startswith("layers.") else root, list(p.shape)
        matrix = name.removeprefix("layers.0.").removesuffix(".weight")
        if tensor > 1 and matrix in config.model.matrices():
            from bitnet.training.tensor_parallel import is_row_parallel  # imports DTensor, 1 s

            shape[1 if is_row_parallel(matrix) else 0] //= tensor
        part.append(Weight(tuple(shape), id(p) in ternary, id(p) in muon))
    return block, root


def memory(config: Config, layout: Layout, sequences: int, bf16: bool, kept: int) -> Memory:
    """Bytes per process.

    Parameters, gradients and optimizer state are fp32. Per parameter: 4 bytes for itself, 4 for its
    gradient, 8 for AdamW's state or 4 for Muon's.

    Gradients: ddp holds every gradient in a bucket (``gradient_as_bucket_view``). If a step has
    several micro-batches, it also holds the gradients accumulated before the last one. fsdp holds
    its part of all gradients; for the group in the backward also the whole gradients and a copy to
    scatter; and, from the head on, the root's whole gradients. If a step has several micro-batches,
    whole gradients of all groups add up until the last (``set_requires_gradient_sync``).

    Buffers: under ddp, int8 codes of all ternary weights
    (:func:`bitnet.bitlinear.weights_quantized`). Under fsdp, the process's own packed codes, the
    root's fp32 weights, the whole weights of a block (int8 codes, twice with ``int8_backward``;
    fp32 if no codes can be gathered), and the data being gathered for the next block. A
    ``grad_mask`` keeps the codes of all blocks for the backward, and so does tensor parallelism
    that gathers latent weights. Autocast likewise keeps bf16 copies of the matrices of the
    full-precision baseline.

    Activations: the kept ones, and the gradient of the head's weight, which is computed with the
    loss (:func:`bitnet.loss.linear_cross_entropy`).

    Arguments:
        sequences: per micro-batch of a process. bf16: with autocast.
        kept: bytes per sequence, from :func:`activations`.
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
    several = config.batch_sequences // layout.shares > sequences
    if not layout.in_fsdp:
        gradients, buffers = _FP32 * parts * (1 + several), copies
    else:
        whole = max(2 * of_root, of_root + 2 * of_block)
        if several:
            whole = max(2 * of_root, of_root + (n + 1) * of_block - parts)
        gradients = _FP32 * (parts + whole)
        gathered = sum(p.gathered(model, layout) for p in block)
        buffers = _FP32 * of_root + gathered
        made_of_latent = model.grad_mask != "none" or (layout.tensor > 1 and not layout.as_codes)
        if model.linear == "ternary" and not made_of_latent:
            buffers += copies // n + _FP32 * (of_block - codes)
            buffers += n * gathered // shard if layout.as_codes else 0
        else:
            buffers += _FP32 * of_block + copies
    activations = kept * sequences + _FP32 * model.vocab_size * model.d_model
    return Memory(_FP32 * parts, gradients, state, activations, buffers)


def activations(config: Config, bf16: bool) -> int:
    """Bytes per sequence that autograd keeps from the forward to the backward, eager, on a CPU.
    Measured on tensors without memory, as the difference between two sequences and one. With
    ``activation_checkpointing`` = k every k-th block keeps its fp32 input. The block that the
    backward recomputes keeps everything."""
    one, two = (_kept(config, depth, 2, bf16) - _kept(config, depth, 1, bf16) for depth in (1, 2))
    n, every, block = config.model.n_layers, config.distributed.activation_checkpointing, two - one
    if not every:
        return one + (n - 1) * block
    again = -(-n // every)
    inputs = again * _FP32 * config.model.d_model * config.data.seq_len
    return one + (n - again) * block + inputs


def _kept(config: Config, n_layers: int, sequences: int, bf16: bool) -> int:
    """Bytes that autograd keeps for a forward with its loss, without the parameters."""
    storages = dict[int, torch.UntypedStorage]()

    def keep(tensor: Tensor) -> Tensor:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor
        storages[storage._cdata] = storage
        return tensor

    with _divided(config.distributed.tensor_parallel) as divide, FakeTensorMode():
        model = Transformer(dataclasses.replace(config.model, n_layers=n_layers))
        model.document_separator = 0 if config.data.document_mask else None
        divide(model)
        tokens = torch.zeros(sequences, config.data.seq_len, dtype=torch.int64, device="cpu")
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(tokens, tokens)
        return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def _divided(size: int) -> Iterator[Callable[[Transformer], object]]:
    """Yield a function that divides a model over ``size`` processes as seen by the first one; the
    others do not exist. For one process the function does nothing."""
    if size == 1:
        yield lambda model: None
        return
    from torch.distributed.device_mesh import init_device_mesh

    from bitnet.training.tensor_parallel import tensor_parallel

    about_gloo = logging.getLogger("torch.distributed.tensor._collective_utils")
    about_gloo.addFilter(_no_record)  # a warning of no all-to-all: nothing is sent here
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield partial(tensor_parallel, mesh=init_device_mesh("cpu", (size,)))
    finally:
        dist.destroy_process_group()
        about_gloo.removeFilter(_no_record)


def _no_record(_: logging.LogRecord) -> bool:
    return False


def traffic(config: Config, layout: Layout, sequences: int, bf16: bool = False) -> Traffic:
    """Bytes that a process sends in a step.

    fsdp gathers a block twice per micro-batch, for the forward and for the backward, and the root
    once (:func:`bitnet.training.distributed.place`). It reduce-scatters fp32 gradients once per
    step; hsdp then all-reduces their parts between the copies. ddp all-reduces all gradients. Muon
    sends the rows of each matrix to one process and back, in bf16
    (:func:`bitnet.training.muon.ShardedMuon.step`).

    Arguments:
        sequences: per micro-batch of a process. bf16: with autocast.
    """
    block, root = weights(config)
    n, shard = config.model.n_layers, layout.shard
    everything, copies = block * n + root, layout.shares // shard
    reduced = _FP32 * sum(p.part(shard) for p in everything)
    micro_batches = config.batch_sequences // layout.shares // sequences
    in_layers = micro_batches * _in_layers(config, layout.tensor, sequences, bf16)
    if layout.strategy == "ddp":
        average = 2 * (layout.shares - 1) / layout.shares * reduced
        return Traffic(0, average, 0, 0, in_layers)
    of_block, of_root = (sum(p.gathered(config.model, layout) for p in g) for g in (block, root))
    others = (shard - 1) / shard
    muon = sum(p.part(1) for p in everything if p.muon) / shard
    return Traffic(
        gathered=others * micro_batches * (2 * n * of_block + of_root),
        gradients=others * shard * reduced,
        between=2 * (copies - 1) / copies * reduced,
        muon=2 * others * _BF16 * muon,
        tensor=in_layers,
    )


def _in_layers(config: Config, ranks: int, sequences: int, bf16: bool) -> float:
    """Bytes that one of ``ranks`` processes sends in the layers per micro-batch. For each token:

    - all-reduce in the forward: the outputs of o_proj and down_proj (int32 sums with a maximum; for
      the full-precision baseline in its dtype). All-reduce in the backward: the fp32 gradient of a
      divided input, once for attention and once for the MLP, or once per matrix if no two share an
      input;
    - twice in the forward and twice in its backward, an exchange of a process's channels for the
      norms that need all (:class:`bitnet.training.tensor_parallel.ChannelRMSNorm`).

    The gradients of those norms and of the heads' norms are all-reduced too.
    """
    model, every = config.model, config.distributed.activation_checkpointing
    n, width, dtype = model.n_layers, model.d_model, _BF16 if bf16 else _FP32
    ternary, in_linear = model.linear == "ternary", model.norm_placement == "in_linear"
    forwards = 1 + (-(-n // every) / n if every else 0)
    outputs = 2 * (_FP32 * width + _FP32) if ternary else 2 * dtype * width
    inputs = (2 if ternary and not in_linear else 5) * _FP32 * width
    channels = 0 if model.norm_placement == "pre_norm" else width + model.d_ff
    norms = _FP32 * (channels + (2 * model.head_dim if model.qk_norm else 0))
    tokens, others = sequences * config.data.seq_len, (ranks - 1) / ranks
    reduced = tokens * (forwards * outputs + inputs) + norms
    exchanged = tokens * 2 * (forwards + 1) * dtype * channels / ranks
    return n * others * (2 * reduced + exchanged)


def rank_table(config: Config, size: int, local: int, bandwidth: float, network: float) -> Table:
    """The table of ``bitnet inspect CONFIG --world-size``, of a resolved config.

    Arguments:
        local: processes per machine; 0: all.
        bandwidth: GB/s inside a machine; 0: no times. network: GB/s between machines; 0: as
            ``bandwidth``.
    Raises:
        UserError: this kind of config or process group is not counted here.
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
    sent = [traffic(config, layout, sequences, bf16) for layout in choices]
    shares, tensor = config.shares(size), config.distributed.tensor_parallel
    groups = f" in groups of {tensor}" if tensor > 1 else ""
    table = Table(
        "per process",
        *map(str, choices),
        title=f"{size} processes{groups}, {config.batch_sequences // shares // sequences} "
        f"micro-batches of {sequences} x {config.data.seq_len} tokens each, "
        f"{'bf16 autocast' if bf16 else 'fp32'}",
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
