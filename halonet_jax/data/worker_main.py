"""What a data worker runs in place of the program's main module: it imports Grain without JAX.

Grain imports JAX for its profiler alone and does without where it is absent. In each worker that would cost seconds and
memory. A source that needs JAX can import it later.
"""

import sys

from absl import logging

_verbosity = logging.get_verbosity()
_absent = "jax" not in sys.modules
try:
    if _absent:
        sys.modules["jax"] = None
        logging.set_verbosity(logging.FATAL)  # Grain warns that it has no profiler
    import grain  # noqa: F401
finally:
    if _absent:
        del sys.modules["jax"]
        logging.set_verbosity(_verbosity)
