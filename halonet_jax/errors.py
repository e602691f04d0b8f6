"""Errors that a user can mend. Each message states the value, the rule and the remedy."""


class UserError(ValueError):
    """Base class of the errors that an entry prints as one line, with exit code 2."""


class ConfigError(UserError):
    """The config cannot run."""


class WorkdirInUse(ConfigError):
    """Another run holds the workdir."""


class DataError(UserError):
    """The data cannot be used as requested."""


class CorruptImage(DataError):
    """One image cannot be decoded. The message states only the reason; the caller adds the file's name."""


class CheckpointError(UserError):
    """There is no checkpoint to restore, or it belongs to another model."""


class ExportError(UserError):
    """A model cannot be exported, or an export does not compute what the checkpoint does."""


class StorageError(OSError):
    """The workdir cannot be written. The message says what is safe and what to do."""


class SaveError(StorageError):
    """A checkpoint could not be written. The message names the step and the last good checkpoint."""


class NonFiniteLoss(ArithmeticError):
    """The loss, a gradient or the state is NaN or infinite. `step` is the first such step.

    Args:
        step: the step's number, counted from 1.
        what: the quantity and its value.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step = step


class Stopped(Exception):
    """A signal ended the run at a point where nothing had to be saved."""


class DistributedError(RuntimeError):
    """The processes cannot continue together. The message names the process and the remedy.

    Args:
        message: the whole message.
        peer_failed: True if another process failed and this one may be healthy.
    """

    def __init__(self, message: str, peer_failed: bool = False):
        super().__init__(message)
        self.peer_failed = peer_failed
