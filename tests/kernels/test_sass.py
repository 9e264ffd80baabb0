"""The ahead-of-time inspector on snippets of SASS: its parsing, its loops, and the data it finds.

The snippets and the expected answers are written by hand. ``test_sass_kernels.py`` tests what it
counts and what it reports on compiled kernels.
"""

import pytest

from bitnet_kernels.sass import Instruction, Loop, loops, main_loop, multipliers, parse

HEADER = '.section .text.k,"ax",@progbits\nk:\n.text.k:\n'


def listing(text: str) -> str:
    """A listing as nvdisasm writes it, from one instruction or ``label:`` a line."""
    lines, address = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(f".{line}")
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return HEADER + "\n".join(lines) + "\n"


def code_of(text: str) -> list[Instruction]:
    return parse(listing(text))


def sorted_out(text: str) -> tuple[list[str], list[str], list[str]]:
    """Destinations of the multipliers of straight code: on data, moving data, on addresses."""
    code = code_of(text)
    found = multipliers(code, Loop(frozenset(range(len(code)))))
    on_data, moving, addresses = ([one.operands[0] for one in kind] for kind in found)
    return on_data, moving, addresses


def test_a_listing_is_parsed() -> None:
    code = code_of("""
        LDC R1, c[0x0][0x28]
        @!P0 BRA `(.L_x_1)
        LDG.E.EF.128 R4, desc[UR6][R2.64+0x10]
        L_x_1:
        @UP1 LOP3.LUT P0, RZ, R4.reuse, 0x40, RZ, 0xc0, !PT
        SHFL.BFLY PT, R3, R2, 0x1, 0x1f
        NOP
    """)
    assert [one.opcode for one in code] == [
        "LDC", "BRA", "LDG.E.EF.128", "LOP3.LUT", "SHFL.BFLY", "NOP",
    ]  # fmt: skip
    assert code[0].operands == ("R1", "c[0x0][0x28]")
    assert (code[1].guard, code[1].target, code[0].guard, code[0].target) == ("!P0", 0x30, "", None)
    assert code[2].operands == ("R4", "desc[UR6][R2.64+0x10]")
    assert code[2].is_weight_load
    assert code[2].access_bits == 128
    assert code[3].guard == "UP1"
    assert code[3].operands == ("P0", "RZ", "R4.reuse", "0x40", "RZ", "0xc0", "!PT")
    assert (code[3].base, code[3].modifiers, code[3].address) == ("LOP3", ("LUT",), 0x30)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.EF.64", 64),
        ("LDG.E.U8", 8),
        ("LDG.E.S16.CONSTANT", 16),
        ("LDG.E.ENL2.256", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),  # LTC128B is a cache hint
        ("LDSM.16.MT88.4", 128),
        ("LDSM.16.M88", 32),
    ],
)
def test_an_opcode_tells_its_access_width(opcode: str, bits: int) -> None:
    assert Instruction(0, "", opcode, (), None).access_bits == bits


@pytest.mark.parametrize(
    ("opcode", "is_one"),
    [
        ("IMMA.16832.S8.S8.SAT", True),
        ("HMMA.16816.F32", True),
        ("IGMMA.64x8x32.S8.S8", True),
        ("UTCIMMA", True),
        ("HFMA2.MMA", False),
        ("IMAD", False),
    ],
)
def test_an_opcode_tells_whether_it_is_a_tensor_cores(opcode: str, is_one: bool) -> None:
    assert Instruction(0, "", opcode, (), None).is_tensor_core is is_one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "without instructions"),
        (listing("NOP") + listing("NOP"), "more than one function"),
    ],
)
def test_listings_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_indirect_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="indirect branch at 0x10"):
        loops(code_of("NOP\nBRX R4 -0x80\nEXIT"))


def loop_addresses(text: str) -> list[list[int]]:
    """Of every loop, the line numbers of its instructions in the snippet, labels not counted."""
    return sorted(sorted(loop.body) for loop in loops(code_of(text)))


def test_loops_nested_and_one_after_the_other() -> None:
    text = """
        MOV R1, RZ
        outer:
        MOV R2, RZ
        inner:
        IADD3 R2, R2, 0x1, RZ
        @P0 BRA `(.inner)
        IADD3 R1, R1, 0x1, RZ
        BRA.U !UP0, `(.outer)
        second:
        IADD3 R3, R3, 0x1, RZ
        @!P1 BRA `(.second)
        EXIT
        forever:
        BRA `(.forever)
        NOP
    """
    assert loop_addresses(text) == [[1, 2, 3, 4, 5], [2, 3], [6, 7]]


