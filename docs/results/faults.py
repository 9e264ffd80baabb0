"""What a fault costs a run of two processes: faults.csv.

    python docs/results/faults.py              # the rows that the CSV lacks; 15 minutes on 2 cores
    python docs/results/faults.py DIR          # the same; DIR keeps what the next call needs too
    python docs/results/faults.py DIR NAME ... # these rows anew
    python docs/results/faults.py table        # prints the table from the CSV

A toy model trains under torchrun in two processes on gloo, a checkpoint every 10 steps. A fault
strikes while it trains or before it starts again; then the fault is mended and the same command
goes on. Measured: the line that the user saw; the seconds from the fault until the processes that
it did not strike had ended; the step that was reached, the newest checkpoint and the step where the
run went on; whether all losses and norms of gradients, before and after, are those of a run that
nothing struck, to the bit. Two agents of torchrun on this machine stand for two machines.

The full disk is a tmpfs of 4 MB, the read-only ones are mounts: the script enters a new mount
namespace (unshare); that needs root or the right to do so. Steps, ranks and moments are seeded.
"""

import csv
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from faults_case import EVERY, FIRST, Case, Losses, machine, mount, own_mounts, prepare
from faults_job import ROOT, Job, free_port, said

CSV = Path(__file__).parent / "faults.csv"
Row = dict[str, str]


class Seen(NamedTuple):
    """What a fault did."""

    saw: str
    at: int
    """The step that was reached."""
    seconds: float | None
    """Until the others ended; None where none had to end."""
    resumed: int | None = None
    """Where the run went on by itself."""


Strike = Callable[[Case, dict[int, int]], Iterable[int]]
"""Does harm to a job whose processes are given by rank; returns the ranks that it struck."""
Measure = Callable[[Case], Seen]


def training(strike: Strike, *options: str, mend: Callable[[Case], None] | None = None) -> Measure:
    """Strike a run that trains."""

    def measure(case: Case) -> Seen:
        job = case.start("train.steps=1000", *options)
        case.wait(job, FIRST + case.dice.randint(4, 12))
        time.sleep(case.dice.random() * 0.1)
        pids = job.ranks(2)
        struck = set(strike(case, pids))
        others = [pid for rank, pid in pids.items() if rank not in struck]
        seconds = job.ended(others)
        job.finish()
        if mend is not None:
            mend(case)
        return Seen(said(job), case.step(), seconds)

    return measure


def starting(
    strike: Callable[[Case], None], *options: str, mend: Callable[[Case], None] | None = None
) -> Measure:
    """Strike a run that rests, and start it."""

    def measure(case: Case) -> Seen:
        strike(case)
        job = case.start(f"train.steps={FIRST + 8}", *options)
        job.finish()
        if mend is not None:
            mend(case)
        return Seen(said(job), FIRST, None, job.resumed())

    return measure


def machines(second: Callable[[Case], tuple[list[str], Path]], delay: float = 0) -> Measure:
    """Start a run that rests on two machines, the second one with other arguments or other code."""

    def measure(case: Case) -> Seen:
        job = Job(case.folder / "out.txt")
        own = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=faults"]
        steps, timeout = f"train.steps={FIRST + 8}", "distributed.timeout=10"
        options, root = second(case)
        endpoint = free_port()
        job.agent(own, case.command(steps, timeout), endpoint)
        time.sleep(delay)
        job.agent(own, case.command(steps, timeout, *options), endpoint, root)
        job.finish()
        return Seen(said(job), FIRST, None, job.resumed())

    return measure


def send(number: signal.Signals, rank: int) -> Strike:
    """A signal to one of the processes."""

    def strike(case: Case, pids: dict[int, int]) -> Iterable[int]:
        os.kill(pids[rank], number)
        return (rank,)

    return strike


def kill(case: Case, pids: dict[int, int]) -> int:
    """SIGKILL of a process; returns its rank."""
    time.sleep(case.dice.random() * 0.1)
    rank = case.dice.randrange(len(pids))
    os.kill(pids[rank], signal.SIGKILL)
    return rank


