"""The house rules that no linter knows: who imports whom, and what an import may not do.

The arrows are read from syntax trees, so an import inside a function counts like any other.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest

from bitnet.qat.quantizers import WEIGHT_QUANTIZERS
from tests.helpers.source_trees import (
    FILES,
    MODULES,
    ROOT,
    imports,
    nodes,
    our_imports,
    root_of,
    source,
    tree,
)

ABOVE = ("bitnet", "bitnet.__main__", "bitnet.cli", "train")
"""What no module of the library may import: `bitnet` itself gathers the public names."""
SHARED_BY_COMMANDS = {f"bitnet.cli.{name}" for name in ("shell", "lazy", "common", "bench_common")}
"""What commands and train.py may import of the command line: no command imports another, so that
each loads only what it needs (bitnet/cli/lazy.py)."""
ARROWS = {
    "bitnet_kernels.packing": {"bitnet_kernels.checks"},
    "bitnet_kernels.reference": {"bitnet_kernels.packing"},
    "bitnet_kernels.cpu.training": {"bitnet_kernels.cpu.native", "bitnet_kernels.reference"},
    "bitnet_kernels.cpu.gradients": {
        "bitnet_kernels.cpu.int_mm",
        "bitnet_kernels.cpu.native",
        "bitnet_kernels.cpu.training",
        "bitnet_kernels.reference",
    },
    "bitnet_kernels.cpu.int_mm": {
        "bitnet_kernels.cpu.native",
        "bitnet_kernels.cpu.ternary",
        "bitnet_kernels.cpu.training",
        "bitnet_kernels.reference",
    },
    "bitnet_kernels.ops.register": {"bitnet_kernels.available", "bitnet_kernels.checks"},
    "bitnet.schema": set[str](),
    "bitnet.quant": {"bitnet_kernels"},
    "bitnet.elementwise": {"bitnet_kernels"},
    "bitnet.placement": set[str](),
    "bitnet.modules": {"bitnet.placement"},
    "bitnet.gathered": {"bitnet_kernels", "bitnet.quant"},
    "bitnet.bitlinear": {
        "bitnet_kernels",
        "bitnet.elementwise",
        "bitnet.gathered",
        "bitnet.modules",
        "bitnet.placement",
        "bitnet.quant",
        "bitnet.sharded",
    },
    "bitnet.sharded": {"bitnet_kernels", "bitnet.gathered", "bitnet.quant"},
    "bitnet.dequantized": set[str](),
    "bitnet.packed": {"bitnet_kernels", "bitnet.quant"},
    "bitnet.linear": {
        "bitnet_kernels",
        "bitnet.bitlinear",
        "bitnet.dequantized",
        "bitnet.elementwise",
        "bitnet.modules",
        "bitnet.packed",
        "bitnet.placement",
        "bitnet.quant",
    },
    "bitnet.loss": {"bitnet_kernels", "bitnet.modules", "bitnet.quant", "bitnet.sharded"},
    "bitnet.model": {"bitnet.elementwise", "bitnet.linear", "bitnet.loss", "bitnet.quant"},
}
"""The foundations may import this and bitnet.schema; what stands above them is bound by ABOVE and
by having no cycles."""

QUANTIZERS = {"none", "absmax", "static", *WEIGHT_QUANTIZERS}


def test_every_module_is_found() -> None:
    assert {"bitnet", "bitnet.linear", "bitnet.export.folder", "train"} <= set(MODULES)
    assert {"bitnet_kernels", "bitnet_kernels.packing", "bitnet_kernels.gpu.gemm"} <= set(MODULES)


@pytest.mark.parametrize("module", ARROWS)
def test_arrows_of_the_foundations(module: str) -> None:
    allowed = ARROWS[module] | {"bitnet.schema"}
    for name in our_imports(module):
        assert name in allowed or root_of(name) in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_of_all(module: str) -> None:
    names = our_imports(module)
    if root_of(module) == "bitnet_kernels":
        assert {root_of(name) for name in names} <= {"bitnet_kernels"}
        outside = {root_of(name) for name, _ in imports(module)} - set(sys.stdlib_module_names)
        assert outside <= {"bitnet_kernels", "torch", "triton"}
    if module == "bitnet.config":  # composes the dataclasses, each owned by its own module
        pattern = r"^class (\w+Config|Recipe)\b"
        owners = {name for name in FILES if re.search(pattern, source(name), re.M)}
        readers = {"bitnet.data.tokenizer_json", "bitnet.export.folder"}  # of a saved model's
        assert names <= owners | {"bitnet.schema", *readers}
    if module.startswith("bitnet.training."):
        assert "bitnet.config" not in names
    if module == "bitnet.training.step":  # any model, wrapped or not
        assert "bitnet.model" not in names
    if module == "train" or module.startswith("bitnet.cli"):
        commands = {name for name in names if name.startswith("bitnet.cli.")} - SHARED_BY_COMMANDS
        assert not commands | (names & {"train"}), f"{module} imports {commands}"
    elif module != "bitnet.__main__":
        above = {name for name in names if name in ABOVE or name.startswith("bitnet.cli.")}
        assert not above, f"{module} imports {above}"


def test_no_cycles() -> None:
    """Depth first; a module met again on its own path closes a cycle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in our_imports(module):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports(module: str) -> None:
    """Each is declared in pyproject.toml, an extra's (and wandb, Triton) only inside functions.
    Nothing imports `kernels`, which is a folder here and another project's package elsewhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        distributions = {re.split(r"[\s<>=!~;\[]", text)[0].lower() for text in requirements}
        return {name.replace("-", "_") for name in distributions}

    core = names(project["dependencies"])
    extras = set[str]().union(
        *(names(extra) for extra in project["optional-dependencies"].values())
    )
    ours = {"bitnet", "bitnet_kernels"}
    renamed = {"llama_cpp": "llama_cpp_python"}
    for name, inside in imports(module):
        package = renamed.get(root_of(name), root_of(name))
        assert package != "kernels"
        if package in sys.stdlib_module_names or package in ours:
            continue
        if module.startswith("bitnet_kernels.gpu.") and package == "triton":
            continue
        assert package in core | extras, f"{name} is not declared in pyproject.toml"
        if package in {"wandb", "triton"} or package not in core:
            assert inside, f"{name} must be imported inside the function that needs it"


def test_no_test_imports_a_test_module() -> None:
    """Fixtures that files share are in a conftest.py, functions in tests/helpers/."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                assert not re.match(r"(tests\.)?(\w+\.)*test_", name), f"{path}: imports {name}"


