"""A run: for each shape, M and state of the cache, check all contenders, then time them in turns.

Such a group is measured as a whole or not at all, since its ratios come from one round-robin. Its
rows are returned as soon as it is done. A group is skipped if its rows already exist, from the
same sources, versions and settings.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch

from bitnet_kernels.bench import machine
from bitnet_kernels.bench.contenders import (
    READ,
    Contender,
    Problem,
    contenders,
    make_problem,
    same_matrix,
)
from bitnet_kernels.bench.machine import Machine, Meter
from bitnet_kernels.bench.rows import Row
from bitnet_kernels.bench.timing import (
    Backend,
    CpuBackend,
    CudaBackend,
    Recorded,
    copies_needed,
    interleave,
    quantile,
    record,
)
from bitnet_kernels.bench.verify import Judge

CACHES = ("cold", "hot")
WHATS = ("linear", "matmul")


@dataclass(frozen=True)
class Selection:
    """What to measure."""

    shapes: tuple[tuple[int, int], ...]
    """(N, K)."""
    tokens: tuple[int, ...]
    kernels: tuple[str, ...]
    """Kernels, families and packages; torch's own matmul always takes part."""
    dtypes: tuple[str, ...]
    whats: tuple[str, ...] = WHATS
    caches: tuple[str, ...] = CACHES
    replays: int = 20
    energy: bool = True


class Group(NamedTuple):
    """The contenders of one round-robin."""

    n: int
    k: int
    m: int
    cache: str
    contenders: list[Contender]


def groups(choice: Selection, device: torch.device) -> list[Group]:
    """All groups of a choice, ordered by matrix, then by M."""
    return [
        Group(n, k, m, cache, contenders(device, choice.kernels, choice.dtypes, choice.whats, m))
        for n, k in choice.shapes
        for m in choice.tokens
        for cache in choice.caches
    ]


def common_columns(name: str) -> dict[str, Any]:
    """The columns that all rows of a run on the named device share."""
    return {
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
        "commit": machine.commit(),
        "code": machine.code_hash(name),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["bitnet", *sys.argv[1:]]),
    }


