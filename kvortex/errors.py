"""The exceptions KVortex raises.

A full pool and a missing block are answers, not errors; what stands here is for bad settings and for a world that
failed. Each class derives from the builtin a caller would catch anyway.
"""


class KVortexError(Exception):
    """Base of every exception that KVortex defines."""


class ConfigError(KVortexError, ValueError):
    """A setting is outside its limits; the message gives the value, the limit and the next step."""


class PoolExhausted(KVortexError, MemoryError):
    """Memory could not be had: more was asked for than the machine, its limits or the limit of a pool allow."""


class DriverError(KVortexError, RuntimeError):
    """A CUDA driver call failed.

    Attributes
    ----------
    code : int
        The `CUresult`.
    name : str
        Its name, e.g. ``CUDA_ERROR_INVALID_VALUE``.
    call : str
        The driver function that answered it, or a short description of the step.
    detail : str
        What is known beyond that, or nothing.
    """

    def __init__(self, code: int, name: str, call: str, detail: str = "") -> None:
        self.code = code
        self.name = name
        self.call = call
        self.detail = detail
        super().__init__(f"{call} answered {name} ({code})" + (f": {detail}" if detail else ""))

    def __reduce__(self) -> tuple[type["DriverError"], tuple[int, str, str, str]]:
        return type(self), (self.code, self.name, self.call, self.detail)


class TierError(KVortexError, OSError):
    """A lower tier could not do what was asked."""


class CorruptBlock(KVortexError):
    """Bytes read from outside RAM do not match their checksum."""


class EngineClosed(KVortexError, RuntimeError):
    """The engine, pool or queue was shut down (or belongs to the parent of this forked process)."""
