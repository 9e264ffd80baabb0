"""``bitnet bench decode --profile``: where the time of a decoding step goes.

torch's profiler records the operations of a few steps (on a CPU) or the kernels (on a GPU, where
our step is a CUDA graph). Each has its *own* time, without the operations that it calls. If the
shapes show how many bytes an operation reads and writes, the table shows its roofline: the least
time that the memory allows. Time outside all operations is Python, dispatch and launches.

Bytes count an operation's tensor arguments, including an output argument (``out=``). Views move
nothing. Bytes are not given for operations that only index into a tensor, nor for those whose bytes
the trace does not show (lists of tensors, kernels in a graph). On a CPU a model that fits into the
cache may be read faster than memory allows, and on a busy machine memory looks slower than it is:
shares above 100% are marked with ~.

The profiler itself takes time, especially if operations are short. So the step is also timed
without it; use that time for comparisons. A line warns if the two times differ much.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity

from bitnet.bench.decode_table import Subject
from bitnet.bench.decode_worker import (
    STATIC,
    Case,
    Job,
    as_transformers,
    prompts_of,
    transformers_memory,
)
from bitnet.bench.rows import percent, read, text, write
from bitnet.engine.decoder import Decoder
from bitnet.model import ModelConfig
from bitnet.schema import UserError
from bitnet.summary import human
from bitnet_kernels.bench.machine import Machine

WARMUP, TIMED, PROFILED = 3, 20, 8
"""Steps."""
DISTORTED = 1.5
"""The profile misleads if a profiled step takes more than this many times as long as a real one."""
REST = "(between operations)"
_VIEWS = {
    *("view", "as_strided", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze"),
    *("expand", "narrow", "reshape", "detach", "alias", "unbind", "split", "chunk", "unflatten"),
    *("empty", "empty_like", "empty_strided", "resolve_conj", "resolve_neg", "_unsafe_view"),
    *("lift_fresh", "view_as", "expand_as", "numpy_T", "item", "_local_scalar_dense", "set_"),
}
_INDEXING = {"embedding", "index", "index_select", "gather", "index_put_", "_index_put_impl_"}
"""Operations that touch only a part of their arguments."""
_PRODUCTS = {"mm": (0, 1), "_int_mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Matrix products, and the positions of their factors among the arguments."""
_BYTES = {"double": 8, "long": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2}
_BYTES |= {"c10::Half": 2, "signed char": 1, "unsigned char": 1, "bool": 1}


@dataclass(frozen=True)
class Operation:
    """An operation or kernel in one step. Times are in microseconds."""

    name: str
    count: float
    """Calls per step."""
    us: float
    share: float
    """Share of the profiled step."""
    bytes: float | None
    """Bytes read and written; None if not known."""
    flops: float | None
    """FLOPs of matrix products; a multiply-add counts as two."""
    roofline_us: float | None
    """``bytes`` at the memory's speed."""
    roofline_share: float | None
    """``roofline_us`` divided by ``us``."""


