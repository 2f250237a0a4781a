"""Settings of an engine: frozen, validated when made, every message with value, limit and next step.

One set of names, the fields of `KVortexConfig`, serves keywords, the environment (``KVORTEX_`` and the name in
capitals) and TOML files. `KVortexConfig(...)` takes keywords alone; `KVortexConfig.load` joins all three.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypedDict, Unpack

from kvortex.arguments import shown, whole_number
from kvortex.errors import ConfigError
from kvortex.log import warn_once
from kvortex.slots import CHUNK_BYTES, FIRST_CHUNK_BYTES, PAGE_BYTES

PREFIX = "KVORTEX_"
CONFIG_VARIABLE = "KVORTEX_CONFIG"
MOST_FILE_BYTES = 1 << 20
# Variables of KVortex's own build and tests; they may be set while an engine runs, and mean nothing to it.
OTHER_VARIABLES = {
    "KVORTEX_ANNOTATE",
    "KVORTEX_BENCH_DEVICE",
    "KVORTEX_CFLAGS",
    "KVORTEX_DYNAMO",
    "KVORTEX_FUZZ_SECONDS",
    "KVORTEX_LDFLAGS",
    "KVORTEX_MUTANT",
    "KVORTEX_MUTATED_RECORDS",
    "KVORTEX_ONLY",
    "KVORTEX_SANITIZE",
    "KVORTEX_SEED",
    "KVORTEX_SOAK",
    "KVORTEX_TEST_ALONE",
    "KVORTEX_TEST_DEVICE",
    "KVORTEX_VERDICTS",
    "KVORTEX_WERROR",
}
CODECS = ("exact", "q8", "k8v5", "k6v4", "q4")  # of kvortex.codec, which this layer may not import; a test compares
# What was a setting once, and what to do about it now.
REMOVED = {"header_bytes": "is no setting any more: it follows from the tiers; leave it out"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_SIZE = re.compile(r"(\d{1,20}) ?(?:([KMGT])(i?)B?)?", re.ASCII)
_DEVICE = re.compile(r"auto|(host|cuda)(:\d{1,4})?", re.ASCII)


class Setting(NamedTuple):
    """A value, and where it came from: ``"keyword"``, ``"default"``, a variable's name or a file's path."""

    value: object
    source: str


class OtherSettings(TypedDict, total=False):
    """What may be passed for the fields of `KVortexConfig`, all but the one that has no default; for type checkers."""

    num_transfer_streams: int
    device: str
    block_bytes: int | str | None
    max_jobs: int
    shutdown_timeout_ms: int
    pool_first_chunk_bytes: int | str
    pool_chunk_bytes: int | str
    pool_driver_allocated: bool
    pool_huge_pages: bool
    gather_ctas: int
    gpu_pool_size_bytes: int | str
    codec: str
    exact_layers: Sequence[int]
    deferred: bool | Literal["auto"]
    tiers: Sequence[Any]
    namespace: str | None
    weights: str | None
    prefill_tokens_per_s: int
    block_tokens: int
    enable_numa: bool


class Settings(OtherSettings, total=False):
    """What `KVortexConfig.load` takes."""

    cpu_pool_size_bytes: int | str


@dataclass(frozen=True, kw_only=True)
class KVortexConfig:
    """What an engine is built from.

    Reads nothing but its keywords; see `load` for the environment and files. Sizes may be texts: ``"16GiB"``.

    Parameters
    ----------
    cpu_pool_size_bytes : int
        Pinned host memory for blocks; exactly ``cpu_pool_size_bytes // stride`` slots, where the stride is the block
        rounded up to 4 KiB. At least one slot.
    num_transfer_streams : int, default 3
        Streams of the engine, 1 to 32; at least two are made, since loads and saves never share one.
    device : str, default "auto"
        ``"cuda"``, ``"cuda:1"``, ``"host"``, ``"host:1"``, or ``"auto"``: CUDA where there is a GPU, else the host
        driver.
    block_bytes : int, optional
        Largest block. Taken from the layout when there is one; required for engines that use raw pointers only.
    max_jobs : int, default 256
        Jobs in flight per stream, 1 to 65536; when all are taken a call moves 0 blocks.
    shutdown_timeout_ms : int, default 5000
        How long `shutdown` waits for jobs in flight before it fails them and leaks pinned memory on purpose.
    pool_first_chunk_bytes, pool_chunk_bytes : int, default 128 MiB and 256 MiB
        Sizes of the first registration (made before `create` returns) and of the later ones (in the background).
    pool_driver_allocated : bool, default False
        Take the pool with one `cuMemHostAlloc` instead: slower, blocking, for systems that refuse registering.
    gather_ctas : int, default 0
        Pieces below 32 KiB that strided copies cannot move are gathered on the device by a kernel of so many thread
        blocks (0: never; 4 reach the link), each of which takes a streaming multiprocessor from the model while it
        runs. Costs 16 MiB of device memory (or two blocks) a stream, of the `device_pool` if there is one.
    pool_huge_pages : bool, default True
        Ask for transparent huge pages; without them pinning took 1.7 times as long (`python -m bench.gpu`).
    gpu_pool_size_bytes : int, default 0
        Limit of `engine.device_pool`, a `DevicePool` for device memory: the gather's, and whatever the runtime takes
        from it. 0: there is none. Nothing is taken before it is asked for.
    codec : {"exact", "q8", "k8v5", "k6v4", "q4"}, default "exact"
        How blocks lie in their slots: as they are, or packed on the way by a kernel on the device, to half their size
        and less. All but "exact" are lossy, and need a layout that names its vectors: `kvortex.codec` has what each one
        costs. `gather_ctas` then counts the thread blocks of that kernel (0: 12).
    exact_layers : tuple of int, default ()
        Layers that the codec leaves as they are; negative numbers count from the last one.
    deferred : bool or "auto", default False
        Whether a thread of the engine submits the copies of a save or a load, so that the call returns at once; "auto":
        where there are many. A call may say otherwise; `KVortexEngine.save_blocks` tells what it means for the caller.
    tiers : tuple, default ()
        Where blocks are kept beyond RAM: at most one so far, a `DiskTier`, `RedisTier` or `ObjectTier`. A keyword only.
    namespace : str, optional
        Names the model as it was loaded (its weights, dtype and quantisation): needed with `tiers`, since a block of
        another model must never be taken for one of this. Engines of different namespaces share nothing.
    weights : str, optional
        Names the weights at the start, as ``clear(weights=...)`` does later.
    prefill_tokens_per_s, block_tokens : int, default 0
        What the model computes, and the tokens of a block, if both are known: then blocks are left on a tier where
        bringing them would take longer than computing them.
    enable_numa : bool, default True
        Prefer memory of the GPU's NUMA node for the pool (`engine.pool.numa_node` tells what came of it).

    Raises
    ------
    ConfigError
        A value is of the wrong type or outside its limits, or there is no such setting: the nearest one is given.
    """

    cpu_pool_size_bytes: int
    num_transfer_streams: int = 3
    device: str = "auto"
    block_bytes: int | None = None
    max_jobs: int = 256
    shutdown_timeout_ms: int = 5000
    pool_first_chunk_bytes: int = FIRST_CHUNK_BYTES
    pool_chunk_bytes: int = CHUNK_BYTES
    pool_driver_allocated: bool = False
    pool_huge_pages: bool = True
    gather_ctas: int = 0
    gpu_pool_size_bytes: int = 0
    codec: str = "exact"
    exact_layers: tuple[int, ...] = ()
    deferred: bool | Literal["auto"] = False
    tiers: tuple[Any, ...] = ()
    namespace: str | None = None
    weights: str | None = None
    prefill_tokens_per_s: int = 0
    block_tokens: int = 0
    enable_numa: bool = True

    _LIMITS = {
        "cpu_pool_size_bytes": (1, 1 << 50),
        "num_transfer_streams": (1, 32),
        "block_bytes": (1, (1 << 32) - 1),
        "max_jobs": (1, 65536),
        "gather_ctas": (0, 1024),
        "gpu_pool_size_bytes": (0, (1 << 48) - 1),
        "shutdown_timeout_ms": (0, 3_600_000),
        "pool_first_chunk_bytes": (1, 1 << 50),
        "pool_chunk_bytes": (1, 1 << 50),
        "prefill_tokens_per_s": (0, 1 << 40),
        "block_tokens": (0, 1 << 20),
    }
    _KEYWORDS_ONLY = ("tiers",)

    if TYPE_CHECKING:

        def __init__(self, *, cpu_pool_size_bytes: int | str, **others: Unpack[OtherSettings]) -> None: ...

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        known = cls.names()
        for name in keywords.keys() - {*known}:
            raise ConfigError(_unknown(name, f"unknown setting {name!r}", known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, self.check(field.name, getattr(self, field.name)))
        if (self.prefill_tokens_per_s > 0) != (self.block_tokens > 0):
            raise ConfigError(
                f"prefill_tokens_per_s and block_tokens go together, got {self.prefill_tokens_per_s} and "
                f"{self.block_tokens}; set both, or neither"
            )
        if self.tiers and self.namespace is None:
            raise ConfigError(
                "tiers need a namespace that names the model as it was loaded: blocks outlive this process, and must "
                'never be taken for those of another model; set namespace="llama-3.1-8b-instruct@0e9e39f bf16", say'
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        **keywords: Unpack[Settings],
    ) -> Self:
        """Build a configuration from keywords, the environment and a file, in this order of precedence.

        Parameters
        ----------
        path : path-like, optional
            A TOML file with settings at its top level, under the names of the parameters above. By default the one that
            the variable ``KVORTEX_CONFIG`` names, if it is set.
        environ : mapping of str to str, optional
            ``KVORTEX_MAX_JOBS`` sets `max_jobs`, and so on for each name; an empty value counts as unset. Truth is one
            of 1, true, yes, on, 0, false, no, off.
        **keywords
            Settings, under the same names; they win.

        Returns
        -------
        KVortexConfig
            Equal to one made of the same values as keywords; `sources` tells where each one came from.

        Raises
        ------
        ConfigError
            A name is unknown (the nearest one is given), a value is of the wrong type or outside its limits (also one
            that another overrides), the file cannot be read, or `cpu_pool_size_bytes` is nowhere. The message names
            keyword, variable, or file and key.

        Notes
        -----
        Sizes (names that end in ``_bytes``) may be written as `parse_bytes` reads them: ``"16GiB"``. A variable
        ``KVORTEX_...`` that resembles a setting's name is taken for a misspelt one and refused; any other that is
        unknown is somebody else's (Kubernetes makes ``KVORTEX_PORT`` of a service's name), is left alone and logged
        once.
        """
        settings = cls.find_settings(path, environ=environ, **keywords)
        if "cpu_pool_size_bytes" not in settings:
            raise ConfigError(
                "cpu_pool_size_bytes is not set: pass it, set KVORTEX_CPU_POOL_SIZE_BYTES=16GiB, or write "
                f'cpu_pool_size_bytes = "16GiB" into a file that {CONFIG_VARIABLE} names'
            )
        config = cls(**{name: setting.value for name, setting in settings.items()})
        object.__setattr__(config, "_sources", {name: setting.source for name, setting in settings.items()})
        return config

    @classmethod
    def find_settings(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        **keywords: Unpack[Settings],
    ) -> dict[str, Setting]:
        """Return what `load` would build from: a `Setting` for each name that is set anywhere; raises as it does."""
        environ = os.environ if environ is None else environ  # no default of the signature: help() would show all of it
        path = path or environ.get(CONFIG_VARIABLE) or None
        found = {} if path is None else dict(cls._from_file(os.fspath(path)))
        found.update(cls._from_environment(environ))
        known = cls.names()
        for name, value in keywords.items():
            if name not in known:
                raise ConfigError(_unknown(name, f"unknown setting {name!r}", known))
            found[name] = Setting(cls.check(name, value), "keyword")
        return found

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return [field.name for field in fields(cls)]

    @property
    def header_bytes(self) -> int:
        """Bytes before each block in its slot: a page where there are lower tiers."""
        return PAGE_BYTES if self.tiers else 0

    @property
    def sources(self) -> dict[str, str]:
        """Where each value came from, by name, as in `Setting`; without `load`, what is no default is a keyword."""
        known = getattr(self, "_sources", None)
        if known is None:
            known = {f.name: "keyword" for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: known.get(name, "default") for name in self.names()}

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """Return `value` if it is fit for the setting `name`; raise `ConfigError` otherwise."""
        if isinstance(value, str) and name.endswith("_bytes"):
            value = parse_bytes(value)
        if name in cls._LIMITS:
            low, high = cls._LIMITS[name]
            if value is None and name == "block_bytes":
                return value
            try:
                value = whole_number(value, name)
            except TypeError as error:
                raise ConfigError(str(error)) from None
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, got {shown(value)}")
        elif name == "device":
            if not isinstance(value, str):
                raise ConfigError(f"device must be a str such as 'auto', 'cuda:0' or 'host', got {shown(value)}")
            parse_device(value)
        elif name in ("namespace", "weights"):
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} must be a text that is not empty, got {shown(value)}")
        elif name == "tiers":
            if not isinstance(value, tuple | list):
                raise ConfigError(f"tiers must be a tuple such as (DiskTier(...),), got {shown(value)}")
            for tier in value:
                if not callable(getattr(tier, "open", None)):
                    raise ConfigError(f"tiers must be such as DiskTier(paths, disk_bytes), got {tier!r}")
            if len(value) > 1:
                raise ConfigError(f"there may be one tier below RAM so far, got {len(value)}")
            return tuple(value)
        elif name == "codec":
            if value not in CODECS:
                raise ConfigError(f"codec must be one of {', '.join(CODECS)}, got {shown(value)}")
        elif name == "exact_layers":
            return _layers(value)
        elif name == "deferred":
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"deferred must be True, False or 'auto', got {shown(value)}")
        elif not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {shown(value)}")
        return value

    @classmethod
    def _from_file(cls, path):
        import tomllib  # late: most engines have no file

        try:
            with open(path, "rb") as file:
                text = file.read(MOST_FILE_BYTES + 1)
            if len(text) > MOST_FILE_BYTES:
                raise ValueError(f"it is longer than {bytes_text(MOST_FILE_BYTES)}")
            table = tomllib.loads(text.decode())
        except OSError as error:
            raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror or error}") from error
        except RecursionError:
            raise ConfigError(f"the configuration file {path} is nested too deeply") from None
        except ValueError as error:  # no TOML, no UTF-8, or too long
            raise ConfigError(f"the configuration file {path} is not TOML: {error}") from error
        known = cls.names()
        for name, value in table.items():
            where = f"key {shown(name)} of the configuration file {path}"
            if name in cls._KEYWORDS_ONLY:
                raise ConfigError(f"{where} is taken as a keyword only")
            if name not in known:
                raise ConfigError(_unknown(name, f"{where} is no setting", known))
            try:
                yield name, Setting(cls.check(name, value), path)
            except ConfigError as error:
                raise ConfigError(f"{error} ({where})") from None

    @classmethod
    def _from_environment(cls, environ):
        variables = {PREFIX + name.upper(): name for name in cls.names() if name not in cls._KEYWORDS_ONLY}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or variable in OTHER_VARIABLES:
                continue
            if variable not in variables:
                name = variable.removeprefix(PREFIX).lower()
                if name in REMOVED:
                    if text:
                        raise ConfigError(f"{name} {REMOVED[name]} (environment variable {variable})")
                    continue
                near = nearest(name, [*cls.names(), "config"])
                if near:
                    hint = f"did you mean {PREFIX}{near.upper()}?"
                    raise ConfigError(f"the environment variable {variable} is no setting; {hint}")
                warn_once("unknown_variable", "an environment variable is no setting and is ignored", variable=variable)
            elif text:
                name = variables[variable]
                try:
                    yield name, Setting(cls.check(name, cls._parse(name, text)), variable)
                except ConfigError as error:
                    raise ConfigError(f"{error} (environment variable {variable})") from None

    @classmethod
    def _parse(cls, name, text):
        """The value that a variable's text stands for."""
        if name.endswith("_bytes"):
            return text
        if name in cls._LIMITS:
            return int(text) if re.fullmatch(r"-?\d{1,20}", text, re.ASCII) else text  # which the check refuses
        if name in ("device", "namespace", "weights", "codec", "exact_layers") or (name, text) == ("deferred", "auto"):
            return text
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise ConfigError(f"{name} must be one of {', '.join((*_TRUE, *_FALSE))}, got {shown(text)}")


