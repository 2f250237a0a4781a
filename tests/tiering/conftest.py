"""System calls that fail below an engine."""

import pytest
from faulty_calls import faulty, faulty_library  # noqa: F401

from kvortex.tiers.disk import segments
from kvortex.tiers.disk._io_calls import IoCalls


@pytest.fixture
def faulty_disk(faulty, monkeypatch):  # noqa: F811
    """The controls of the system calls of every disk tier that this test opens."""
    monkeypatch.setattr(segments, "IoCalls", lambda: IoCalls(faulty.address))
    return faulty
