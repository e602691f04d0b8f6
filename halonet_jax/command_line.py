"""Command-line handling that all entries share. A user's mistake ends in one line that says what to do."""

import contextlib
import errno
import logging as python_logging
import math
import os
import select
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging

from halonet_jax import errors
from halonet_jax.runtime import distributed, stopping, storage

_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UsageError(errors.UserError):
    """A flag is unknown, missing or malformed."""


def define_flags() -> None:
    """Defines the flags that all entries share. They say how several processes find each other."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0. TPU slices and Slurm need none: it is found.")
    flags.DEFINE_integer("num_processes", None, "Number of processes of the run. 1: this process runs alone.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    help_text = "Seconds without a heartbeat after which a process counts as lost."
    flags.DEFINE_integer("peer_timeout", distributed.PEER_TIMEOUT, help_text, 1)


def run(
    main: Callable[..., int | None], required_flags: tuple[str, ...] = (), positional: str = "", alone: bool = False
) -> None:
    """Parses flags, runs `main` and exits with its code. After a failure it exits with a code of `runtime.stopping`.

    Args:
        main: the entry. Its own flags must be defined already. It returns an exit code, or None for 0. With `positional`, it
            takes the list of the arguments that are no flags.
        required_flags: names of the flags that must be given.
        positional: what the arguments that are no flags name, such as "image files or folders"; at least one must be given,
            before, after or between flags. "": the entry takes none.
        alone: the entry is one process by itself, even on a cluster: it does not join others.
    """
    if not alone:
        define_flags()

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs a lot at INFO
            logging.get_absl_handler().setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
            _quiet_orbax()
        f = flags.FLAGS
        if not alone:
            distributed.initialize(f.coordinator_address, f.num_processes, f.process_id, f.peer_timeout)
        code = main(argv[1:]) if positional else main()
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk, or a reader that has gone, shows here and not when Python ends
        return code

    code = 0
    try:
        app.run(guarded, flags_parser=lambda argv: _parse(argv, required_flags, positional))
    except SystemExit as done:  # absl always exits this way
        code = done.code or 0
    except errors.UserError as error:
        code = _fail(error, stopping.EXIT_BAD_INPUT)
    except errors.DistributedError as error:
        code = _fail(error, stopping.EXIT_LOST_PEER if error.peer_failed else stopping.EXIT_BAD_INPUT)
    except errors.NonFiniteLoss as error:
        code = _fail(error, stopping.EXIT_NON_FINITE)
    except errors.StorageError as error:
        code = _fail(error, stopping.EXIT_STORAGE)
    except KeyboardInterrupt:
        code = _fail("interrupted; nothing was saved since the last checkpoint", stopping.EXIT_INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        code = _runtime_failure(error)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            code = stopping.EXIT_BROKEN_PIPE  # as of a program that SIGPIPE ends, such as `… | head`
        elif isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
            message = (
                f"a file could not be written ({storage.reason(error)}); the last checkpoint is safe: "
                f"{storage.remedy(error)}, then the same command resumes"
            )
            code = _fail(message, stopping.EXIT_STORAGE)
        else:
            traceback.print_exc()
            code = 1
    if code in (0, stopping.EXIT_INCOMPLETE, stopping.EXIT_PREEMPTED) and jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the others, which end with the same code
    if code:
        # Exit at once: other processes may wait for this one, and a thread may still compile a program.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # nobody reads it; None where it was closed at the start
                stream.flush()
        os._exit(code)


def _reader_has_gone():
    """Whether it is the output that nobody reads any more, not a pipe of the program's own."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # not a file; None where it was closed at the start
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _quiet_orbax():
    """Drops the pages that Orbax and TensorStore print when a checkpoint fails. Our own errors say it in one line."""
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    report = sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else report(args)


def _runtime_failure(error):
    reason = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" in reason:
        remedy = (
            "use more devices or a smaller batch_size, model.remat=True, mesh.fsdp above 1, or optimizer.accumulation_steps"
        )
        return _fail(f"out of device memory: {reason}; {remedy}", stopping.EXIT_BAD_INPUT)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        return _fail(
            f"process {jax.process_index()} lost another one, or the network: {reason}. The last checkpoint is safe; the same "
            "command resumes",
            stopping.EXIT_LOST_PEER,
        )
    traceback.print_exception(error)
    return 1


def _parse(argv, required_flags, positional):
    """Parses flags as absl does, with one line for each mistake. absl prints a page or a traceback for some."""
    if positional:
        flags.FLAGS.set_gnu_getopt()  # otherwise the first argument that is no flag ends the flags
    try:
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            getattr(flags.FLAGS[name].value, "lock", None)  # a missing config file fails only at its first use
    except flags.Error as error:
        # When a recipe raises, absl's message holds the whole traceback. For a ConfigError the last line is enough.
        *_, message = str(error).split("halonet_jax.errors.ConfigError: ")
        raise UsageError(message.strip()) from None
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"--config cannot be read: {reason}; give a recipe such as configs/digits.py") from None
    except (KeyError, AttributeError) as error:
        if isinstance(error, AttributeError) and error.name == "get_config":
            raise UsageError("--config names a file without get_config(); give a recipe such as configs/digits.py") from None
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # a fault in the recipe's own code: its traceback helps
        raise UsageError(f"the config has no key {_unknown_key(error)}") from None
    if len(rest) > 1 and not positional:
        raise UsageError(f"unknown argument {rest[1]!r}; flags look like --name=value")
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):  # absl's ranges let NaN pass
            raise UsageError(f"--{name}={value} is not a finite number; {flags.FLAGS[name].help}")
    for name in required_flags:
        if flags.FLAGS[name].value is None:
            raise UsageError(f"--{name} is missing: {flags.FLAGS[name].help}")
    if positional and len(rest) == 1:
        raise UsageError(f"nothing to work on was given; give {positional} after the flags")
    return rest


def _unknown_key(error):
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    key, *hint = str(error.args[0]).splitlines()
    return (
        "; ".join([key, *hint]).replace("Did you mean", "did you mean")
        if hint
        else f"{key}; halonet_jax/config/knobs.py lists all keys"
    )


def _fail(error, code):
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code
