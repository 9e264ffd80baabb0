"""Run the whole suite as other machines would: instruction sets and thread counts, in a loop.

    make test-machines                       # all environments: over an hour on two cores
    make test-machines ENVS="avx2 threads2"  # some of them

Each row of the table, also written to ``runs/test-machines.csv``, is one run of pytest under
variables that tell torch, oneDNN and MKL to leave instructions aside. A run that takes longer than
``LIMIT`` is ended, and the next one begins. Not a test module.

torch names the instructions that it takes, so a row that it cannot honour says so. oneDNN and MKL
do not: their rows are marked, and may repeat ``plain`` (MKL heeds its variable on Intel CPUs only).
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path("runs/test-machines.csv")
ENVIRONMENTS = {
    "plain": {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl-sse42": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "no-avx512": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "threads2": {"BITNET_TEST_THREADS": "2"},
    "threads3": {"BITNET_TEST_THREADS": "3"},
}
LIMIT = 3600  # seconds per run
UNVERIFIED = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"


def unavailable(variables: dict[str, str]) -> bool:
    """Whether torch takes other instructions here than the variables ask for."""
    wanted = variables.get("ATEN_CPU_CAPABILITY")
    if wanted is None:
        return False
    command = [sys.executable, "-c", CAPABILITY]
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    return run.stdout.strip() != wanted


def run_suite(variables: dict[str, str], log: Path, limit: float = LIMIT) -> int | None:
    """Run pytest with its output in ``log``; returns its exit status, None if it took longer than
    ``limit`` seconds and was killed with all its processes."""
    pytest = str(Path(sys.executable).with_name("pytest"))
    command = [pytest, "-q", "-n", "auto", "--dist", "worksteal"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def count(summary: str, what: str) -> int:
    """The number before ``what`` in pytest's last line."""
    found = re.search(rf"(\d+) {what}", summary)
    return int(found[1]) if found else 0


def measure(name: str) -> tuple[str, int, int, int, str, str]:
    """One row of the table; the output of a run that did not pass stays in runs/."""
    variables, start = ENVIRONMENTS[name], time.perf_counter()
    unverified = " ".join(variable for variable in UNVERIFIED if variable in variables)
    if unavailable(variables):
        return name, 0, 0, 0, "not available on this CPU", unverified
    log = RESULTS.with_name(f"test-machines-{name}.txt")
    status = run_suite(variables, log)
    summary = log.read_text().strip().rpartition("\n")[2]
    failed = count(summary, "failed") + count(summary, "error")
    seconds = round(time.perf_counter() - start)
    result = "passed" if status == 0 else f"exit {status}"
    if status is None:
        result = f"timed out after {LIMIT} s"
    if status == 0:
        log.unlink()
    return name, count(summary, "passed"), failed, seconds, result, unverified


def main(names: list[str]) -> int:
    """Run the suite in each environment; 1 if one of them did not pass."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"error: ENVS: {unknown[0]!r}; expected some of {', '.join(ENVIRONMENTS)}")
        return 2
    RESULTS.parent.mkdir(exist_ok=True)
    header = ("environment", "passed", "failed", "seconds", "result", "unverified")
    line = "{:14} {:>7} {:>7} {:>8}  {:26} {}"
    print(line.format(*header), flush=True)
    worst = 0
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for name in names or ENVIRONMENTS:
            row = measure(name)
            worst |= row[4] not in ("passed", "not available on this CPU")
            table.writerow(row)
            file.flush()
            print(line.format(*row), flush=True)
    print(f"torch {torch.__version__}; also in {RESULTS}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
