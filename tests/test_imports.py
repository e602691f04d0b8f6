"""Imports point one way, so that each layer can be read, and used, without those above it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "halonet_jax"
ANY_LIBRARY = None
# Layer: the layers of this project that it may import, and the libraries beside Python's own (None: any).
RULES = {
    "ops": (set(), {"jax", "numpy"}),
    "models": ({"ops", "models"}, {"jax", "flax", "numpy"}),
    "data": ({"data"}, ANY_LIBRARY),
    "training": ({"training", "STARTED"}, ANY_LIBRARY),
    "config": ({"models"}, ANY_LIBRARY),
    "analysis": ({"ops", "models", "training", "analysis"}, ANY_LIBRARY),
    "tasks": ({"ops", "models", "data", "training", "config", "tasks"}, ANY_LIBRARY),
    "command_line": ({"config", "data", "training"}, ANY_LIBRARY),
    "workdir": ({"config", "training"}, ANY_LIBRARY),
    "train": ({"config", "data", "training", "tasks", "analysis", "command_line", "workdir"}, ANY_LIBRARY),
    "evaluate": ({"config", "data", "training", "tasks", "analysis", "command_line", "workdir"}, ANY_LIBRARY),
    "__init__": (set(), set()),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    layers, libraries = RULES[layer]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "halonet_jax":
            assert rest.split(".")[0] in layers | {layer, "__version__"}, f"{layer} must not import {name}"
        else:
            assert top not in ("configs", "scripts", "tests"), f"{layer} must not import {name}"
            assert libraries is None or top in libraries | sys.stdlib_module_names, f"{layer} must not need {name}"
