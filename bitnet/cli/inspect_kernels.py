"""``bitnet inspect kernels``: the GPU kernels' machine code, counted without a GPU."""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitnet.cli.common import valid_names, wide_console
from bitnet.durable import check_output, write_atomic
from bitnet.progress import Reports
from bitnet.schema import UserError, nearest, user_input
from bitnet_kernels.available import triton_installed
from bitnet_kernels.sass import ARCHS, Report, inspect, listing

_PIPES = ("issue", "alu", "imad", "fma", "xu", "lsu", "tensor")


def inspect_kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(ARCHS)}; repeatable. Default: sm_90."),
    ] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    sass: Annotated[str, typer.Option(help="Folder for listings, the main loop marked.")] = "",
    csv_file: Annotated[str, typer.Option("--csv", help="File for all figures.")] = "",
) -> None:
    """Compile the GPU kernels, and count the cost of their main loops.

    Needs no GPU. Instructions of one thread are counted in the machine code (SASS), per weight. The
    last columns are a bound, not a measurement: the weights that an SM could process per clock, by
    published rates of its units, and the share of the memory's rate that this is ("93%: alu" =
    limited by the integer units). An addsub kernel may multiply data only by the two scales of its
    epilogue; any other multiplication is an error: exit code 1.

    Example: bitnet inspect kernels --arch sm_80 --arch sm_90 --kernel "M=1" --sass listings
    """
    for option, path in (("--csv", csv_file), ("--sass", sass and f"{sass}/listing")):
        if path:
            check_output(option, Path(path))
    archs = valid_names("--arch", arch or ["sm_90"], ARCHS)
    reports = compiled(archs, chosen_specs(kernel), Path(sass) if sass else None)
    if csv_file:
        write_csv(Path(csv_file), reports)
    console = wide_console()
    for name in archs:
        for table in tables_of(name, [one for one in reports if one.sm == ARCHS[name].sm]):
            console.print(table)
    print("Counted in SASS. The speeds are bounds from published rates, not measurements.")
    for one in reports:
        for note in filter(None, [*one.notes, load_widths(one)]):
            print(f"{one.name}, sm_{one.sm}: {note}")
    wrong = [one for one in reports if one.family == "addsub" and multipliers(one)]
    for one in wrong:
        found = counted(multipliers(one))
        print(f"error: {one.name}, sm_{one.sm}: multiplies data: {found}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def chosen_specs(kernel: str) -> dict[str, Any]:
    """Name -> kernel to compile, for the kernels whose name contains ``kernel``.

    Raises:
        UserError: there is none, or kernels cannot be compiled here.
    """
    if not triton_installed():
        raise UserError("inspecting kernels needs Triton, which is not installed")
    from bitnet_kernels.gpu.catalog import catalog
    from bitnet_kernels.gpu.common import INTERPRETED

    if INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    specs = {spec.name: spec for spec in catalog()}
    found = {name: spec for name, spec in specs.items() if kernel.lower() in name.lower()}
    if not found:
        near = nearest(kernel, specs, 0)
        raise UserError(f"--kernel {kernel!r}: no kernel's name contains it; nearest: {near}")
    return found


def compiled(archs: list[str], specs: dict[str, Any], listings: Path | None) -> list[Report]:
    """Compile kernels for GPUs and count their instructions; write listings into a folder."""
    reports: list[Report] = []
    with Reports() as progress:
        task = progress.add_task("compiling", total=len(archs) * len(specs))
        for arch in archs:
            for name, spec in specs.items():
                progress.update(task, description=f"{name}, {arch}")
                reports.append(inspect(spec, ARCHS[arch].sm))
                if listings:
                    write_listing(listings, spec, ARCHS[arch].sm)
                progress.advance(task)
    return reports


def multipliers(report: Report) -> list[str]:
    """The multiplications that an addsub kernel must not have."""
    return report.multipliers_on_data + report.multipliers_outside


def tables_of(arch_name: str, reports: list[Report]) -> Iterator[Table]:
    """The figures of one GPU, one row per kernel: a table of the matmuls, one of the others."""
    arch = ARCHS[arch_name]
    needed = arch.needed_weights_per_clock
    title = f"{arch_name} ({arch.gpu}): memory delivers {needed:.1f} weights per clock to each SM"
    matmuls, others = (
        Table(title=text, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for text in (title, f"{arch_name} ({arch.gpu})")
    )
    for table in (matmuls, others):
        table.add_column("kernel", no_wrap=True)
    matmuls.add_column("instr/\nweight", justify="right")
    for table in (matmuls, others):
        for heading in ("regis-\nters", "spills\nbytes", "shared\nbytes"):
            table.add_column(heading, justify="right")
        table.add_column("multiplies\ndata")
    matmuls.add_column("weights/\nclk/SM", justify="right")
    matmuls.add_column("speed of\nmemory")
    for one in reports:
        resources = [str(n) for n in (one.registers, one.spill_bytes, one.shared_bytes)]
        multiplied = shortened(one.multipliers_on_data)
        cost, speed = one.instructions_per_weight, one.weights_per_clock
        if cost is None or speed is None:
            others.add_row(one.name, *resources, multiplied)
        else:
            matmuls.add_row(
                *(one.name, f"{cost:.2f}", *resources, multiplied, f"{speed:.1f}"), roofline(one)
            )
    yield from (table for table in (matmuls, others) if table.row_count)


def load_widths(report: Report) -> str:
    """A note if weights are not loaded 16 bytes at a time; "" if they are, or loaded in bulk."""
    if report.weight_load_bits in ([128], []):
        return ""
    return f"weights in loads of {', '.join(str(n // 8) for n in report.weight_load_bits)} bytes"


def roofline(report: Report) -> str:
    """``"all"`` for a kernel that memory limits; else its share of that speed, and its limit."""
    assert report.weights_per_clock is not None
    if report.bound == "memory":
        return "all"
    return f"{report.weights_per_clock / report.needed_weights_per_clock:.0%}: {report.bound}"


def counted(opcodes: list[str]) -> str:
    """``"0"``, or each opcode with its count."""
    return ", ".join(f"{opcode} x{n}" for opcode, n in Counter(opcodes).items()) or "0"


def shortened(opcodes: list[str]) -> str:
    """:func:`counted` of the two most frequent opcodes, without their modifiers."""
    counts = Counter(opcode.partition(".")[0] for opcode in opcodes).most_common()
    listed = [f"{opcode} x{n}" for opcode, n in counts[:2]]
    return ", ".join(listed + ["..."] * (len(counts) > 2)) or "0"


def write_listing(folder: Path, spec: Any, sm: int) -> None:
    """Write ``FOLDER/sad-M=1.sm_90.sass``."""
    with user_input(f"--sass {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w=.-]+", "-", spec.name)
    write_atomic(folder / f"{name}.sm_{sm}.sass", listing(spec, sm).encode())


def write_csv(path: Path, reports: list[Report]) -> None:
    """One row per report; one column per pipe, in instructions per weight."""
    rows = []
    for one in reports:
        row: dict[str, Any] = {"gpu": ARCHS[f"sm_{one.sm}"].gpu}
        for key, value in one._asdict().items():
            if key == "by_pipe":
                row |= {f"{pipe}_per_weight": value.get(pipe, 0.0) for pipe in _PIPES}
            elif key == "notes":
                row[key] = "; ".join(value)
            elif key == "weight_load_bits":
                row[key] = " ".join(map(str, value))
            else:
                row[key] = counted(value) if isinstance(value, list) else value
        rows.append(row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
