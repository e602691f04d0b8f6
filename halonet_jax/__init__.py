"""HaloNet (arXiv 2103.12731) in JAX and Flax."""

import os
import time

__version__ = "0.1.0"
STARTED = time.monotonic()  # about when the process did

# TensorFlow comes in late, for TFDS and TensorBoard alone; it would print a page of notices about oneDNN and AVX.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# OpenCV's remarks on damaged files: the loader names the file itself.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")


def load(path, *args, **kwargs):
    """Loads trained weights with everything that is needed to use them: `halonet_jax.weights.load`."""
    from halonet_jax import weights  # late: it imports JAX, which workers that only read images do without

    return weights.load(path, *args, **kwargs)
