"""System calls that fail below an engine."""

from faulty_calls import faulty, faulty_disk, faulty_library  # noqa: F401
