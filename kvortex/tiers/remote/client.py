"""What a client of a server has to do, and how its secrets are read."""

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from kvortex.errors import ConfigError


class Value(NamedTuple):
    """The value that a client found."""

    nbytes: int
    age_s: float | None = None  # since the value was written, if the server tells


class Client(Protocol):
    """Values by name. Several threads may call any verb at once. A verb that fails raises an `Exception`.

    A value is whole or absent, whoever writes it meanwhile. A client is made without a connection: if there is no
    server, the first call fails. No call lasts much longer than the request timeout that the client was made with.
    """

    def put(self, name, record):
        """Write a value, from a buffer, or from a list of them, one after the other."""

    def get(self, name, record):
        """Read a value into a buffer, or a list of them; return a `Value`, or None if there is none.

        The buffers get the value only if it is exactly as long. Nothing is written to them after the return.
        """

    def refresh(self, name, record, age_s):
        """Make a value that was read, and is right, recent on the server, so that it is not the next to be evicted."""

    def sizes(self, names, is_chain):
        """The length of each value, 0 if there is none. `is_chain`: each value continues the one before it."""

    def delete(self, name):
        """Remove a value, if it is there."""

    def close(self):
        """Give back what the client has. Idempotent."""


def parts_of(record):
    """The buffers that a value is written from or read into, as a list."""
    return record if isinstance(record, list) else [record]


def secret_of(name, from_env, from_file):
    """Read a secret from the place that a setting names.

    Parameters
    ----------
    name : str
        Name of the secret; its settings are ``<name>_env`` and ``<name>_file``.
    from_env, from_file : str or None
        A variable of the environment, or a file, of which white space at both ends does not count.

    Returns
    -------
    secret : str or None

    Raises
    ------
    ConfigError
        Both are given, or the variable or file does not exist.
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
