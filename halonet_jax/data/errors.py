"""What goes wrong with data, in the user's words."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message states the value, the rule and the remedy."""


class CorruptImage(DataError):
    """One image that does not decode; the message is the reason alone, the caller knows the file."""
