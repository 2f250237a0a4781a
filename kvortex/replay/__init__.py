"""Replays a request trace through a real engine over the public API, and checks every loaded byte.

`trace` reads, `run` drives the engine, `oracle` knows what every byte should be, `cache` is the device memory of a
pretended model, `report` and `plot` show what happened.
"""

from kvortex.replay.run import ReplayOptions, ReplayResult, replay
from kvortex.replay.trace import Request, TraceError, read_trace, sample_path

__all__ = ["ReplayOptions", "ReplayResult", "Request", "TraceError", "read_trace", "replay", "sample_path"]
