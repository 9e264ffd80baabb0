"""The project's own modules, their source and syntax trees. Not a test module."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root in (ROOT, ROOT / "kernels")
    for package in ("bitnet", "bitnet_kernels")
    for path in sorted((root / package).rglob("*.py"))
} | {"train": ROOT / "train.py"}
MODULES = sorted(FILES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(), FILES[module].name)


def nodes(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it is inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from nodes(child, inside or function)


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """(imported module, inside a function); `from package import module` gives the module."""
    for node, inside in nodes(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            name = str(node.module)
            for alias in node.names:
                full = f"{name}.{alias.name}"
                yield (full if full in FILES else name), inside


def our_imports(module: str) -> set[str]:
    return {name for name, _ in imports(module) if name in FILES}


def root_of(name: str) -> str:
    return name.partition(".")[0]


def source(module: str) -> str:
    return FILES[module].read_text()
