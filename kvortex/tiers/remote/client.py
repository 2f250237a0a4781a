"""What a client of a server has to do, and how it gets at its secrets."""

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from kvortex.errors import ConfigError


class Value(NamedTuple):
    """What a client found."""

    nbytes: int
    age_s: float | None = None  # since it was written, where the server tells


class Client(Protocol):
    """Values by name. Any verb may be called by several threads at once, and raises an `Exception` where it fails.

    A value is whole or absent, whoever writes it meanwhile. A client is made without a connection; a server that is not
    there shows at the first call. No call lasts much longer than the request timeout that the client was made with.
    """

    def put(self, name, record):
        """Write a value, from a buffer, or from a list of them, one after the other."""

    def get(self, name, record):
        """Read a value into a buffer, or a list of them; return a `Value`, or None where there is none.

        The buffers have the value only if it is as long as they are. They are not written to after this returned.
        """

    def refresh(self, name, record, age_s):
        """A value was read, and is right: let it not be the next to go."""

    def sizes(self, names, is_chain):
        """The length of each value, 0 where there is none. Of a chain each value follows the one before it."""

    def delete(self, name):
        """Remove a value, if it is there."""

    def close(self):
        """Give back what the client has. Idempotent."""


def parts_of(record):
    """The buffers that a value is written from or read into, as a list."""
    return record if isinstance(record, list) else [record]


def secret_of(name, from_env, from_file):
    """Read a secret where a setting says it lies.

    Parameters
    ----------
    name : str
        Of the secret; its settings are called ``<name>_env`` and ``<name>_file``.
    from_env, from_file : str or None
        A variable of the environment, or a file. White space around what is in the file does not count.

    Returns
    -------
    secret : str or None

    Raises
    ------
    ConfigError
        Both are given, or what is given is not there.
    """
    if from_env and from_file:
        raise ConfigError(f"give {name}_env or {name}_file, not both")
    if from_env:
        if from_env not in os.environ:
            raise ConfigError(f"{name}_env names {from_env}, which the environment does not have")
        return os.environ[from_env]
    return None if from_file is None else read_file(f"{name}_file", from_file).decode().strip()


def read_file(setting, path):
    """The content of a file that a setting names; None for None."""
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} cannot be read: {error}") from None