def _layers(value):
    """Numbers of layers, also from a text such as ``"0,-1"``."""
    if isinstance(value, str):
        value = [int(text) if re.fullmatch(r" *-?\d{1,6} *", text, re.ASCII) else text for text in value.split(",")]
    try:
        return tuple([whole_number(number, "a layer") for number in value])
    except TypeError:
        raise ConfigError(f"exact_layers must be whole numbers such as (0, -1), got {shown(value)}") from None


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as ``"65536"``, ``"64KiB"``, ``"16 Gi"`` or ``"500GB"`` names.

    Ki, Mi, Gi and Ti are powers of 1024, K, M, G and T of 1000, as Kubernetes has it; a B behind them changes nothing.

    Raises
    ------
    ConfigError
        It is no whole number with one of these behind it, or nothing.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise ConfigError(f"bytes are expected, like 65536, 64KiB, 2Mi, 32GiB or 500GB, got {shown(text)}")
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")


def bytes_text(nbytes: int) -> str:
    """A size for people, with the exact number where rounding would hide it."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >> shift:
            exact = nbytes % (1 << shift) == 0
            return f"{nbytes >> shift} {unit}" if exact else f"{nbytes / (1 << shift):.2f} {unit} ({nbytes} bytes)"
    return f"{nbytes} bytes"


def parse_device(text: str) -> str:
    """Return `text` if it names a device that there could be; raise `ConfigError` otherwise."""
    if not _DEVICE.fullmatch(text):
        raise ConfigError(f"device must be 'auto', 'host', 'host:N', 'cuda' or 'cuda:N', got {shown(text)}")
    return text


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that `name` was probably meant to be, or None if it resembles none."""
    import difflib  # late: only for those who misspell

    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def _unknown(name, complaint, known):
    """What to say of a name that is no setting."""
    if name in REMOVED:
        return f"{name} {REMOVED[name]} ({complaint})"
    near = nearest(name, known)
    return f"{complaint}; " + (f"did you mean {near!r}?" if near else f"known are {', '.join(known)}")
