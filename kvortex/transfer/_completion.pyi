from collections.abc import Sequence

from kvortex.driver import Device
from kvortex.transfer._signals import JobSignals
from kvortex.transfer._transfer_queue import TransferQueue

class CompletionThread:
    def __init__(self, device: Device, signals: JobSignals, queues: Sequence[TransferQueue]) -> None: ...
