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
    "detection": ({"ops", "models"}, {"jax", "flax", "numpy"}),
    "errors": (set(), set()),
    "config": ({"errors", "ops", "models"}, ANY_LIBRARY),
    "data": ({"errors"}, ANY_LIBRARY),
    "runtime": ({"errors", "config", "STARTED"}, ANY_LIBRARY),
    "training": ({"errors", "config", "runtime"}, ANY_LIBRARY),
    "tasks": ({"errors", "config", "ops", "models", "detection", "data", "runtime", "training"}, ANY_LIBRARY),
    "costs": ({"errors", "config", "ops", "models", "data", "training", "tasks"}, ANY_LIBRARY),
    "weights": ({"errors", "config", "models", "runtime", "training", "tasks"}, ANY_LIBRARY),
    "exporting": ({"errors", "config", "models", "detection", "data", "runtime", "training", "tasks", "weights"}, ANY_LIBRARY),
    "evaluating": ({"errors", "config", "data", "runtime", "training", "tasks", "weights", "exporting"}, ANY_LIBRARY),
    "studies": ({"errors", "config", "models", "data", "runtime", "training", "tasks", "costs"}, ANY_LIBRARY),
    "command_line": ({"errors", "runtime"}, ANY_LIBRARY),
    "attention_maps": ({"errors", "ops", "models", "weights"}, ANY_LIBRARY),
    "detection_pictures": ({"errors", "data"}, ANY_LIBRARY),
    "predicting": ({"errors", "data", "runtime", "training", "weights", "attention_maps", "detection_pictures"}, ANY_LIBRARY),
    "predict": ({"errors", "data", "runtime", "training", "weights", "predicting", "command_line"}, ANY_LIBRARY),
    "demo_viewers": ({"errors", "data", "weights", "attention_maps", "detection_pictures", "predicting"}, ANY_LIBRARY),
    "demo": ({"errors", "runtime", "weights", "demo_viewers", "command_line"}, ANY_LIBRARY),
    "starting": ({"errors", "training", "weights"}, ANY_LIBRARY),
    "train": ({"errors", "config", "data", "runtime", "training", "tasks", "command_line", "weights", "starting"}, ANY_LIBRARY),
    "evaluate": ({"errors", "runtime", "tasks", "command_line", "exporting", "evaluating"}, ANY_LIBRARY),
    "export": ({"errors", "runtime", "tasks", "command_line", "weights", "exporting"}, ANY_LIBRARY),
    "study": ({"errors", "runtime", "studies", "command_line"}, ANY_LIBRARY),
    "summary": ({"errors", "config", "models", "costs", "tasks", "weights", "command_line"}, ANY_LIBRARY),
    "__init__": ({"weights"}, set()),
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
