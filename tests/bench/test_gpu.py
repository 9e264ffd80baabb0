"""The benchmark's GPU side, with stand-ins for CUDA, NVML and gemlite, none of which is here."""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bitnet_kernels.bench import contenders as contending
from bitnet_kernels.bench import machine, timing, verify


def test_a_gpus_limits_are_those_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 SXM as CUDA describes it: 3.35 TB/s; 989 dense 16-bit Tflop/s at 1.83 GHz."""
    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        clock_rate=1_830_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    found = machine.describe(torch.device("cuda"))
    assert found.bandwidth == pytest.approx(3.35e12, rel=1e-3)
    assert found.ops_16bit == pytest.approx(989e12, rel=1e-3)
    assert found.ops_int8 == pytest.approx(1979e12, rel=1e-3)
    assert found.cache_bytes == 50 * 2**20
    assert found.slug == "nvidia-h100-80gb-hbm3"
    assert found.threads is None
    h100.major, h100.memory_clock_rate = 12, 0  # a GPU that is not in the table, clock not told
    later = machine.describe(torch.device("cuda"))
    assert (later.bandwidth, later.ops_16bit, later.ops_int8) == (None, None, None)


def test_a_graph_holds_whole_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy is called before the capture, none of them for the first time within it."""
    calls: list[tuple[int, bool]] = []
    capturing: list[bool] = []
    replays: list[str] = []

    class Graph:
        def replay(self) -> None:
            replays.append("replay")

    @contextlib.contextmanager
    def graph(made: Graph) -> Iterator[None]:
        capturing.append(True)
        yield
        capturing.clear()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda entered: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: None,
        "Event": lambda enable_timing: SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.25
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def call(i: int) -> Tensor:
        calls.append((i, bool(capturing)))
        return torch.tensor(i)

    backend = timing.CudaBackend()
    recorded = backend.record(call, 3, 4)
    assert recorded.calls == 6
    assert calls == [(i, False) for i in range(3)] + [(i, True) for i in (0, 1, 2, 0, 1, 2)]
    assert recorded.output().item() == 2
    assert backend.seconds(recorded.run) == 0.25e-3
    assert replays == ["replay"]
    # 0.25 ms for a trial of 3 calls: 12 calls make a millisecond
    assert timing.record(call, 3, backend).calls == 12


def test_the_meter_finds_its_gpu_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetClockInfo=lambda handle, kind: 1755,
        NVML_CLOCK_SM=1,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    properties = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    meter, why = machine.find_meter(torch.device("cuda"))
    assert meter is not None
    assert (asked, why, meter.clock_mhz()) == (["GPU-1234-abcd"], "", 1755)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    meter, why = machine.find_meter(torch.device("cuda"))
    assert meter is None
    assert "pip install nvidia-ml-py" in why
    assert machine.find_meter(torch.device("cpu")) == (None, "")


def test_gemlite_is_called_by_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of gemlite 0.6: ternary floats and a scale in, a layer out."""

    class Processor:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def from_weights(self, weight: Tensor, weight_scale: Tensor) -> torch.nn.Module:
            assert weight.dtype == torch.bfloat16
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(weight * weight_scale.item())
            return layer

    helper = SimpleNamespace(A16W158_INT=Processor)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)  # type: ignore[arg-type]
    p = contending.make_problem(70, 130, 3, torch.device("cpu"))
    build = contending._layers("bf16", contending._gemlite("A16W158_INT"))
    theirs = contending.Contender(
        "gemlite", "other", "A16W158_INT", "linear", "bf16", 2, 0.01, build
    )
    with torch.no_grad():
        assert verify.Judge(p).check(theirs, build(p, 2)(1)).startswith("rel ")
