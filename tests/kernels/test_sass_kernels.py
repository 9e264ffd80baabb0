"""The ahead-of-time inspector's counts, the kernels' budgets, and ``bitnet inspect kernels``.

Counts are checked on snippets counted by hand; compiled kernels come from ``compiled_sass.py``,
which runs in a separate process.
"""

import csv
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitnet.cli import main as cli
from bitnet.cli.inspect_kernels import counted, shortened
from bitnet_kernels.dispatch import TileConfig
from bitnet_kernels.sass import (
    ARCHS,
    Compiled,
    Report,
    compile_spec,
    estimate,
    estimate_us,
    inspect,
    main_loop,
    model,
    multipliers,
    parse,
    sixteen_bit_us,
)
from tests.helpers.scripts import CompiledBy


def listing(text: str) -> str:
    """A listing as nvdisasm writes it, from one instruction or ``label:`` a line."""
    lines = filter(None, map(str.strip, text.splitlines()))
    numbered = enumerate(lines)  # addresses need only grow
    return "".join(
        f".{line}\n" if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;\n"
        for i, line in numbered
    )


class Stand(NamedTuple):
    """The fields of a Spec, without Triton."""

    name: str = "k"
    family: str = "addsub"
    kernel: Any = None
    types: dict[str, str] = {}  # noqa: RUF012
    constants: dict[str, Any] = {}  # noqa: RUF012
    num_warps: int = 1
    num_stages: int = 1
    tokens: int = 1
    weights: int = 2048
    aligned: tuple[str, ...] = ()


@pytest.fixture
def inspect_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    """inspect() of a snippet, as if it were what the spec compiled to."""

    def run(text: str, sm: int = 80, **fields: Any) -> Report:
        made = Compiled(listing(text), "", registers=40, spill_bytes=8, shared_bytes=16)
        monkeypatch.setattr(model, "compile_spec", lambda spec, sm: made)
        monkeypatch.setattr(model, "_reports", {})  # the same spec compiles to another text
        return inspect(Stand(**fields), sm)  # type: ignore[arg-type]

    return run


GEMV = """
    LDG.E.EF.128 R40, [R2.64]
    head:
    LDG.E.EF.128 R4, [R2.64]
    LDG.E.EF.128 R8, [R2.64+0x200]
    LDG.E.128 R12, [R16.64]
    LDG.E.U8 R18, [R16.64]
    LOP3.LUT R20, R4, R12, RZ, 0x3c, !PT
    POPC R21, R20
    IADD3 R22, R21, R22, RZ
    IMAD.WIDE R2, R30, 0x4, R2
    FADD R23, R23, R23
    UIADD3 UR4, UR4, 0x1, URZ
    UISETP.GE.AND UP0, UPT, UR4, UR5, UPT
    STL [R1], R4
    NOP
    BRA.U !UP0, `(.head)
    LDL R4, [R1]
    EXIT
"""


def test_a_loop_counted_by_hand(inspect_text: Any) -> None:
    report = inspect_text(GEMV)
    assert report.loop_instructions == 13  # the NOP is none
    assert report.weights_per_pass == 2 * 16 * 4  # two loads of 16 bytes, four weights a byte
    assert report.instructions_per_weight == 13 / 128
    per_weight = {"alu": 2, "fma": 1, "imad": 1, "issue": 13, "lsu": 4 + 4 + 4 + 1 + 1, "xu": 1}
    assert report.by_pipe == {pipe: n / 128 for pipe, n in (per_weight | {"other": 3}).items()}
    assert report.weight_load_bits == [128]
    assert report.local_accesses == 2
    assert (report.registers, report.spill_bytes, report.shared_bytes) == (40, 8, 16)
    assert report.address_multiplies == ["IMAD.WIDE"]
    assert report.multipliers_on_data == report.data_moves == report.notes == []
    # 14 words of 4 bytes, 32 a clock, are the slowest: 128 weights in 14/32 clocks.
    assert report.weights_per_clock == pytest.approx(128 * 32 / 14)
    assert report.bound == "memory"


