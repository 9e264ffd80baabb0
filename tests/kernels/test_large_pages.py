"""Memory in large pages: contents and addresses stay the same, and the system's count rises."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch

from bitnet.engine.decoder import Decoder
from bitnet.model import ModelConfig, Transformer
from bitnet_kernels.cpu import native, pages

MB = 2**20


def in_large_pages(tensor: torch.Tensor) -> int:
    """Bytes in large pages, by the kernel's count, of the mappings that hold a tensor."""
    begin, total, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            first, last = (int(part, 16) for part in line.split(" ")[0].split("-"))
            inside = first < begin + tensor.nbytes and begin < last
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


def system_can() -> bool:
    """Whether the system collapses 2 MB of a mapping that this function makes."""
    if not sys.platform.startswith("linux"):
        return False
    area = mmap.mmap(-1, 4 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touched = torch.frombuffer(area, dtype=torch.uint8).fill_(1)
    at = -(-touched.data_ptr() // (2 * MB)) * 2 * MB
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(at), ctypes.c_size_t(2 * MB), 25) == 0


@pytest.mark.parametrize("sizes", [(16 * MB,), (3 * MB + 5, 1, 70_001, 9 * MB), (9 * MB, 0)])
def test_contents_and_addresses_stay(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(256, (n,), generator=generator, dtype=torch.int64).to(torch.uint8)
        for n in sizes
    ]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    pages.use_large_pages([*tensors, tensors[0][3:]])  # views and repeats are no mistake
    for tensor, (at, copy) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == at
        assert torch.equal(tensor, copy)


@pytest.mark.skipif(not system_can(), reason="this system has no large pages to give")
def test_large_tensors_lie_in_large_pages() -> None:
    tensor = torch.ones(24 * MB, dtype=torch.uint8)
    pages.use_large_pages([tensor])
    assert in_large_pages(tensor) >= 20 * MB


@pytest.mark.skipif(not system_can(), reason="this system has no large pages to give")
@pytest.mark.skipif(native.library() is None, reason="needs the native library")
def test_a_decoders_keys_and_values_lie_in_large_pages() -> None:
    shape = ModelConfig(d_model=64, n_layers=2, n_heads=1, d_ff=64, vocab_size=9, max_seq_len=4096)
    decoder = Decoder(Transformer(shape.resolve()), 8, 4096, cache_dtype="fp32")
    assert decoder._state.kv.nbytes > 32 * MB
    assert in_large_pages(decoder._state.kv) >= 28 * MB


@pytest.mark.skipif(not system_can(), reason="this system has no large pages to give")
def test_little_is_left_alone() -> None:
    area = mmap.mmap(-1, 6 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(area, dtype=torch.uint8).fill_(1)
    before = in_large_pages(tensor)
    pages.use_large_pages([tensor])
    assert in_large_pages(tensor) == before


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], []),
        ([(5, 6), (1, 2), (2, 4)], [(1, 4), (5, 6)]),
        ([(1, 9), (2, 3), (9, 10)], [(1, 10)]),
    ],
)
def test_neighbours_are_one_range(
    spans: list[tuple[int, int]], merged: list[tuple[int, int]]
) -> None:
    assert pages._merged(spans) == merged
