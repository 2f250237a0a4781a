"""Replays a request trace through a real engine over the public API, and checks every loaded byte.

`files` reads, with `trace` and `conversation`; `run` drives the engine, `oracle` knows what every byte should be,
`cache` is the device memory of a pretended model; `lab` asks how large a pool should be; `report` and `plot` show.
"""

from kvortex.replay.files import read_trace
from kvortex.replay.lab import SweepPoint, SweepResult, sweep
from kvortex.replay.run import ReplayOptions, ReplayResult, replay
from kvortex.replay.trace import Request, TraceError, sample_path

__all__ = [
    "ReplayOptions",
    "ReplayResult",
    "Request",
    "SweepPoint",
    "SweepResult",
    "TraceError",
    "read_trace",
    "replay",
    "sample_path",
    "sweep",
]
