"""The benchmarks run, give ratios of what is there, and tell what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"} | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "",
}
ATTENTION = "bench_attention.py --repeats=2 --layers=h1s4 --batch=2 --map_size=6 --operator --cases=reference,timm"
MODEL = "bench_model.py --repeats=2 --stage_sizes=1,1,1,1 --batch=1 --image_size=32 --cases=timm"
INPUT = "bench_input.py --rounds=2 --images=8 --batch=4 --image_size=32 --randaugment"


@pytest.mark.parametrize(
    "command, expected, absent",
    [
        (ATTENTION, {"halonet_jax reference", "halonet_jax einsum_cpu"}, "timm"),
        (MODEL, {"halonet_jax auto"}, "timm"),
        (INPUT, {"halonet_jax"}, "tf.data"),
    ],
    ids=("attention", "model", "input"),
)
def test_benchmark(command, expected, absent, tmp_path):
    for peer in ("torch", "tensorflow"):
        (tmp_path / f"{peer}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{peer}'\")\n")
    script, *flags = command.split()
    out = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / script, *flags, f"--json={tmp_path / 'times.json'}"],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"| {absent}" in out and "No module named 'torch'; pip install" in out
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    measured = {r["case"] for r in results if r["seconds"]}
    assert expected <= measured and not any(absent in name for name in measured)
    for r in results:
        assert (r["reason"] == "") == (len(r["seconds"]) == 2)
        assert r["ratio"] is None or r["ratio"] > 0
        assert r["ratio"] == 1 or r["case"] not in ("halonet_jax", "halonet_jax auto")


def test_floors_need_no_timing():
    command = [sys.executable, ROOT / "scripts" / "bench" / "bench_attention.py", "--floors=v5e", "--layers=h7s1", "--batch=16"]
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert out.count("| h7s1 |") == 2
