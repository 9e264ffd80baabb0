"""Give every test the same seeds and threads, no network and no accounts.

The environment is set here, before torch, Triton or a tracker is imported, and holds for child
processes too.
"""

import ipaddress
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

THREADS = int(os.environ.setdefault("BITNET_TEST_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# torch's cache of compiled graphs does not know the vector width: bitnet.training.step.compiled.
os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = os.environ.get("ATEN_CPU_CAPABILITY", "")
os.environ["HF_HUB_OFFLINE"] = "1"  # a missing network is otherwise retried for 23 s
os.environ["WANDB_MODE"] = "offline"
os.environ["NETRC"] = os.devnull  # where wandb finds a key
for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)
NOWHERE = ("127.0.0.1", 9)  # nobody listens there, so a child process that asks the net fails
for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
    os.environ[name] = f"http://{NOWHERE[0]}:{NOWHERE[1]}"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers.shared import Shared, shared_folder  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # run Triton's kernels on the CPU


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test begins with the same random state and thread count, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    if address == NOWHERE:
        return False
    host = address[0] or "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that talks to another machine fails, even where the code under test carries on."""
    attempts: list[Any] = []
    connect, connect_ex, getaddrinfo = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def check(address: Any) -> None:
        if not _is_local(address):
            attempts.append(address)
            raise OSError(f"tests have no network: {address}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check((host,))
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    assert not attempts, f"the test tried to reach {attempts}"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Shared:
    """Returns the folder of a name, which ``make(folder)`` fills once per run of the tests."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker's folder, inside that of the run
        root = root.parent
    return partial(shared_folder, root / "shared")


@pytest.fixture
def bitnet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the bitnet command with these words in this process; returns exit code, stdout and
    stderr."""
    from bitnet.cli import main as cli  # here, since not every test needs it

    def run(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnet", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        assert isinstance(sys.stderr, TextIOWrapper)
        sys.stderr.reconfigure(errors="backslashreplace")  # as a program has it; capsys has not
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run
