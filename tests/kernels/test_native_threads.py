"""The native library runs on torch's own threads, on the number set in torch, and on one after a
fork."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet_kernels.cpu import native, ternary
from bitnet_kernels.packing import pack_ternary
from bitnet_kernels.reference import int8_matmul
from tests.helpers.scripts import run_script

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="counts threads in /proc, which only Linux has"
)
# Of a child: operands, their product by the library, and how many threads the process has.
CHILD = """
import json, os, sys
import torch
from bitnet_kernels.cpu import native, ternary
from bitnet_kernels.packing import pack_ternary

generator = torch.Generator().manual_seed(0)
x_q = torch.randint(-127, 128, (9, 1000), generator=generator, dtype=torch.int8)
codes = torch.randint(-1, 2, (301, 1000), generator=generator, dtype=torch.int8)
packed = pack_ternary(codes)

def product():
    outputs = [ternary.matmul(x_q, packed, None, addsub) for addsub in (False, True)]
    return [output.numpy().tobytes() for output in outputs]

def threads():
    return len(os.listdir("/proc/self/task"))
"""
COUNT = """
from torch import nn
from bitnet.model import ModelConfig, Transformer
from bitnet.linear import pack
from bitnet.generate import generate

counts = {}
torch.set_num_threads(1)
before = threads()
expected = product()
counts["native on 1"] = threads() - before
torch.set_num_threads(3)
assert product() == expected
counts["native on 3"] = threads() - before
large = torch.randn(1000, 1000)
(large @ large).exp().sum()
counts["torch on 3"] = threads() - before
shape = {"depth": 2, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512}
model = Transformer(ModelConfig(**shape, vocab_size=300, max_seq_len=256))
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(300, (8, 257))
model(tokens[:, :-1], tokens[:, 1:]).backward()
optimizer.step()
counts["a training step"] = threads() - before
generate(pack(model), [[1, 2, 3], [4]], 4)
counts["generation"] = threads() - before
assert product() == expected
counts["native again"] = threads() - before
torch.set_num_threads(1)
assert product() == expected
print(json.dumps(counts))
"""
FORK = """
import multiprocessing

def child():
    same, alone = product() == expected, threads() == 1
    if os.fork() == 0:
        os._exit(0 if product() == expected else 1)
    return same and alone and os.wait()[1] == 0

torch.set_num_threads(2)
before = threads()
expected = product()
assert threads() == before + 1
if os.fork() == 0:
    os._exit(0 if child() else 1)
assert os.wait()[1] == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.apply(child)
assert product() == expected  # the parent still has its threads
"""
LOAD_IN_CHILD = """
torch.set_num_threads(2)
before = threads()
torch.ones(1_000_000).exp()
assert threads() == before + 1
if os.fork() == 0:
    os._exit(0 if product() and threads() == 1 else 1)
assert os.wait()[1] == 0
"""


def operands(m: int = 9, n: int = 301, k: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Random x_q ``[M, K]``, packed weights, and their exact product ``[M, N]``."""
    x_q = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    return x_q, pack_ternary(codes), int8_matmul(x_q, codes)


@needs_proc
def test_the_library_and_torch_share_one_pool_of_threads() -> None:
    """One thread makes no other; three make two, which torch then uses, too."""
    counts = json.loads(run_script(CHILD + COUNT))
    assert counts.pop("native on 1") == 0
    assert counts == dict.fromkeys(counts, 2)


@needs_proc
@pytest.mark.parametrize("source", [FORK, LOAD_IN_CHILD], ids=["used", "not used"])
def test_a_forked_child_runs_alone_and_ends(source: str) -> None:
    """By os.fork, multiprocessing and a fork of the fork, after the library or torch ran on two
    threads, of which the child has none."""
    command = [sys.executable, "-c", CHILD + source]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr


def test_several_python_threads_call_at_once() -> None:
    torch.set_num_threads(2)
    x_q, packed, expected = operands()

    def call(i: int) -> bool:
        return torch.equal(ternary.matmul(x_q, packed, None, addsub=i % 2 == 0), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


@pytest.fixture
def busy() -> Iterator[None]:
    """Every CPU has another process to run."""
    count = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("busy")
def test_more_threads_than_cpus_end_beside_busy_processes() -> None:
    """Each call has a barrier, at which a thread that has no CPU is waited for."""
    torch.set_num_threads(2 * (os.cpu_count() or 1))
    x_q, packed, expected = operands(m=40)
    for _ in range(50):
        assert torch.equal(ternary.matmul(x_q, packed, None, addsub=False), expected)