def test_code_moved_out_of_line_is_no_loop_but_part_of_one() -> None:
    """The block behind EXIT jumps backward into the middle of a loop, and another one to straight
    code; with two branches to one head there is one loop."""
    text = """
        @P3 BRA `(.rare_start)
        back_start:
        MOV R1, RZ
        head:
        LDG.E R4, [R2.64]
        @P0 BRA `(.rare)
        back:
        IADD3 R1, R1, R4, RZ
        @P2 BRA `(.head)
        @P1 BRA `(.head)
        EXIT
        rare:
        MOV R4, RZ
        BRA `(.back)
        rare_start:
        MOV R2, RZ
        BRA `(.back_start)
    """
    assert loop_addresses(text) == [[2, 3, 4, 5, 6, 8, 9]]


def test_main_loop_is_the_one_with_the_most_weights() -> None:
    """Not the remainder's, not the outer one; of equals the shorter; where nothing loads weights
    that with the most tensor-core instructions; without a loop everything."""
    text = """
        LDG.E.EF.128 R4, [R2.64]
        outer:
        MOV R1, RZ
        unrolled:
        LDG.E.EF.128 R4, [R2.64]
        LDG.E.EF.128 R8, [R2.64+0x200]
        @P0 BRA `(.unrolled)
        masked:
        ISETP.LT.AND P3, PT, R1, 0x10, PT
        @P3 LDG.E.EF.128 R4, [R2.64]
        @P3 LDG.E.EF.128 R8, [R2.64]
        @P0 BRA `(.masked)
        remainder:
        LDG.E.EF.128 R4, [R2.64]
        @P0 BRA `(.remainder)
        activations:
        LDG.E.128 R4, [R2.64]
        LDG.E.128 R4, [R2.64]
        LDG.E.128 R4, [R2.64]
        @P0 BRA `(.activations)
        @P1 BRA `(.outer)
        EXIT
    """
    assert sorted(main_loop(code_of(text)).body) == [2, 3, 4]
    text = """
        copy:
        LDGSTS.E.128 [R5], [R2.64]
        @P0 BRA `(.copy)
        multiply:
        IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4
        @P0 BRA `(.multiply)
        EXIT
    """
    assert sorted(main_loop(code_of(text)).body) == [2, 3]
    everything = main_loop(code_of("LDG.E.EF.128 R4, [R2.64]\nEXIT"))
    assert everything == Loop(frozenset({0, 1}), looped=False)


def test_vector_loads_fill_all_their_registers() -> None:
    assert sorted_out("""
        LDG.E.128 R4, [R2.64]
        LDS.64 R12, [R1]
        LDSM.16.M88.2 R16, [R1]
        LDC.64 R20, c[0x0][0x210]
        IMAD R30, R3, R9, RZ
        IMAD R31, R4, R9, RZ
        IMAD R32, R9, R7.reuse, RZ
        IMAD R33, R8, R9, RZ
        IMAD R34, R13, R9, RZ
        IMAD R35, R14, R9, RZ
        IMAD R36, R17, -R9, RZ
        IMAD R37, R18, R9, RZ
        IMAD R38, R21, R20, RZ
        IMAD R39, |R6|, R9, RZ
    """) == (
        ["R31", "R32", "R34", "R36", "R39"],
        [],
        ["R30", "R33", "R35", "R37", "R38"],
    )


def test_what_multiplies_and_what_moves() -> None:
    """R4 is data; R2 is none. Only integer units move, and only by powers of two up to sign."""
    assert sorted_out("""
        LDG.E R4, [R2.64]
        IMAD.MOV.U32 R30, RZ, RZ, R4
        IMAD.SHL.U32 R31, R4, 0x4, RZ
        IMAD.IADD R32, R4, 0x1, R2
        IMAD R33, R4, -0x80000000, R2
        IMAD.U32 R34, R4, 0x10000, RZ
        IMAD.IADD R35, R2, 0x1, -R4
        IMAD R36, R2, R3, R4
        IMAD R37, R4, -0x2, R2
        IMAD R40, R4, 0x5, R2
        IMAD R41, R4, c[0x0][0x160], R2
        IMAD R42, R4, R3, RZ
        IMAD.HI.U32 R43, R3, R4, RZ
        FMUL R44, R4, 2
        FFMA.FTZ R45, R3, R4, RZ
        MUFU.RCP R46, R4
        IDP.4A.U8.S8 R47, R4, 0x1010101, R2
        HFMA2.BF16_V2 R48, R4, 1, 1, R2
        DMUL R50, R2, R4
        IMAD R52, R4, 0xfffffffb, R2
        IMAD.WIDE R54, R2, 0x4, R6
        HFMA2.MMA R56, -RZ, RZ, 0, 5.9604644775390625e-08
        MUFU.RCP R57, R2
        IADD3 R58, R4, R4, R4
        VABSDIFF4.U8.ACC R59, R4, R4, R4
        FADD R60, R4, R4
    """) == (
        ["R40", "R41", "R42", "R43", "R44", "R45", "R46", "R47", "R48", "R50", "R52"],
        ["R30", "R31", "R32", "R33", "R34", "R35", "R36", "R37"],
        ["R54", "R56", "R57"],
    )


