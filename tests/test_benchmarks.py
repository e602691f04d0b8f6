"""The benchmarks run, give ratios of what is there, and tell what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
ATTENTION = ["bench_attention.py", "--layers=h1s4", "--batch=1", "--map_size=6", "--operator", "--cases=reference,timm"]
MODEL = ["bench_model.py", "--stage_sizes=1,1,1,1", "--batch=2", "--image_size=32", "--cases=timm"]


@pytest.mark.parametrize(
    "command, expected",
    [(ATTENTION, {"halonet_jax reference", "halonet_jax xla"}), (MODEL, {"halonet_jax auto"})],
    ids=("attention", "model"),
)
def test_benchmark(command, expected, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    out = subprocess.run(
        [sys.executable, ROOT / "scripts" / command[0], *command[1:], "--repeats=2", f"--json={tmp_path / 'times.json'}"],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "| timm" in out and "No module named 'torch'; pip install" in out
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    measured = {r["case"] for r in results if r["seconds"]}
    assert expected <= measured and not any("timm" in name for name in measured)
    for r in results:
        assert (r["reason"] == "") == (len(r["seconds"]) == 2)
        assert r["ratio"] is None or r["ratio"] > 0
        assert r["ratio"] == 1 or not r["case"].endswith(" auto")


def test_floors_need_no_timing():
    command = [sys.executable, ROOT / "scripts" / "bench_attention.py", "--floors=v5e", "--layers=h7s1", "--batch=16"]
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert out.count("| h7s1 |") == 2
