"""What can go wrong in a way that a user can mend. Each message states the value, the rule and the remedy."""


class UserError(ValueError):
    """Base of the errors that an entry prints as one line, with exit code 2."""


class ConfigError(UserError):
    """A config that cannot run."""


class DataError(UserError):
    """Data that cannot be used as asked."""


class CorruptImage(DataError):
    """One image that does not decode. The message is the reason alone; the caller knows the file."""


class CheckpointError(UserError):
    """No checkpoint to restore, or one of another model."""


class StorageError(OSError):
    """The workdir cannot be written. The message says what is safe and what to do."""


class SaveError(StorageError):
    """A checkpoint could not be written. The message names the step and the last good checkpoint."""


class NonFiniteLoss(ArithmeticError):
    """The loss, a gradient or the state is NaN or infinite, first after `step`.

    Args:
        step: number of the step, counted from 1.
        what: the quantity and its value.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step = step


class Stopped(Exception):
    """A signal came at a point where nothing needs saving."""


class DistributedError(RuntimeError):
    """The processes cannot go on together. The message names the process and the remedy.

    Args:
        message: the whole message.
        peer_failed: True where another process failed and this one may be healthy.
    """

    def __init__(self, message: str, peer_failed: bool = False):
        super().__init__(message)
        self.peer_failed = peer_failed