def kill_inside_a_save(case: Case, pids: dict[int, int]) -> int:
    """SIGKILL while the folder of a checkpoint does not have its name yet; returns the rank."""
    rank, following = case.dice.randrange(len(pids)), (case.step() // EVERY + 1) * EVERY
    aside = case.run / "checkpoints" / f".tmp-step_{following:08d}"
    while not aside.exists():
        pass
    time.sleep(case.dice.random() * 0.005)
    os.kill(pids[rank], signal.SIGKILL)
    if not aside.exists():
        raise RuntimeError("the checkpoint was complete before the signal")
    return rank


def shard(case: Case) -> Path:
    """The file of training tokens."""
    return case.shared / "prepared" / "train_00000.bin"


def truncate(case: Case, *_: Any) -> Iterable[int]:
    """Cut a file of tokens in half."""
    os.truncate(shard(case), shard(case).stat().st_size // 2)
    return ()


def lengthen(case: Case) -> None:
    """Undo :func:`truncate`."""
    shutil.copyfile(case.shared / "whole.bin", shard(case))


def flip(case: Case) -> None:
    """Flip a bit in what the second process saved."""
    path = case.newest() / "model.00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 16
    path.write_bytes(data)


def fill(case: Case, _: Any) -> Iterable[int]:
    """Fill the disk but for 64 kB: lines of metrics fit, a checkpoint does not."""
    ballast = case.folder / "ballast"
    free = shutil.disk_usage(case.folder).free
    assert free < 2**23, "it is the small disk"
    ballast.write_bytes(bytes(free - 2**16))
    return ()


def read_only(case: Case, *_: Any) -> Iterable[int]:
    """Make the folder of checkpoints read-only."""
    mount("-o", "remount,ro", case.run / "checkpoints")
    return ()


def writable(case: Case) -> None:
    """Undo :func:`read_only`."""
    mount("-o", "remount,rw", case.run / "checkpoints")


def other_code(case: Case) -> tuple[list[str], Path]:
    """A copy of the sources in which one constant of the quantizer differs."""
    copy = case.folder / "code"
    for name in ("bitnet", "kernels"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "train.py", copy)
    source = copy / "bitnet" / "quant.py"
    source.write_text(source.read_text() + "\nOTHER = 1\n")
    return [], copy


def port_in_use(case: Case) -> Seen:
    """Another program listens on torchrun's port."""
    with socket.create_server(("localhost", 0)) as server:
        job = Job(case.folder / "out.txt")
        port = server.getsockname()[1]
        own = ["--nproc-per-node=2", "--master-addr=localhost", f"--master-port={port}"]
        job.agent(own, case.command(f"train.steps={FIRST + 8}"), endpoint=None)
        job.finish()
    return Seen(said(job), FIRST, None, job.resumed())


FAULTS: dict[str, tuple[str, Measure]] = {
    "SIGTERM to a process": ("fsdp", training(send(signal.SIGTERM, 1))),
    "SIGSTOP of rank 1": ("fsdp", training(send(signal.SIGSTOP, 1), "distributed.timeout=10")),
    "SIGSTOP of rank 0": ("ddp", training(send(signal.SIGSTOP, 0), "distributed.timeout=10")),
    "full disk": ("fsdp", training(fill, mend=lambda case: (case.folder / "ballast").unlink())),
    "disk turns read-only": ("fsdp", training(read_only, mend=writable)),
    "disk is read-only at the start": ("fsdp", starting(read_only, mend=writable)),
    "data cut short at the start": ("fsdp", starting(truncate, mend=lengthen)),
    "data cut short in training": ("fsdp", training(truncate, mend=lengthen)),
    "bit flip in the newest checkpoint": ("fsdp", starting(flip)),
    "a machine with another config": ("fsdp", machines(lambda _: (["optim.lr=1e-3"], ROOT))),
    "a machine with other code": ("fsdp", machines(other_code)),
    "port in use": ("fsdp", port_in_use),
    "a machine that starts 20 s late": ("fsdp", machines(lambda _: ([], ROOT), delay=20)),
}
"""What happens -> strategy, and how it is done and measured."""
INSIDE = (3, 12, 17)
KILLS = {
    f"SIGKILL of a process{' inside a checkpoint' if i in INSIDE else ''}, {i}": i
    for i in range(1, 21)
}
"""The kills of :func:`kills`, half of them under each strategy."""


def kills(shared: Path, strategy: str, names: list[str], expected: Losses) -> Iterator[Row]:
    """Kill a process of one run again and again; each new start shows what the last kill cost."""
    case = Case(shared, shared / f"kills-{strategy}", strategy, random.Random(names[0]))
    shutil.rmtree(case.folder, ignore_errors=True)
    shutil.copytree(shared / strategy, case.folder)
    job, resumed = case.start("train.steps=1000"), FIRST
    try:
        for name in names:
            case.wait(job, resumed + case.dice.randint(4, 12))
            pids = job.ranks(2)
            strike = kill_inside_a_save if KILLS[name] in INSIDE else kill
            rank = strike(case, pids)
            seconds = job.ended(pid for other, pid in pids.items() if other != rank)
            job.finish()
            seen, newest = Seen(said(job), case.step(), seconds), case.newest()
            job = case.start("train.steps=1000")
            resumed = case.resumed(job)
            case.wait(job, resumed + 3)
            yield outcome(name, case, seen, newest, resumed, expected)
    finally:
        job.stop()


def outcome(name: str, case: Case, seen: Seen, newest: Path, resumed: int, expected: Losses) -> Row:
    """The row of a fault after which the run goes on."""
    found = case.losses()
    same = found == {step: expected[step] for step in range(1, max(found) + 1)}
    where = {str(case.folder): "runs", str(case.shared): "data"}
    saw = seen.saw
    for path, instead in where.items():
        saw = saw.replace(path, instead)
    return {
        "fault": name,
        "strategy": case.strategy,
        "saw": saw,
        "seconds": "" if seen.seconds is None else f"{seen.seconds:.1f}",
        "at_step": str(seen.at),
        "newest_checkpoint": str(int(newest.name.removeprefix("step_"))),
        "resumed_at": str(resumed),
        "lost_steps": str(seen.at - resumed),
        "same_losses": "yes" if same else "no",
    }


def row(name: str, shared: Path, expected: dict[str, Losses]) -> Row:
    """Measure one fault, in a copy of the run that rests after :data:`FIRST` steps."""
    strategy, measure = FAULTS[name]
    case = Case(shared, shared / "case", strategy, random.Random(name))
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir()
    small = [case.folder] if name == "full disk" else []
    if "read-only" in name:
        small = [case.run / "checkpoints"]
    for disk in small:
        disk.mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", disk)
    try:
        shutil.copytree(shared / strategy / "run", case.run, dirs_exist_ok=True)
        seen = measure(case)
        newest = case.newest()
        if (resumed := seen.resumed) is None:
            job = case.start(f"train.steps={case.step() + 8}")
            job.finish()
            resumed = job.resumed()
            if resumed is None:
                raise RuntimeError(f"{name}: the run did not go on:\n{job.text()}")
        return outcome(name, case, seen, newest, resumed, expected[strategy])
    finally:
        for disk in small:
            subprocess.run(["umount", "--lazy", disk], check=True)


def read() -> list[dict[str, str]]:
    """The rows of the CSV."""
    if not CSV.exists():
        return []
    with CSV.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(rows: list[Row]) -> None:
    """Replace the CSV; its order is that of :data:`KILLS` and :data:`FAULTS`."""
    order = [*KILLS, *FAULTS]
    rows = sorted(rows, key=lambda row: order.index(row["fault"]))
    with CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table() -> str:
    """The table of docs/distributed.md, from the CSV: kills of one kind in a line."""
    lines = [
        "| what happened | what the user saw | others ended after, s | steps lost "
        "| newest checkpoint | went on at step | losses as without |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Row]] = {}
    for row in read():
        groups.setdefault(row["fault"].rpartition(",")[0] or row["fault"], []).append(row)
    for name, rows in groups.items():
        times = f", {len(rows)} times" if len(rows) > 1 else ""
        strategies = ", ".join(sorted({row["strategy"] for row in rows}))
        words = (re.sub(r" \(\[/.*", " (...)", row["saw"]) for row in rows)  # gloo's own words
        saw = "; ".join(dict.fromkeys(words)).replace("|", "/")
        one = len(rows) == 1
        newest = all(row["resumed_at"] == row["newest_checkpoint"] for row in rows)
        resumed = rows[0]["resumed_at"] if one else ("the newest" if newest else "an older one")
        lines.append(
            f"| {name}{times} ({strategies}) | {saw} | {spread(rows, 'seconds')} | "
            f"{spread(rows, 'lost_steps')} | {rows[0]['newest_checkpoint'] if one else ''} | "
            f"{resumed} | {sum(row['same_losses'] == 'yes' for row in rows)} of {len(rows)} |"
        )
    return "\n".join(lines)


def spread(rows: list[Row], key: str) -> str:
    """The least and the largest number of a column."""
    numbers = sorted({row[key] for row in rows if row[key]}, key=float)
    return " to ".join(dict.fromkeys((numbers[0], numbers[-1]))) if numbers else ""


def measure(folder: Path, names: list[str]) -> Iterator[Row]:
    """Rows of these faults, as they come."""
    expected = prepare(folder)
    for half, strategy in enumerate(expected):
        if mine := [name for name in names if name in KILLS and KILLS[name] % 2 == half]:
            yield from kills(folder, strategy, mine, expected[strategy])
    for name in names:
        if name in FAULTS:
            yield row(name, folder, expected)


def main() -> None:
    """Measure, or print the table."""
    words = sys.argv[1:]
    if words != ["table"]:
        own_mounts()
        done = {row["fault"] for row in read()}
        folder, *names = words or [tempfile.mkdtemp(prefix="faults-")]
        names = names or [name for name in (*KILLS, *FAULTS) if name not in done]
        for new in measure(Path(folder).resolve(), names):
            print(new, flush=True)
            rows = [row for row in read() if row["fault"] != new["fault"]]
            write([*rows, new | machine()])
    print(table())


if __name__ == "__main__":
    main()