class Bench:
    """Measures groups on one machine."""

    def __init__(
        self,
        here: Machine,
        choice: Selection,
        backend: Backend | None = None,
        meter: Meter | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.here = here
        self.choice = choice
        self.backend = backend or (CudaBackend() if here.device.type == "cuda" else CpuBackend())
        self.meter = meter
        self.say = say
        self.common: dict[str, Any] = {
            "device": here.name,
            "driver": here.driver,
            "threads": here.threads,
        }
        self.common |= common_columns(here.name)
        self._matrix: Problem | None = None
        self._judge: Judge | None = None
        self._said: set[str] = set()

    def done(self, group: Group, rows: Sequence[Row]) -> bool:
        """Whether every contender of a group has a row of this version."""
        found = {(row.key, row.version) for row in rows}
        asked = [self._skipped(group, one, "not yet") for one in group.contenders]
        return all((row.key, row.version) in found for row in asked)

    def _skipped(self, group: Group, one: Contender, reason: str) -> Row:
        return Row(**self._subject(group, one), exact="", skipped=reason)

    def _subject(self, group: Group, one: Contender) -> dict[str, Any]:
        return self.common | {
            "what": one.what,
            "contender": one.who,
            "family": one.family,
            "formulation": one.formulation,
            "m": group.m,
            "n": group.n,
            "k": group.k,
            "dtype": one.dtype,
            "cache": group.cache,
            "source": "measured",
        }

    def measure(self, group: Group) -> list[Row]:
        """Check, then time, a group's contenders.

        Raises:
            Inexact: one of them computes something wrong. Nothing of the group has been timed.
        """
        with torch.no_grad():
            return self._measure(group)

    def _measure(self, group: Group) -> list[Row]:
        judge = self._judge_of(group)
        recorded: dict[str, Recorded] = {}
        verdicts: dict[str, str] = {}
        rows: list[Row] = []
        for one in group.contenders:
            made, verdict = self._prepare(group, one, judge)
            if made is None:
                rows.append(self._skipped(group, one, verdict))
                if one.label not in self._said:
                    self.say(f"{one.label} is left out: {verdict}")
                self._said.add(one.label)
            else:
                recorded[one.label], verdicts[one.label] = made, verdict
        seconds = interleave(recorded, self.backend, self.choice.replays, group.cache)
        clock = self.meter.clock_mhz() if self.meter else None
        medians = {label: quantile(values, 0.5) for label, values in seconds.items()}
        sixteen = min(medians[one.label] for one in group.contenders if one.family == "16-bit")
        return rows + [
            Row(
                **self._subject(group, one),
                median_us=medians[one.label] * 1e6,
                p10_us=quantile(seconds[one.label], 0.1) * 1e6,
                p90_us=quantile(seconds[one.label], 0.9) * 1e6,
                ratio_to_16bit=sixteen / medians[one.label],
                gb_s=one.bytes_moved(group.m, group.n, group.k) / medians[one.label] / 1e9,
                roofline_share=self._roofline_share(group, one, medians),
                energy_uj_token=self._energy(group, one, recorded[one.label]),
                exact=verdicts[one.label],
                replays=self.choice.replays,
                calls=recorded[one.label].calls,
                sm_clock_mhz=clock,
            )
            for one in group.contenders
            if one.label in recorded
        ]

    def _judge_of(self, group: Group) -> Judge:
        """The matrix is drawn once, and expected outputs are computed once per M."""
        if self._matrix is None or (self._matrix.n, self._matrix.k) != (group.n, group.k):
            self._judge = self._matrix = None  # their memory, before more is taken
            self._matrix = make_problem(group.n, group.k, group.m, self.here.device)
            self._judge = Judge(self._matrix)
        elif self._judge is None or self._judge.problem.m != group.m:
            self._judge = None
            self._judge = Judge(same_matrix(self._matrix, group.m))
        assert self._judge is not None
        return self._judge

    def _prepare(self, group: Group, one: Contender, judge: Judge) -> tuple[Recorded | None, str]:
        """The contender's replay and the verdict on it, or None and the reason to leave it out.

        Its outputs are checked at the first and last copy of the weights and after two replays,
        since a kernel may be right except for what a graph leaves behind.

        Raises:
            Inexact: a kernel of ours or of torch is wrong. A wrong one of another project is left
                out.
        """
        copies = copies_needed(
            one.weight_bytes(group.n, group.k), self.here.cache_bytes, group.cache
        )
        try:
            call = one.build(judge.problem, copies)
            judge.check(one, call(0))
            judge.check(one, call(copies - 1))
            recorded = record(call, copies, self.backend)
            for _ in range(2):
                recorded.run()
            return recorded, judge.check(one, recorded.output())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Our kernels raise ValueError if they cannot run here; another project's package may
            # raise anything; all else is a defect.
            ours = one.family in ("addsub", "dot") and isinstance(error, ValueError)
            if not ours and one.family != "other":
                raise
            return None, next(iter(str(error).splitlines()), repr(error))

    def _roofline_share(
        self, group: Group, one: Contender, medians: Mapping[str, float]
    ) -> float | None:
        """The least possible time divided by the median. It follows from a GPU's limits; for our
        kernels on a CPU it is the time of a plain read of the weights in the same rounds."""
        m, n, k = group.m, group.n, group.k
        floats = one.what == "linear" and one.who != "bitnet"
        ops = self.here.ops_16bit if floats else self.here.ops_int8
        if self.here.bandwidth is not None and ops is not None:
            least = max(one.bytes_moved(m, n, k) / self.here.bandwidth, 2 * m * n * k / ops)
        elif one.who == "bitnet" and READ.label in medians:
            least = medians[READ.label]
        else:
            return None
        return least / medians[one.label]

    def _energy(self, group: Group, one: Contender, recorded: Recorded) -> float | None:
        if (
            not self.choice.energy
            or self.meter is None
            or group.cache != "cold"
            or one.what != "linear"
        ):
            return None
        joules = machine.joules_a_run(self.meter, recorded.run, torch.cuda.synchronize)
        return joules / recorded.calls / group.m * 1e6
