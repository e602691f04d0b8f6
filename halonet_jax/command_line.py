"""How every entry starts and how it fails: a wrong input ends in one line that says what to do, not in a traceback."""

import sys
from typing import Callable

from absl import app, flags

from halonet_jax.config import ConfigError
from halonet_jax.data import DataError
from halonet_jax.training import stopping
from halonet_jax.training.checkpoint import CheckpointError


def run(main: Callable[[], int | None], required_flags: tuple[str, ...] = ()) -> None:
    """Parses flags, runs `main` and exits with its code, or with that of the failure (see `training.stopping`)."""
    flags.mark_flags_as_required(required_flags)

    def guarded(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; flags look like --name=value")
        return main()

    try:
        app.run(guarded)
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(_fail(error, stopping.EXIT_BAD_INPUT))
    except stopping.NonFiniteLoss as error:
        sys.exit(_fail(error, stopping.EXIT_NON_FINITE))


def _fail(error, code):
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