def test_the_slowest_pipe_is_the_bound(inspect_text: Any) -> None:
    slow = GEMV.replace("POPC R21, R20", "POPC R21, R20\n" * 100)
    report = inspect_text(slow)
    assert report.weights_per_clock == pytest.approx(128 * 16 / 100)
    assert report.bound == "xu"
    # On an A100 FADD and IMAD share 64 lanes, 401 + 1; an H100 has 128 for them.
    slow = GEMV.replace("FADD R23, R23, R23", "FADD R23, R23, R23\n" * 401)
    assert inspect_text(slow, 80).weights_per_clock == pytest.approx(128 * 64 / 402)
    assert inspect_text(slow, 90).weights_per_clock == pytest.approx(128 * 128 / 413)
    assert inspect_text(slow, 80).bound == "fma"
    assert inspect_text(slow, 90).bound == "issue"


def test_unrolling_of_tensor_core_loops(inspect_text: Any) -> None:
    """4 warps, a tile of 16 tokens by 64 rows by 64 columns: 65536 multiply-accumulates a pass, and
    16 x 8 x 32 of them in an instruction of a warp: 16 instructions, 4 a warp."""
    gemm = """
        head:
        LDGSTS.E.128 [R5], [R2.64]
        LDGSTS.E.BYPASS.64 [R5+0x10], [R2.64]
        {mma}
        @P0 BRA `(.head)
        EXIT
    """
    fields = {"weights": 64 * 64, "num_warps": 4, "tokens": 13, "constants": {"BLOCK_M": 16}}
    mma = "IMMA.16832.S8.S8.SAT R4, R8.ROW, R12.COL, R4\n"
    for unrolled in (1, 3):
        report = inspect_text(gemm.format(mma=mma * 4 * unrolled), **fields)
        assert report.weights_per_pass == unrolled * 64 * 64 // 128
        assert report.tensor_core == 4 * unrolled == len(report.multipliers_on_data)
        assert report.by_pipe["tensor"] == 16
    # One pass: 32 weights a thread are 8 bytes, the 64-bit load; three: 24 bytes, neither.
    assert inspect_text(gemm.format(mma=mma * 4), **fields).weight_load_bits == [64]
    assert report.weight_load_bits == [64, 128]
    # The warpgroup's 64 x 16 x 32 is half of the tile's product, each.
    wgmma = "IGMMA.64x16x32.S8.S8 R24, gdesc[UR4], R24, gsb0\n"
    report = inspect_text(gemm.format(mma=wgmma * 4), 90, **fields)
    assert report.weights_per_pass == 2 * 64 * 64 // 128
    assert report.by_pipe["tensor"] == 16
    # A shape that is not in the listing.
    report = inspect_text(gemm.format(mma="UTCIMMA gdesc[UR12], gdesc[UR4]\n" * 2), **fields)
    assert report.weights_per_pass == 32
    assert report.by_pipe["tensor"] == 16
    assert "taken not to be unrolled" in report.notes[0]


def test_what_counting_cannot_see_is_said(inspect_text: Any) -> None:
    nested = GEMV.replace("FADD R23, R23, R23", "inner:\nFADD R23, R23, R23\n@P0 BRA `(.inner)")
    assert inspect_text(nested).notes == [
        "a loop inside the main loop is counted as one pass of it"
    ]
    polling = "poll:\nSYNCS.PHASECHK.TRYWAIT P0, [UR4], R2\n@!P0 BRA `(.poll)"
    assert inspect_text(GEMV.replace("FADD R23, R23, R23", polling)).notes == []
    straight = inspect_text("LDG.E.EF.128 R4, [R2.64]\nFMUL R5, R4, R4\nEXIT")
    assert straight.notes == ["no loop: the whole kernel is counted"]
    assert straight.multipliers_on_data == ["FMUL"]


