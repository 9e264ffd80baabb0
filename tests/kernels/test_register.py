"""The one way to register an operator: which implementation runs, and what torch sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_kernels import available
from bitnet_kernels.ops.register import register

PACKAGE = Path(available.__file__).parent

RAN: list[str] = []


def twice(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    RAN.append("reference")
    return (2 * x).t().contiguous().t(), x + n


def twice_cpu(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    RAN.append("cpu")
    return (x + x).t().contiguous().t(), x + n


def twice_cuda(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    RAN.append("cuda")
    return x + x, x + n


def twice_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


OPERATORS = {
    "all": register("test_all", twice, cpu=twice_cpu, cuda=twice_cuda, fake=twice_fake),
    "no cpu": register("test_no_cpu", twice, cuda=twice_cuda, fake=twice_fake),
    "reference": register("test_reference", twice, fake=twice_fake),
}


@pytest.mark.parametrize(
    ("name", "triton", "ran"),
    [
        ("all", False, "cpu"),
        ("all", True, "cuda"),
        ("no cpu", False, "reference"),
        ("no cpu", True, "cuda"),
        ("reference", False, "reference"),
        ("reference", True, "reference"),
    ],
)
def test_which_implementation_runs(
    name: str, triton: bool, ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "triton_by_default", lambda device: triton)
    RAN.clear()
    x = torch.randn(3, 4)
    for got, want in zip(OPERATORS[name](x, 5), (2 * x, x + 5), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()
    assert [ran] == RAN


@pytest.mark.parametrize("name", OPERATORS)
def test_what_torch_sees(name: str) -> None:
    operator = OPERATORS[name]
    x = torch.randn(3, 4)
    torch.library.opcheck(operator, (x, 5))  # type: ignore[arg-type]
    compiled = torch.compile(lambda x: operator(x.sin(), 5), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), operator(x.sin(), 5), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="have no backward"):
        operator(x.requires_grad_(), 5)[0].sum().backward()


def test_the_interpreter_runs_only_by_name() -> None:
    pytest.importorskip("triton")
    cpu = torch.device("cpu")
    assert not available.takes_triton("auto", cpu)
    assert not available.takes_triton("reference", cpu)
    assert available.takes_triton("sad", cpu)  # TRITON_INTERPRET=1, see conftest.py


def test_old_gpus_take_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "triton_installed", lambda: True)
    gpu = torch.device("cuda")
    for capability, fits in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert available.triton_by_default(gpu) == fits
        assert available.takes_triton("auto", gpu) == fits
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match="kernel: 'sad' needs compute capability"):
        available.takes_triton("sad", gpu)


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("torch.library.custom_op(", "ops/register.py"),
        ("register_autograd", "ops/register.py"),
        ('find_spec("triton")', "available.py"),
        ("torch._int_mm(", "cpu/int_mm.py"),
    ],
)
def test_one_place_for_each(what: str, place: str) -> None:
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in files if what in (PACKAGE / name).read_text()} == {place}