def own_work(event: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bytes and FLOPs of an event, from its arguments; None if these do not show them."""
    name = str(event["name"]).removeprefix("aten::")
    arguments = event.get("args", {})
    shapes = arguments.get("Input Dims", [])
    types = arguments.get("Input type", [])
    if name in _INDEXING or not str(event["name"]).startswith("aten::") or not shapes:
        return None, None
    if any(shape and isinstance(shape[0], list) for shape in shapes):  # tensors without dtypes
        return None, None
    total = 0
    for shape, kind in zip(shapes, types, strict=True):
        if shape:  # else a number, or a list of tensors
            total += math.prod(shape) * _BYTES.get(kind, 0)
    flops = None
    if name in _PRODUCTS:
        a, b = (shapes[i] for i in _PRODUCTS[name])
        flops = 2 * math.prod(a) * b[-1]
    return total or None, flops


def operations(
    events: Iterable[Mapping[str, Any]], steps: int, span_us: float, bandwidth: float, cuda: bool
) -> list[Operation]:
    """The operations of a trace, the longest first.

    Arguments:
        events: ``traceEvents`` of torch's Chrome trace (ts and dur in microseconds).
        steps, span_us: how many steps the trace covers, and how long all of them took.
        bandwidth: bytes per second. cuda: count kernels instead of operations.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    mine = [event for event in events if event.get("ph") == "X" and event.get("cat") in kinds]
    totals: dict[str, list[float | None]] = {}  # calls, us, bytes, flops
    for event, own_us, work in _unnested(mine):
        total = totals.setdefault(str(event["name"]), [0.0, 0.0, None, None])
        for i, value in enumerate((1.0, own_us, *work)):
            if value is not None:
                total[i] = (total[i] or 0.0) + value
    found = []
    for name, (calls, us, moved, flops) in totals.items():
        assert calls is not None
        assert us is not None
        least = moved and moved / bandwidth * 1e6
        found.append(
            Operation(
                name,
                calls / steps,
                us / steps,
                us / span_us,
                moved and moved / steps,
                flops and flops / steps,
                least and least / steps,
                least and us and least / us,
            )
        )
    rest = span_us - sum(one.us for one in found) * steps
    found.append(Operation(REST, 0, rest / steps, rest / span_us, None, None, None, None))
    return sorted(found, key=lambda one: -one.us)


_Work = tuple[int | None, int | None]


def _unnested(
    events: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], float, _Work]]:
    """Each event with its own time, bytes and FLOPs. If other operations carry
    one out, they have its bytes and FLOPs, except that a product keeps its own."""

    class Open(NamedTuple):
        event: Mapping[str, Any]
        end: float
        place: int

    inner_us = [0.0] * len(events)
    covered, carried = [False] * len(events), [False] * len(events)
    order = sorted(events, key=lambda e: (str(e.get("tid")), float(e["ts"]), -float(e["dur"])))
    stack: list[Open] = []
    for i, event in enumerate(order):
        start, duration = float(event["ts"]), float(event["dur"])
        while stack and (stack[-1].event.get("tid") != event.get("tid") or stack[-1].end <= start):
            stack.pop()
        if stack:
            inner_us[stack[-1].place] += duration
        covered[i] = any(_short(outer.event) in _PRODUCTS for outer in stack)
        if _short(event) not in _VIEWS and own_work(event)[0] and not covered[i]:
            for outer in stack:
                carried[outer.place] = True
        stack.append(Open(event, start + duration, i))
    result: list[tuple[Mapping[str, Any], float, _Work]] = []
    for i, event in enumerate(order):
        name = _short(event)
        idle = name in _VIEWS or covered[i] or (carried[i] and name not in _PRODUCTS)
        work: _Work = (None, None) if idle else own_work(event)
        result.append((event, float(event["dur"]) - inner_us[i], work))
    return result


def _short(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removeprefix("aten::")


@dataclass(frozen=True)
class Profile:
    """A step, by operation and as a whole."""

    operations: list[Operation]
    step_us: float
    """Median time without the profiler."""
    profiled_us: float
    """Mean time with the profiler."""
    step_bytes: int
    """Bytes that a step must read: matrices, head, and the cached keys and values."""
    bandwidth: float
    bandwidth_source: str

    def table(self) -> Table:
        """The longest operations, until 99% of the step are shown."""
        table = Table(box=None)
        table.add_column("operation", overflow="ellipsis")  # shortened first where lines are short
        headers = ("calls", "us", "share", "bytes", "FLOPs", "roofline\nus", "% of\nroofline")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True)
        shown = 0.0
        for one in self.operations:
            if shown > 0.99:
                break
            shown += one.share
            table.add_row(
                one.name[:32],
                f"{one.count:g}" if one.count else "",
                f"{one.us:,.1f}",
                f"{one.share:.1%}",
                human(one.bytes, "B") if one.bytes else "",
                human(one.flops) if one.flops else "",
                f"{one.roofline_us:,.1f}" if one.roofline_us else "",
                percent(one.roofline_share) if one.roofline_share else "",
            )
        return table

    def summary(self) -> str:
        """The step compared with its roofline."""
        least = self.step_bytes / self.bandwidth * 1e6
        return (
            f"a step takes {self.step_us:,.0f} us ({self.profiled_us:,.0f} under the profiler); it "
            f"has to read {human(self.step_bytes, 'B')}, which at {human(self.bandwidth, 'B')}/s "
            f"({self.bandwidth_source}) takes {least:,.0f} us: {percent(least / self.step_us)}"
        )

    def warning(self) -> str:
        """A warning if the profiler took so much time that the table misleads; else ""."""
        times = self.profiled_us / self.step_us
        if times <= DISTORTED:
            return ""
        return (
            f"warning: under the profiler a step takes {times:.1f} times as long: short operations "
            "and what is between operations look longer than they are"
        )


