"""Devices, streams, events and device memory, over one table of driver functions.

The CUDA driver fills the table where there is a GPU; otherwise the host driver does, over host memory.
"""

from kvortex.driver._buffer import DeviceBuffer
from kvortex.driver._device import Device, list_devices, why_no_cuda
from kvortex.driver._stream import Event, Stream

__all__ = ["Device", "DeviceBuffer", "Event", "Stream", "list_devices", "why_no_cuda"]
