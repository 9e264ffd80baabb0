"""The whole suite as other machines would run it: instruction sets and thread counts, in a loop.

    make test-machines                       # all of them: over an hour on two cores
    make test-machines ENVS="avx2 threads2"  # some of them

Each row of the table, also written to ``runs/test-machines.csv``, is one run of pytest under
variables that tell torch, oneDNN and MKL to leave instructions aside. Not a test module.
"""

import csv
import os
import re
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
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"


def unavailable(variables: dict[str, str]) -> bool:
    """Whether torch takes other instructions here than those that are asked for."""
    wanted = variables.get("ATEN_CPU_CAPABILITY")
    if wanted is None:
        return False
    command = [sys.executable, "-c", CAPABILITY]
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    return run.stdout.strip() != wanted


def count(output: str, what: str) -> int:
    """Of pytest's last line."""
    found = re.findall(rf"(\d+) {what}", output.splitlines()[-1] if output else "")
    return int(found[0]) if found else 0


def main(names: list[str]) -> int:
    """Run the suite in each environment; 1 if one of them did not pass."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"error: ENVS: {unknown[0]!r}; expected some of {', '.join(ENVIRONMENTS)}")
        return 2
    RESULTS.parent.mkdir(exist_ok=True)
    print(f"{'environment':14} {'passed':>7} {'failed':>7} {'seconds':>8}  result", flush=True)
    worst = 0
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["environment", "passed", "failed", "seconds", "result"])
        for name in names or ENVIRONMENTS:
            variables, start = ENVIRONMENTS[name], time.perf_counter()
            if unavailable(variables):
                row = [name, 0, 0, 0, "not available on this CPU"]
            else:
                pytest = str(Path(sys.executable).with_name("pytest"))
                command = [pytest, "-q", "-n", "auto", "--dist", "loadfile"]
                run = subprocess.run(
                    command, env=os.environ | variables, capture_output=True, text=True
                )
                output = run.stdout.strip()
                failed = count(output, "failed") + count(output, "error")
                seconds = round(time.perf_counter() - start)
                result = "passed" if run.returncode == 0 else f"exit {run.returncode}"
                row = [name, count(output, "passed"), failed, seconds, result]
                if run.returncode:
                    worst = 1
                    RESULTS.with_name(f"test-machines-{name}.txt").write_text(output + run.stderr)
            table.writerow(row)
            file.flush()
            print("{:14} {:7} {:7} {:8}  {}".format(*row), flush=True)
    print(f"torch {torch.__version__}; also in {RESULTS}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