def memory_bandwidth(here: Machine) -> tuple[float, str]:
    """Bytes per second and where the number comes from: a GPU's bus and clock, or *measured*, the
    fastest of five sums over 256 MiB."""
    if here.bandwidth is not None:
        return here.bandwidth, "its bus at its highest clock"
    x = torch.ones(2**26, device=here.device, dtype=torch.float32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float(x.sum())
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best, "measured, sum over 256 MiB"


def make_step(job: Job, case: Case) -> tuple[Callable[[], object], Mapping[str, int]]:
    """A contender after its prompt: a function that decodes one token per row, and the bytes of
    its ``weights``, ``head`` and ``embedding``.

    Raises:
        UserError: the contender's step is inside transformers' generate.
    """
    if job.contender.endswith(STATIC):
        raise UserError(
            f"--profile: the step of {job.contender} is made inside generate; the nearest that can "
            f"be profiled is {job.contender.removesuffix(STATIC)}"
        )
    max_len = case.prompt + WARMUP + TIMED + PROFILED
    model = job.model(max_len)
    vocab_size = model.config.vocab_size
    ids = torch.tensor(
        prompts_of(case, vocab_size, job.seed), device=torch.device(job.device), dtype=torch.int64
    )
    if job.family != "transformers":
        decoder = Decoder(model, case.batch, max_len, kernel=job.kernel)
        for chunk in ids.split(decoder.chunk, 1):
            decoder.prefill(chunk, [chunk.shape[1]] * case.batch)
        return lambda: decoder.step(case.batch), decoder.memory()
    theirs = as_transformers(model, job.dtype)
    last = theirs(ids, use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal last
        chosen = last.logits[:, -1].argmax(-1, keepdim=True)
        last = theirs(chosen, past_key_values=last.past_key_values, use_cache=True)

    return step, transformers_memory(theirs)


def step_bytes(memory: Mapping[str, int], config: ModelConfig, job: Job, case: Case) -> int:
    """Bytes that the first step after the prompt must read; a tied head is the embedding."""
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * job.dtype.itemsize
    head = memory["head"] or memory["embedding"]
    return memory["weights"] + head + case.batch * case.prompt * cached


@torch.inference_mode()
def measure(job: Job, case: Case, here: Machine) -> Profile:
    """Time and profile the contender's step in this process."""
    found = [memory_bandwidth(here)]
    step, memory = make_step(job, case)
    found.append(memory_bandwidth(here))
    cuda = here.device.type == "cuda"

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize(here.device)

    times = []
    for _ in range(WARMUP + TIMED):
        start = time.perf_counter()
        step()
        finish()
        times.append(time.perf_counter() - start)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its highest level: it logs nothing
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        start = time.perf_counter()
        for _ in range(PROFILED):
            step()
        finish()
        span_us = (time.perf_counter() - start) * 1e6
    with TemporaryDirectory(prefix="bench-decode-") as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    found.append(memory_bandwidth(here))
    bandwidth, source = max(found)  # another program may slow one down, but hardly all
    return Profile(
        operations(events, PROFILED, span_us, bandwidth, cuda),
        statistics.median(times[WARMUP:]) * 1e6,
        span_us / PROFILED,
        step_bytes(memory, ModelConfig(**job.config), job, case),
        bandwidth,
        source,
    )


COMMON = ("device", "threads", "torch", "triton", "transformers", "commit", "date", "command")
SUBJECT = ("device", "threads", "model", "contender", "batch", "prompt")
"""The subject of a profile; a file has one profile per subject."""
COLUMNS = (
    *("device", "threads", "model", "contender", "batch", "prompt", "step_us", "step_bytes"),
    *("bandwidth", "bandwidth_source"),
    *(field.name for field in fields(Operation)),
    *("torch", "triton", "transformers", "commit", "date", "command"),
)


def write_profile(
    path: Path,
    subject: Subject,
    case: Case,
    job: Job,
    profile: Profile,
    common: Mapping[str, Any],
) -> None:
    """Write a profile to a CSV file, one row per operation. It replaces an earlier profile of the
    same contender and case. Raises UserError if the file is something else."""
    head = {column: common[column] for column in COMMON} | {
        "model": subject.name,
        "contender": job.contender,
        "batch": case.batch,
        "prompt": case.prompt,
        "step_us": profile.step_us,
        "step_bytes": profile.step_bytes,
        "bandwidth": profile.bandwidth,
        "bandwidth_source": profile.bandwidth_source,
    }
    new = [
        {column: text(value) for column, value in (head | asdict(one)).items()}
        for one in profile.operations
    ]
    about = [new[0][column] for column in SUBJECT]
    old = [row for row in read(path, COLUMNS) if [row[key] for key in SUBJECT] != about]
    write(path, [*old, *new], COLUMNS)