def test_a_constant_in_a_register_shifts_as_one_in_the_instruction() -> None:
    """R4 is data. A register counts where every path moves such a constant into it, and nothing
    that is unknown writes it on the way."""
    text = """
        LDG.E R4, [R2.64]
        MOV R10, 0x4
        IMAD.MOV.U32 R11, RZ, RZ, 0x8
        UMOV UR5, 0x2
        MOV R12, 0x5
        MOV R13, R10
        IMAD.WIDE R30, R4, R10, UR38
        IMAD R32, R4, -R11, RZ
        IMAD R33, R4.reuse, UR5, RZ
        IMAD R34, R4, R12, RZ
        IMAD R35, R4, R13, RZ
        IMAD R36, R4, R9, RZ
        FMUL R37, R4, R10
        @P0 MOV R10, 0x3
        IMAD R38, R4, R10, RZ
        @P0 MOV R11, 0x10
        IMAD R39, R4, R11.reuse, RZ
        @P0 MOV R9, 0x4
        IMAD R40, R4, R9, RZ
        MOV R14, 0x4
        head:
        IMAD R41, R4, R14, RZ
        IMAD R42, R4, R11, RZ
        IADD3 R14, R14, R2, RZ
        @P1 BRA `(.head)
        CALL.REL.NOINC `(.function)
        IMAD R43, R4, R11, RZ
        EXIT
        function:
        IMAD R44, R4, R11, RZ
        MOV R11, 0x3
        RET.REL.NODEC R20 `(k)
    """
    on_data, moving, _ = sorted_out(text)
    assert moving == ["R30", "R32", "R33", "R39", "R42"]
    assert on_data == ["R34", "R35", "R36", "R37", "R38", "R40", "R41", "R43", "R44"]


def test_local_memory_is_data_once_data_was_stored_there() -> None:
    """A spilled address is none, also where it is read back in a loop; anything is, after data."""
    assert sorted_out("""
        STL [R1], R2
        LDL.LU R10, [R1]
        IMAD R30, R10, R9, RZ
        LDG.E R4, [R6.64]
        LDL R11, [R1+0x4]
        IMAD R31, R11, R9, RZ
        STL.64 [R1+0x8], R4
        LDL R12, [R1]
        IMAD R32, R12, R9, RZ
        STL [R1], R2
        LDL.64 R14, [R1]
        IMAD R33, R15, R9, RZ
    """) == (["R32", "R33"], [], ["R30", "R31"])
    for store in ("STL [R4], R2", "@P0 STL [R1], R4", "ST.E [R2.64], R4"):
        on_data, _, _ = sorted_out(f"""
            LDG.E R4, [R2.64]
            {store}
            LDL R10, [R1]
            IMAD R30, R10, R9, RZ
        """)
        assert on_data == ["R30"], store


def test_tensor_cores_always_multiply_data() -> None:
    on_data, _, _ = sorted_out("""
        IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4
        IGMMA.64x16x32.S8.S8 R24, gdesc[UR4], R24, gsb0
        UTCIMMA gdesc[UR12], gdesc[UR4], tmem[UR15], tmem[UR10], idesc[UR11], UP1
        IMAD R40, R7, R2, RZ
        IMAD R41, R8, R2, RZ
        IMAD R42, R31, R2, RZ
        IMAD R43, R32, R2, RZ
    """)  # four registers a lane of a warp's 16 x 8; eight of a warpgroup's 64 x 16
    assert on_data == ["R4", "R24", "gdesc[UR12]", "R40", "R42"]