def test_kernels_is_a_folder_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_loaded_may_execute_code(module: str) -> None:
    assert not {"pickle", "marshal", "shelve", "dill"} & {
        root_of(name) for name, _ in imports(module)
    }
    for node, _ in nodes(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "torch.save"}, called
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords)


@pytest.mark.parametrize("module", MODULES)
def test_quantizers_are_asked_not_named(module: str) -> None:
    """A recipe's quantizers answer for themselves: their names are compared where they are read."""
    if module == "bitnet.qat.recipe":
        return
    for node, _ in nodes(tree(module)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            recipes = {ast.unparse(side) for side in sides if isinstance(side, ast.Attribute)}
            named = {text.rpartition(".")[2] for text in recipes} & {"weights", "activations"}
            strings = set(re.findall(r"'(\w+)'", ast.unparse(node)))
            where = f"{FILES[module].name}:{node.lineno}: {ast.unparse(node)}"
            assert not (named and strings & QUANTIZERS), where


def text_without_encoding(node: ast.Call) -> bool:
    """Whether a call opens text in whatever encoding the locale has."""
    called, arguments = ast.unparse(node.func), [ast.unparse(one) for one in node.args]
    given = {one.arg: ast.unparse(one.value) for one in node.keywords}
    name = called.rpartition(".")[2]
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):  # where it is an argument without a name
        return len(arguments) <= (name == "write_text")
    if given.get("text") == "True" or given.get("universal_newlines") == "True":
        return True
    if name not in ("open", "fdopen") or called == "os.open":
        return False
    modes = [
        one for one in [*arguments, given.get("mode", "")] if re.fullmatch("'[rwxabt+]+'", one)
    ]
    return not any("b" in one for one in modes)


@pytest.mark.parametrize("module", MODULES)
def test_text_names_its_encoding(module: str) -> None:
    """The locale's may be ASCII, and a file of ours must read the same on every machine."""
    for node, _ in nodes(tree(module)):
        if isinstance(node, ast.Call):
            where = f"{FILES[module].name}:{node.lineno}: {ast.unparse(node)}"
            assert not text_without_encoding(node), where


