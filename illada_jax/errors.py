"""Errors that a user can act on."""


class InputError(ValueError):
    """Something that the user gave is wrong: a key, a value, a file, a flag.

    The message is one line that names the culprit and says what is allowed. Commands print it
    without a traceback and exit with code 2.
    """


class StorageError(InputError):
    """A file cannot be written: the disk is full, may not be written to, or fails. One process may see it alone."""


class ConfigError(InputError):
    """A configuration value is unknown, of the wrong type, out of range or in conflict."""