def test_a_kernel_without_weights(inspect_text: Any) -> None:
    report = inspect_text(GEMV, weights=0, tokens=0, family="quantization")
    assert report.loop_instructions == 13
    assert report.instructions_per_weight is None
    assert report.weights_per_clock is None
    assert (report.by_pipe, report.weight_load_bits, report.bound) == ({}, [], "")


def test_weights_that_memory_delivers_by_hand() -> None:
    """3.35e12 bytes/s of 4 weights each, over 132 SMs at 1.98e9 clocks/s."""
    assert ARCHS["sm_90"].needed_weights_per_clock == pytest.approx(51.27, abs=0.01)
    assert ARCHS["sm_89"].needed_weights_per_clock == pytest.approx(12.5)
    assert {name: arch.sm for name, arch in ARCHS.items()} == {
        "sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100,
    }  # fmt: skip


def test_estimates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, for kernels of 100 weights per clock on an A100: 108 SMs, 1.41 GHz, 2.039 TB/s."""
    made = Compiled(listing(GEMV), "", registers=64, spill_bytes=0, shared_bytes=0)
    monkeypatch.setattr(model, "compile_spec", lambda spec, sm: made)
    real = inspect(Stand(), 80)._replace(weights_per_clock=100.0)  # type: ignore[arg-type]
    monkeypatch.setattr(estimate, "inspect", lambda spec, sm: real)
    one = TileConfig(1, 8, 2048)
    # Large: memory takes longest.
    moved = 8192 * 28672 / 4 + 28672 + 2 * 8192
    assert estimate_us("sad", one, 80, 1, 8192, 28672) == pytest.approx(2.0 + moved / 2.039e6)
    # 16 tokens are 16 * 1024 programs of 8 rows, 152 on the busiest SM.
    arithmetic = 152 * 8 * 28672 / (100 * 1410)
    assert estimate_us("sad", one, 80, 16, 8192, 28672) == pytest.approx(2.0 + arithmetic)
    # Small: two blocks of K, one after the other; or split, both at once.
    assert estimate_us("sad", one, 80, 1, 64, 4096) == pytest.approx(2.0 + 2 * 0.7)
    split = one._replace(split_k=2)
    assert estimate_us("sad", split, 80, 1, 64, 4096) == pytest.approx(2.0 + 0.7 + 1.5)
    # Another layout of an operand is another launch, and int8 weights are four times the bytes.
    assert estimate_us("popcount", one, 80, 1, 64, 4096) == pytest.approx(4.0 + 2 * 0.7)
    whole = TileConfig(128, 128, 64, 1, 8, 4)
    fast = real._replace(weights_per_clock=1e9)
    monkeypatch.setattr(estimate, "inspect", lambda spec, sm: fast)
    moved = 2.25 * 8192 * 28672 + 28672 + 2 * 8192
    assert estimate_us("unpacked", whole, 80, 1, 8192, 28672) == pytest.approx(
        4.0 + max(moved / 2.039e6, 28672 / 64 / 3 * 0.7), rel=0.01
    )
    spilled = real._replace(spill_bytes=8)
    monkeypatch.setattr(estimate, "inspect", lambda spec, sm: spilled)
    assert estimate_us("sad", one, 80, 1, 64, 64) == math.inf


def test_the_16_bit_roofline_by_hand() -> None:
    """M = 1: 2 bytes per weight, 3.35 TB/s; M = 4096: 132 SMs x 2048 multiply-adds x 1.98 GHz."""
    moved = 2 * (4096 * 4096 + 2 * 4096)
    assert sixteen_bit_us(90, 1, 4096, 4096) == pytest.approx(2.0 + moved / 3.35e6)
    tensor = 4096**3 / (2048 * 132 * 1.98e9) * 1e6
    assert sixteen_bit_us(90, 4096, 4096, 4096) == pytest.approx(2.0 + tensor)


BUDGETS = {"sad M=1": 1.6, "popcount M=1": 0.9, "dp4a M=1": 0.62}
"""SASS instructions per weight in the main loop, at most."""


ARCHS_OF = {"few": (90,), "every": (80, 90)}
"""The capabilities for which ``compiled_sass.py`` compiles few kernels, and every one."""
each_arch = pytest.mark.parametrize(
    ("worked", "sm"),
    [
        pytest.param(kernels, sm, marks=pytest.mark.slow if kernels == "every" else ())
        for kernels, archs in ARCHS_OF.items()
        for sm in archs
    ],
    indirect=["worked"],
)


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.slow)])
def worked(request: pytest.FixtureRequest, compiled_by: CompiledBy) -> dict[str, Any]:
    """What ``compiled_sass.py`` printed; "folder" has its files, "kernels" says how many."""
    folder = compiled_by("compiled_sass.py", request.param)
    return json.loads((folder / "found.json").read_text()) | {
        "folder": folder,
        "kernels": request.param,
    }


def report(worked: dict[str, Any], name: str, sm: int) -> dict[str, Any]:
    found = [one for one in worked["reports"] if (one["name"], one["sm"]) == (name, sm)]
    assert len(found) == 1, f"{name}: {len(found)} reports"
    return found[0]


@each_arch
@pytest.mark.parametrize(
    ("form", "base", "per_word"),
    [
        ("add", "", 0),
        ("shift", "", 0),
        ("sad", "", 0),
        ("multiply", "IMAD", 1),
        ("constant", "IMAD", 1),
        ("dp4a", "IDP", 1),
        ("float", "FMUL", 1),
        ("sad and multiply", "IMAD", 1),
    ],
)
def test_the_check_can_be_failed(
    worked: dict[str, Any], form: str, base: str, per_word: int, sm: int
) -> None:
    """A word holds 16 weights, and each form has at most one multiplication a word: counting them
    also counts how often ptxas unrolled the loop."""
    found = report(worked, form, sm)
    assert found["weights_per_pass"] % 64 == 0
    assert len(found["multipliers_on_data"]) == per_word * found["weights_per_pass"] // 16
    assert {opcode.partition(".")[0] for opcode in found["multipliers_on_data"]} <= {base}
    assert found["weight_load_bits"] == [128]
    assert (found["spill_bytes"], found["local_accesses"], found["notes"]) == (0, 0, [])


@each_arch
@pytest.mark.parametrize("m", [16, 64])
def test_tensor_core_loops_compiled(worked: dict[str, Any], m: int, sm: int) -> None:
    found = report(worked, f"tensor core M={m}", sm)
    assert found["by_pipe"]["tensor"] == m
    assert found["tensor_core"] > 0
    assert found["weights_per_pass"] % (64 * 64 // 128) == 0


@each_arch
def test_one_multiplication_in_the_real_loop(worked: dict[str, Any], sm: int) -> None:
    """One absolute difference of the SAD kernel's loop turned into a multiplication of the same
    operands is found, and nothing else."""
    text = worked["listings"][f"sm_{sm}"]
    code = parse(text)
    loop = main_loop(code)
    assert multipliers(code, loop).on_data == []
    differences = [code[i] for i in sorted(loop.body) if code[i].base == "VABSDIFF4"]
    for victim in (differences[0], differences[-1]):
        line = rf"(/\*{victim.address:04x}\*/\s+){re.escape(victim.opcode)} "
        changed, n = re.subn(line, r"\1IMAD ", text)
        assert n == 1
        code = parse(changed)
        found = multipliers(code, main_loop(code)).on_data
        assert [one.address for one in found] == [victim.address]


@each_arch
@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_per_weight_stay_in_budget(worked: dict[str, Any], name: str, sm: int) -> None:
    assert report(worked, name, sm)["instructions_per_weight"] <= BUDGETS[name]


def test_every_form_of_the_epilogue(worked: dict[str, Any]) -> None:
    """K split: sums meet in relaxed reductions, and one acquire-release arrival orders them. No
    form spills, and none fuses a multiplication with an addition, which would skip a rounding."""
    assert len(worked["forms"]) == {"few": 2, "every": 20}[worked["kernels"]]
    for one in worked["forms"]:
        assert one["spills"] == 0, one
        assert not one["fused"], one
        assert one["atomics"] == [
            "atom.global.gpu.acq_rel.add.u32",
            "red.global.gpu.relaxed.add.u32",
        ], one
        assert bool(one["multipliers"]) == (one["family"] == "dot"), one
        if one["family"] == "addsub":  # in the whole kernel nothing but the scales multiplies
            assert one["anywhere"] == (["FMUL"] if "biased" in one["form"] else []), one


@each_arch
@pytest.mark.parametrize("form", ["function", "barrier", "tail", "second loop", "after"])
def test_what_is_smuggled_is_found(worked: dict[str, Any], form: str, sm: int) -> None:
    """Multiplications of data in a called function, of a barrier's counts, in a masked tail, in
    another loop, and of the sums before the epilogue."""
    clean = report(worked, "smuggled: nothing", sm)
    assert clean["multipliers_on_data"] + clean["multipliers_outside"] == []
    found = report(worked, f"smuggled: {form}", sm)
    assert found["multipliers_on_data"] + found["multipliers_outside"]


OWN = {"add", "shift", "multiply", "constant", "dp4a", "float", "sad", "sad and multiply"} | {
    f"smuggled: {form}"
    for form in ("nothing", "function", "barrier", "tail", "second loop", "after")
}


def test_every_matmul_of_the_catalog(worked: dict[str, Any]) -> None:
    """No spills, no local memory, weights in loads of 16 bytes; addsub multiplies nothing, and dot
    shows its multipliers."""
    real = [one for one in worked["reports"] if one["name"] not in OWN]
    assert {one["name"].split()[0] for one in real} >= {"sad", "popcount", "dp4a", "gemm"}
    for one in real:
        where = f"{one['name']}, sm_{one['sm']}"
        assert one["spill_bytes"] == one["local_accesses"] == 0, where
        assert one["weight_load_bits"] == [128], where
        assert one["notes"] == [], where
        if one["family"] == "addsub":
            assert one["multipliers_on_data"] == [], where
            assert one["tensor_core"] == 0, where
        else:
            assert one["multipliers_on_data"], where


def test_estimate_of_a_real_kernel(worked: dict[str, Any]) -> None:
    """4.2 MB of weights take an H100 1.25 us to read; SAD is near memory-bound."""
    assert 3 < worked["estimate"] < 4


def test_inspect_kernels_shows_and_writes_the_figures(worked: dict[str, Any]) -> None:
    archs = ARCHS_OF[worked["kernels"]]
    gpus, memory = {80: "A100 80GB", 90: "H100"}, {80: "53.6", 90: "51.3"}
    code, out, err = worked["cli"]["two"]
    assert (code, err) == (0, "")
    for sm in archs:
        head = f"sm_{sm} ({gpus[sm]}): memory delivers {memory[sm]} weights per clock"
        assert head in out
    assert "not measurements" in out
    assert "dp4a" not in out
    rows = [line for line in out.splitlines() if line.lstrip().startswith("sad M=1  ")]
    assert len(rows) == len(archs)
    for sm, row in zip(archs, rows, strict=True):
        one = report(worked, "sad M=1", sm)
        resources = [str(one[name]) for name in ("registers", "spill_bytes", "shared_bytes")]
        cost, speed = one["instructions_per_weight"], one["weights_per_clock"]
        share = f"{speed / one['needed_weights_per_clock']:.0%}: {one['bound']}"
        cells = [f"{cost:.2f}", *resources, "0", f"{speed:.1f}", *share.split()]
        assert row.split() == ["sad", "M=1", *cells]
    with (worked["folder"] / "figures.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["name"] == "sad M=1"]
    assert [(row["gpu"], row["sm"]) for row in table] == [(gpus[sm], str(sm)) for sm in archs]
    one = report(worked, "sad M=1", 90)
    assert float(table[-1]["instructions_per_weight"]) == one["instructions_per_weight"]
    assert float(table[-1]["alu_per_weight"]) == one["by_pipe"]["alu"]
    assert table[-1]["multipliers_on_data"] == "0"


def test_listings_mark_the_main_loop(worked: dict[str, Any]) -> None:
    folder = worked["folder"] / "a" / "b"
    written = {f"sad-M=1.sm_{sm}.sass" for sm in ARCHS_OF[worked["kernels"]]}
    assert written <= {file.name for file in folder.iterdir()}
    marked = (folder / "sad-M=1.sm_90.sass").read_text().splitlines()
    one = report(worked, "sad M=1", 90)
    assert sum(line[:1] == ">" and "NOP" not in line for line in marked) == one["loop_instructions"]
    assert not any(line.startswith("!") for line in marked)
    dots = [line for line in worked["marked"].splitlines() if line.startswith("!")]
    assert len(dots) == len(report(worked, "dp4a M=1", 90)["multipliers_on_data"])
    assert all("IDP" in line for line in dots)


def test_an_addsub_kernel_that_multiplies_is_an_error(worked: dict[str, Any]) -> None:
    code, out, err = worked["cli"]["wrong"]
    assert code == 1
    assert " sad and multiply  " in out
    lines = [line.partition(": IMAD")[0] for line in err.splitlines()]
    archs = ARCHS_OF[worked["kernels"]]
    assert lines == [f"error: sad and multiply, sm_{sm}: multiplies data" for sm in archs]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("none", "error: --kernel 'sat M=1': no kernel's name contains it; nearest: sad M=1\n"),
        ("unwritable", "File exists\n"),
    ],
)
def test_mistakes_with_kernels(worked: dict[str, Any], command: str, message: str) -> None:
    code, out, err = worked["cli"][command]
    assert (code, out) == (2, "")
    assert err.endswith(message)
    assert err.count("\n") == 1


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bitnet", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize(("arch", "nearest"), [("sm_91", "sm_90"), ("90", "sm_90"), ("", "sm_")])
def test_unknown_archs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arch: str, nearest: str
) -> None:
    code, _, err = run(monkeypatch, capsys, "inspect", "kernels", "--arch", arch)
    assert code == 2
    assert err.startswith(
        f"error: --arch: {arch!r} is none of sm_80, sm_89, sm_90, sm_100; did you mean {nearest}"
    )


def test_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    spec: Any = Stand()
    if os.environ.get("TRITON_INTERPRET") == "1":
        code, _, err = run(monkeypatch, capsys, "inspect", "kernels")
        assert (code, err) == (
            2,
            "error: TRITON_INTERPRET=1 leaves nothing to compile: unset it\n",
        )
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1 leaves nothing to compile"):
            compile_spec(spec, 90)
    monkeypatch.setitem(sys.modules, "triton", None)
    code, _, err = run(monkeypatch, capsys, "inspect", "kernels")
    assert (code, err) == (2, "error: inspecting kernels needs Triton, which is not installed\n")
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        compile_spec(spec, 90)


def test_help_teaches_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(monkeypatch, capsys, "inspect", "--help")
    assert code == 0
    for part in ("CONFIG.toml", "SECTION.KEY=VALUE", "kernels", "15m.toml"):
        assert part in text
    code, text, _ = run(monkeypatch, capsys, "inspect", "kernels", "--help")
    assert code == 0
    for part in ("--arch", "--kernel", "--sass", "--csv", "sm_100", "Example"):
        assert part in text


def test_a_config_needs_no_command_but_may_have_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "15m.toml")
    short = run(monkeypatch, capsys, "inspect", config, "model.depth=8")
    assert short[0] == 0
    assert "15m: settings" in short[1]
    assert run(monkeypatch, capsys, "inspect", "config", config, "model.depth=8") == short


def test_opcodes_in_words() -> None:
    opcodes = ["FMUL.FTZ", "FMUL", "IMAD", "IMAD", "IMAD", "MUFU.RCP"]
    assert counted(opcodes) == "FMUL.FTZ x1, FMUL x1, IMAD x3, MUFU.RCP x1"
    assert shortened(opcodes) == "IMAD x3, FMUL x2, ..."
    assert counted([]) == shortened([]) == "0"