def test_data_passes_through_every_kind_of_register() -> None:
    assert sorted_out("""
        LDG.E R4, [R2.64]
        R2UR UR4, R4
        R2UR UR5, R2
        UIADD3 UR6, UR4, 0x1, URZ
        UIMAD UR7, UR6, UR9, URZ
        UIMAD UR8, UR5, UR9, URZ
        ISETP.GE.AND P0, PT, R4, RZ, PT
        ISETP.GE.AND P1, PT, R2, RZ, PT
        SEL R10, R2, R3, P0
        SEL R11, R2, R3, P1
        IMAD R30, R10, R9, RZ
        IMAD R31, R11, R9, RZ
        PLOP3.LUT P2, P3, P0, P1, PT, 0x80, 0x0
        @P3 MOV R12, R2
        IMAD R32, R12, R9, RZ
        P2R R13, PR, RZ, 0x7f
        IMAD R33, R13, R9, RZ
        SHFL.BFLY PT, R14, R4, 0x1, 0x1f
        IMAD R34, R14, R9, RZ
        LOP3.LUT P4, R15, R4, 0x1, RZ, 0xc0, !PT
        IMAD R35, R15, R9, RZ
        IMAD.WIDE.U32 R16, R4, 0x4, R2
        IMAD R36, R17, R9, RZ
        VOTE.ANY R18, PT, P0
        IMAD R37, R18, R9, RZ
        PRMT R19, R2, 0x5410, R4
        IMAD R38, R19, R9, RZ
        REDUX.SUM UR10, R4
        IMAD R39, R2, UR10, RZ
        ATOMG.E.ADD.STRONG.GPU PT, R20, [R2.64], R3
        IMAD R40, R20, R9, RZ
        R2P PR, R4, 0x7f
        @P6 MOV R21, R2
        IMAD R41, R21, R9, RZ
    """) == (
        ["UR7", "R30", "R32", "R33", "R34", "R35", "R36", "R37", "R38", "R39", "R40", "R41"],
        ["R16"],
        ["UR8", "R31"],
    )


def test_registers_stop_being_data_where_they_are_written_anew() -> None:
    """Only by an instruction that is executed for certain; carries and second predicates are
    written as well, sources are not."""
    assert sorted_out("""
        LDG.E.128 R4, [R2.64]
        MOV R4, R2
        IMAD R30, R4, R9, RZ
        @P0 MOV R5, R2
        IMAD R31, R5, R9, RZ
        CS2R R6, SRZ
        IMAD R32, R6, R7, RZ
        LDG.E R8, [R2.64]
        ISETP.NE.AND P1, P2, R8, RZ, PT
        IADD3 R10, P1, P2, R2, R3, RZ
        @P1 MOV R11, R2
        IMAD R33, R11, R9, RZ
        ISETP.NE.AND P1, PT, R8, RZ, PT
        VOTE.ANY R12, PT, P1
        @P1 MOV R13, R2
        IMAD R34, R13, R9, RZ
        STG.E [R2.64], R8
        IMAD R35, R8, R9, RZ
        R2P PR, R2, 0x7f
        @P1 MOV R14, R2
        IMAD R36, R14, R9, RZ
    """) == (["R31", "R34", "R35"], [], ["R30", "R32", "R33", "R36"])


def test_unknown_opcodes_err_on_the_side_of_data() -> None:
    """A register behind a predicate may be an output or a source, and a predicate behind a register
    as well: data goes in and out either way, and nothing stops being data that was."""
    on_data, _, _ = sorted_out("""
        LDG.E R4, [R2.64]
        NEWTEST P0, R4, R2
        @P0 MOV R10, R2
        IMAD R30, R10, R9, RZ
        NEWOP P1, R11, R4
        IMAD R31, R11, R9, RZ
        NEWTEST P2, R4, R2
        IMAD R32, R4, R9, RZ
        NEWOP R12, P0, R2
        IMAD R33, R12, R9, RZ
        F2F.F32.F64 R3, R20
        IMAD R34, R4, R9, RZ
        NEWFMA4 R35, R4, R9, R9
    """)
    assert on_data == ["R30", "R31", "R32", "R33", "R34", "R35"]


def test_data_follows_the_flow_of_control() -> None:
    """Loaded before the loop, or at its end for the next pass; joined from branches; gone where
    every path has written the register anew; in and out of a function."""
    text = """
        LDG.E R10, [R2.64]
        MOV R11, RZ
        MOV R12, RZ
        head:
        IMAD R30, R10, R9, RZ
        IMAD R31, R11, R9, RZ
        IMAD R32, R12, R9, RZ
        @P0 BRA `(.else)
        LDG.E R13, [R2.64]
        BRA `(.join)
        else:
        MOV R13, R2
        MOV R12, R2
        join:
        IMAD R33, R13, R9, RZ
        CALL.REL.NOINC `(.function)
        IMAD R34, R15, R9, RZ
        LDG.E R11, [R2.64]
        @P1 BRA `(.head)
        IMAD R35, R11, R9, RZ
        EXIT
        function:
        IADD3 R15, R13, R2, RZ
        RET.REL.NODEC R20 `(k)
    """
    code = code_of(text)
    loop = main_loop(code)
    found = multipliers(code, loop)
    assert [one.operands[0] for one in found.on_data] == ["R30", "R31", "R33", "R34"]
    assert [one.operands[0] for one in found.on_addresses] == ["R32"]
