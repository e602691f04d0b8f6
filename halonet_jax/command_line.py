"""What the entries share: a user's mistake ends in one line that says what to do, not in a traceback."""

import logging as python_logging
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from halonet_jax.config import ConfigError
from halonet_jax.data import DataError
from halonet_jax.training import stopping
from halonet_jax.training.checkpoint import CheckpointError


class UsageError(ValueError):
    """Flags that cannot be understood."""


def run(main: Callable[[], int | None], required_flags: tuple[str, ...] = ()) -> None:
    """Parses flags, runs `main` and exits with its code, or with that of the failure (see `training.stopping`)."""

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells much at INFO
            logging.get_absl_handler().setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
        return main()

    try:
        app.run(guarded, flags_parser=lambda argv: _parse(argv, required_flags))
    except (UsageError, ConfigError, DataError, CheckpointError) as error:
        sys.exit(_fail(error, stopping.EXIT_BAD_INPUT))
    except stopping.NonFiniteLoss as error:
        sys.exit(_fail(error, stopping.EXIT_NON_FINITE))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; nothing was saved since the last checkpoint", stopping.EXIT_INTERRUPTED))


def _parse(argv, required_flags):
    """absl's parsing, with one line for each mistake; absl itself prints a page or a traceback for some."""
    try:
        rest = flags.FLAGS(argv)
        for name in required_flags:
            getattr(flags.FLAGS[name].value, "lock", None)  # a config file that is missing fails at first use only
    except flags.Error as error:
        # Of a recipe that raises, absl has the whole traceback as text; of a ConfigError the last line is enough.
        *_, message = str(error).split("halonet_jax.config.ConfigError: ")
        raise UsageError(message.strip()) from None
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"--config cannot be read: {reason}; give a recipe such as configs/digits.py") from None
    except (KeyError, AttributeError) as error:
        if isinstance(error, AttributeError) and error.name == "get_config":
            raise UsageError("--config names a file without get_config(); give a recipe such as configs/digits.py") from None
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # a fault in the recipe's own code: its traceback is what helps
        raise UsageError(f"the config has no key {_unknown_key(error)}") from None
    if len(rest) > 1:
        raise UsageError(f"unknown argument {rest[1]!r}; flags look like --name=value")
    for name in required_flags:
        if flags.FLAGS[name].value is None:
            raise UsageError(f"--{name} is missing: {flags.FLAGS[name].help}")
    return rest


def _unknown_key(error):
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    key, *hint = str(error.args[0]).splitlines()
    return (
        "; ".join([key, *hint]).replace("Did you mean", "did you mean")
        if hint
        else f"{key}; config.py of the package lists all"
    )


def _fail(error, code):
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
