"""Every function of every instruction set equals plain C: on this CPU, on an emulated one, under
sanitizers. ``tests/native/`` holds the references; ``.ci/run`` installs the compilers."""

import platform
import sys
from pathlib import Path

import pytest

from bitnet_kernels.cpu import native
from tests.helpers.installs import LIBRARY, ROOT, copy_source, run
from tests.helpers.native_checks import compile_native, needs, run_checks

OPERATORS = (
    "tests/kernels/test_native_products.py",
    "tests/kernels/test_native_rows.py",
    "tests/kernels/test_ops_training.py",
)
NATIVE = (
    "native_step or a_row_is_a_step or neighbouring or next_to_nothing or one_column or rows_do"
)
STEPS = ("tests/engine/test_decoder.py", "tests/engine/test_decoder_rows.py", "-k", NATIVE)
"""Steps and prefills in each dtype of head and cache."""
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # beside other tests, on two cores


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_each_instruction_set_of_this_cpu(compiler: str, tmp_path: Path) -> None:
    needs(compiler)
    found = run_checks(compile_native(tmp_path / "check", compiler, "-O3"), 1000)
    assert found == [*native.available(), "threads"]


def test_neon_in_an_emulator(tmp_path: Path) -> None:
    needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
    program = compile_native(tmp_path / "check", "aarch64-linux-gnu-gcc", "-O3", "-static")
    assert run_checks(program, 1000, "qemu-aarch64") == ["neon", "portable", "threads"]


def test_neon_by_clang_in_an_emulator(tmp_path: Path) -> None:
    """It takes intrinsics and targets in other words than gcc."""
    needs("clang", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    clang = ("clang", "--target=aarch64-linux-gnu", "-O2", "-static")
    program = compile_native(tmp_path / "check", *clang)
    assert run_checks(program, 100, "qemu-aarch64") == ["neon", "portable", "threads"]


def test_no_access_or_operation_is_undefined(tmp_path: Path) -> None:
    needs("gcc")
    program = compile_native(tmp_path / "check", "gcc", "-O1", *SANITIZE)
    assert run_checks(program, 300) == [*native.available(), "threads"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs ThreadSanitizer on x86-64")
def test_no_two_threads_race(tmp_path: Path) -> None:
    needs("gcc")
    program = compile_native(tmp_path / "check", "gcc", "-O1", "-fsanitize=thread")
    assert run_checks(program, 30) == [*native.available(), "threads"]


@pytest.mark.parametrize("tests", [OPERATORS, STEPS], ids=["operators", "steps"])
def test_runs_clean_under_sanitizers(tests: tuple[str, ...], tmp_path: Path) -> None:
    """The tests that compare the operators, and the decoder's steps and prefills, with the
    reference, on a library with AddressSanitizer and UndefinedBehaviorSanitizer, which end the
    process at the first finding."""
    needs("gcc")
    source = copy_source(tmp_path)
    library = source / "kernels" / LIBRARY
    compile_native(library, "gcc", "-O1", *SANITIZE, "-shared", "-fPIC", checks=False)
    environment = {
        "PYTHONPATH": f"{source / 'kernels'}:{ROOT}",
        "LD_PRELOAD": run("gcc", "-print-file-name=libasan.so", cwd=tmp_path).strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has allocated
    }
    show = "from bitnet_kernels.cpu import native; print(native.library()._name)"
    used = run(sys.executable, "-c", show, cwd=tmp_path, **environment)
    assert used.strip() == str(library)
    pytest_ = Path(sys.executable).with_name("pytest")
    # What reads the machine code would find the sanitizers' own.
    skipped = ("--deselect", f"{OPERATORS[0]}::test_addsub_multiplies_nothing")
    options = ("-q", "-p", "no:cacheprovider", *skipped)
    run(pytest_, *options, *tests, cwd=ROOT, **environment)
