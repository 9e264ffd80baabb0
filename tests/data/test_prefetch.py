"""Batches come one step ahead, unchanged and in order, and the thread ends with the block."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitnet.data.prefetch import Batch, Prefetcher
from bitnet.schema import UserError

CPU = torch.device("cpu")


def batch(step: int) -> Batch:
    tokens = torch.randint(100, (2, 5), generator=torch.Generator().manual_seed(step))
    return tokens, tokens + 1


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_batches_are_those_of_their_steps() -> None:
    with Prefetcher(batch, CPU, 3, 40) as batches:
        for step in range(3, 40):
            for part, expected in zip(batches.take(step), batch(step), strict=True):
                assert torch.equal(part, expected)


def test_the_next_batch_is_made_while_a_step_runs_and_none_past_the_last() -> None:
    made: list[int] = []
    arrived = threading.Event()

    def make(step: int) -> Batch:
        made.append(step)
        if step == 2:
            arrived.set()
        return batch(step)

    with Prefetcher(make, CPU, 0, 3) as batches:
        batches.take(0)
        batches.take(1)
        assert arrived.wait(60)  # nobody has taken step 2
        batches.take(2)
    assert made == [0, 1, 2]


def test_a_step_waits_only_for_what_making_takes_longer() -> None:
    def make(step: int) -> Batch:
        time.sleep(0.3)
        return batch(step)

    with Prefetcher(make, CPU, 0, 3) as batches:
        batches.take(0)
        time.sleep(0.5)
        batches.take(1)
        hidden = batches.waited
        batches.take(2)
        shown = batches.waited
    assert hidden < 0.1 < 0.2 < shown


def test_an_error_comes_at_its_step_and_not_before() -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise UserError("the disk is gone")
        return batch(step)

    def steps() -> None:
        with Prefetcher(make, CPU, 0, 5) as batches:
            for step in range(5):
                batches.take(step)
                done.append(step)

    done: list[int] = []
    with pytest.raises(UserError, match="the disk is gone"):
        steps()
    assert done == [0, 1]


def test_a_finished_run_makes_nothing() -> None:
    def make(step: int) -> Batch:
        raise AssertionError(f"step {step} was made")

    with Prefetcher(make, CPU, 7, 7):
        pass


def test_the_block_ends_by_an_error_with_a_batch_half_made() -> None:
    entered, go = threading.Event(), threading.Event()

    def make(step: int) -> Batch:
        entered.set()
        assert go.wait(60)
        return batch(step)

    def fail() -> None:
        with Prefetcher(make, CPU, 0, 5):
            assert entered.wait(60)
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    time.sleep(0.1)  # the timer's own thread ends


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu() -> None:
    pinned: list[bool] = []

    class Watched(Prefetcher):
        def _made(self, step: int) -> Batch:
            made = super()._made(step)
            pinned.extend(part.is_pinned() for part in made)
            return made

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    seen: list[Tensor] = []
    with Watched(batch, device, 0, 20) as batches:
        for step in range(20):
            seen.extend(batches.take(step))
    expected = [part for step in range(20) for part in batch(step)]
    assert all(part.device == device for part in seen)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(seen, expected, strict=True))
    assert all(pinned)
