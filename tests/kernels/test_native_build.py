"""The native library is built where possible, refused if it does not fit, and never required."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_kernels.cpu import native
from tests.helpers.installs import (
    COMPILER,
    LIBRARY,
    ROOT,
    build,
    copy_source,
    install,
    new_environment,
    run,
)
from tests.helpers.shared import Shared

NOT_BUILT = "the native CPU library was not built at installation (no C compiler?)"
DAMAGED = (
    "the native CPU library is damaged, or of another machine or version; reinstall the package"
)
USE = """
import json, sys
from pathlib import Path

import torch

import bitnet_kernels
from bitnet.generate import generate
from bitnet.linear import pack
from bitnet.model import ModelConfig, Transformer
from bitnet_kernels.cpu import native

torch.manual_seed(0)
shape = {"depth": 2, "d_model": 24, "n_heads": 2, "n_kv_heads": 1, "d_ff": 37}
model = Transformer(ModelConfig(**shape, vocab_size=300, max_seq_len=32))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
tokens = torch.randint(300, (4, 17))
losses = []
for _ in range(10):
    loss = model(tokens[:, :-1], tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
packed = pack(model)
with torch.no_grad():
    equal = torch.equal(model(tokens), packed(tokens))
print(json.dumps({
    "package": str(Path(bitnet_kernels.__file__).parent),
    "native": native.available(),
    "missing": native.missing(),
    "learned": losses[-1] < losses[0],
    "equal": equal,
    "new": generate(packed, [[1, 2, 3]], 5, temperature=0.0),
}))
"""


def use(python: str | Path, cwd: Path, **env: str) -> dict[str, object]:
    """Train, pack and generate, and say which library did it."""
    return json.loads(run(python, "-c", USE, cwd=cwd, **env))


def works(used: dict[str, object], package: Path, missing: str) -> None:
    """All that a user does works, from the package that was installed there."""
    assert used["package"] == str(package)
    assert used["missing"] == missing
    assert bool(used["native"]) == (not missing)
    assert used["learned"]
    assert used["equal"]
    (new,) = used["new"]  # type: ignore[misc]
    assert len(new) == 5


@pytest.fixture(scope="session")
def sdist(shared: Shared) -> Path:
    """The source distribution of the working tree."""
    (found,) = shared("dist", build).glob("*.tar.gz")
    return found


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Makes an executable shell script and returns its path."""

    def make(text: str) -> str:
        path = tmp_path / "cc"
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return str(path)

    return make


def install_into(folder: Path, sdist: Path, **env: str) -> None:
    """``pip install --target``, which is quicker than a new environment."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", folder)
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", sdist, cwd=sdist.parent, **env)


def test_without_a_compiler_everything_is_installed_and_works(sdist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install_into(site, sdist, CC=str(tmp_path / "no-compiler"))
    assert not list(site.rglob("*.so"))
    used = use(sys.executable, tmp_path, PYTHONPATH=str(site))
    works(used, site / "bitnet_kernels", NOT_BUILT)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["copied", "editable"])
@pytest.mark.parametrize("built", [False, True], ids=["no compiler", "compiler"])
def test_a_checkout_is_installed(editable: bool, built: bool, tmp_path: Path) -> None:
    """By pip, from the folder: what README.md says. Without a compiler on the PATH, with one."""
    source, python = copy_source(tmp_path), new_environment(tmp_path / "env")
    env = {} if built else {"PATH": str(python.parent)}
    install(python, *(["-e"] if editable else []), source, **env)
    at = source / "kernels" if editable else Path(used_site(python))
    assert (at / LIBRARY).exists() == (built and COMPILER is not None)
    missing = "" if built and COMPILER else NOT_BUILT
    works(use(python, tmp_path), at / "bitnet_kernels", missing)


def used_site(python: Path) -> str:
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return run(python, "-c", show, cwd=python.parent).strip()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*", "*avx512.c*"], ids=["nothing", "VNNI"])
def test_a_compiler_that_fails_is_no_compiler(
    pattern: str, script: Callable[[str], str], sdist: Path, tmp_path: Path
) -> None:
    """One that compiles nothing; one that does not know VNNI, as gcc before version 8."""
    site, real = tmp_path / "site", COMPILER or "false"
    install_into(site, sdist, CC=script(f"case $* in {pattern}) exit 1;; esac; exec {real} $*"))
    used = use(sys.executable, tmp_path, PYTHONPATH=str(site))
    works(used, site / "bitnet_kernels", NOT_BUILT)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang (Debian: apt install clang)")
def test_clang_builds_the_library(sdist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install_into(site, sdist, CC="clang", LDSHARED="clang -shared")
    works(use(sys.executable, tmp_path, PYTHONPATH=str(site)), site / "bitnet_kernels", "")


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A copy of the kernels' package, library included, where nothing may be written."""
    copy = tmp_path / "site" / "bitnet_kernels"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels" / "bitnet_kernels", copy, ignore=ignored)
    folders = [path for path in (copy.parent, *copy.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    yield copy
    for folder in folders:
        folder.chmod(stat.S_IRWXU)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


@pytest.mark.skipif(native.library() is None, reason=native.missing())
def test_two_processes_use_a_read_only_package_at_once(package: Path, tmp_path: Path) -> None:
    """Root may write anywhere, so the files are compared, too."""
    before = listing(package)
    env = os.environ | {"PYTHONPATH": f"{package.parent}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", USE]
    both = [
        subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for one in both:
        out, _ = one.communicate(timeout=120)
        assert one.returncode == 0
        works(json.loads(out), package, "")
    assert listing(package) == before


LOAD = """
import json, sys
from pathlib import Path

from bitnet_kernels.cpu import native

found = []
for path in sys.argv[1:]:
    native._path = lambda path=path: Path(path)
    native.library.cache_clear()
    found.append((native.library() is None, native.missing(), native.used(), native.available()))
print(json.dumps(found))
"""


@pytest.mark.skipif(native.library() is None, reason=native.missing())
def test_a_library_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """Cut off anywhere, of another machine, of another program, of another version, without a
    function, no file at all. In a process of its own, since a wrong one may end it."""
    good = (ROOT / "kernels" / LIBRARY).read_bytes()
    wrong = {f"cut{at}": good[:at] for at in (0, 1, 63, 64, 200, 4096, len(good) // 2)}
    wrong["text"] = b"not a library\n" * 1000
    wrong["machine"] = good[:18] + b"\xf3" + good[19:]  # RISC-V's number
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
    for name, omitted in (("version", None), ("function", "bn_isa_use")):
        kept = [function for function in native._SIGNATURES if function != omitted]
        source = tmp_path / f"{name}.c"
        source.write_text("\n".join(f"int {function}(void) {{ return 999; }}" for function in kept))
        assert COMPILER is not None
        run(COMPILER, "-shared", "-fPIC", source, "-o", tmp_path / name, cwd=tmp_path)
    paths = [str(tmp_path / name) for name in (*wrong, "version", "function")]
    found = json.loads(run(sys.executable, "-c", LOAD, *paths, cwd=tmp_path))
    for path, one in zip(paths, found, strict=True):
        assert one == [True, DAMAGED, "", []], path


@pytest.fixture
def reloaded() -> Iterator[pytest.MonkeyPatch]:
    """The library is looked up anew, and again when what the test changed is undone."""
    with pytest.MonkeyPatch.context() as changes:
        native.library.cache_clear()
        yield changes
    native.library.cache_clear()
    if native.library() is not None:
        native.use(native.available()[0])


@pytest.mark.skipif(native.library() is None, reason=native.missing())
def test_the_environment_names_the_instruction_set(reloaded: pytest.MonkeyPatch) -> None:
    for name in native.available():
        reloaded.setenv("BITNET_CPU", name)
        native.library.cache_clear()
        assert native.used() == name
    reloaded.setenv("BITNET_CPU", "sse9")
    native.library.cache_clear()
    with pytest.raises(ValueError, match=r"^BITNET_CPU: expected one of .*portable, got 'sse9'$"):
        native.library()


def test_without_a_library_nothing_is_available(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setattr(native, "_path", lambda: None)
    assert native.library() is None
    assert (native.missing(), native.available(), native.used()) == (NOT_BUILT, (), "")
    with pytest.raises(ValueError, match="name: the native CPU library was not built"):
        native.use("portable")
