"""Errors that the user can fix."""


class InputError(ValueError):
    """Invalid input: a key, a value, a file or a flag.

    The message is one line that says what is wrong, where, and what is allowed. Commands print it without a traceback
    and exit with code 2.
    """


class StorageError(InputError):
    """A file cannot be written: the disk is full, read-only or failing. Other processes may not see the error."""


class ConfigError(InputError):
    """A configuration key is unknown, or its value has the wrong type, is out of range or conflicts with another."""
