"""HaloNet (arXiv 2103.12731) in JAX and Flax."""

__version__ = "0.1.0"