@pytest.mark.parametrize(
    "code",
    [
        "open(x)",
        "open(x, 'w', newline='')",
        "path.open()",
        "os.fdopen(1, mode='a')",
        "gzip.open(x, 'rt')",
        "path.read_text()",
        "path.read_text(errors='replace')",
        "path.write_text('utf-8')",
        "subprocess.run(x, text=True)",
        "Popen(x, universal_newlines=True)",
    ],
)
def test_text_without_its_encoding_is_found(code: str) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert text_without_encoding(call)


@pytest.mark.parametrize("module", MODULES)
def test_annotations_are_complete(module: str) -> None:
    for node, _ in nodes(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{FILES[module].name}:{node.lineno} {node.name}"
            assert node.returns is not None, f"{where}: no return type"
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            arguments += [star for star in (given.vararg, given.kwarg) if star is not None]
            for argument in arguments:
                typed = argument.annotation is not None or argument.arg in ("self", "cls")
                assert typed, f"{where}: {argument.arg} has no type"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module: str) -> None:
    def check(node: ast.Module | ast.ClassDef) -> None:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if not child.name.startswith("_"):
                assert ast.get_docstring(child), f"{FILES[module].name}:{child.lineno} {child.name}"
                if isinstance(child, ast.ClassDef):
                    check(child)

    assert ast.get_docstring(tree(module)) or not source(module).strip(), "no module docstring"
    check(tree(module))


IMPORT_ALL = """
import importlib, json, os, socket, sys

first, ours, blocked, root = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None  # importing it raises
for name in first:
    importlib.import_module(name)
import torch

def forbid(what):
    def forbidden(*args, **kwargs):
        raise AssertionError(f"{what} at import")
    return forbidden

inner = {function.__code__.co_filename for function in (os.getenv, os.environ.get)}
class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while (file := frame.f_code.co_filename) in inner:
            frame = frame.f_back
        if file.startswith(root) and "site-packages" not in file:
            raise AssertionError(f"{file} reads the environment at import: {key}")
        return super().__getitem__(key)

before = dict(os.environ)
os.environ.__class__ = Watched
socket.socket = socket.create_connection = socket.getaddrinfo = forbid("network")
torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = forbid("CUDA")
torch.cuda.get_device_capability = torch.cuda.get_device_name = forbid("CUDA")
state = torch.get_rng_state()
for name in ours:
    importlib.import_module(name)
os.environ.__class__ = Watched.__base__
assert dict(os.environ) == before, "the environment was changed"
assert torch.equal(state, torch.get_rng_state()), "random numbers were drawn"
assert not torch.cuda.is_initialized()
print(json.dumps(sorted(sys.modules)))
"""


def import_all(ours: list[str], blocked: list[str]) -> set[str]:
    """Import modules in a separate process; returns the names of all that were loaded."""
    third_party = {
        name
        for module in ours
        for name, inside in imports(module)
        if not inside and root_of(name) not in {"bitnet", "bitnet_kernels"}
    }
    argument = json.dumps([sorted(third_party), ours, blocked, str(ROOT)])
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stdout))


def test_imports_touch_nothing_and_need_no_triton() -> None:
    """Neither CUDA, the environment, the network nor the random state; wandb and the extras'
    packages are not there at all."""
    ours = [module for module in MODULES if not module.startswith("bitnet_kernels.gpu.")]
    absent = ["triton", "wandb", "datasets", "transformers", "pyarrow", "gguf", "matplotlib"]
    assert set(ours) <= import_all(ours, absent)


def test_triton_files_touch_nothing_either() -> None:
    pytest.importorskip("triton")
    gpu = [module for module in MODULES if module.startswith("bitnet_kernels.gpu.")]
    assert set(gpu) <= import_all(gpu, [])


def test_a_program_hears_ctrl_c_before_torch_is_imported() -> None:
    """What stands before ``start()`` in the bitnet command and in train.py loads nothing slow."""
    code = "import sys, bitnet.__main__; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    loaded = {root_of(name) for name in child.stdout.split()}
    assert not loaded & {"torch", "numpy", "typer", "rich", "sentencepiece"}
    for module in ("bitnet.__main__", "train"):
        assert next(name for name, _ in imports(module)) == "bitnet.cli.shell"


def test_importing_the_packages_loads_nothing_heavy() -> None:
    """Triton takes half a second to import, wandb one."""
    loaded = {root_of(name) for name in import_all(["bitnet", "bitnet_kernels"], [])}
    assert not loaded & {"triton", "wandb", "datasets", "transformers", "pyarrow", "matplotlib"}
