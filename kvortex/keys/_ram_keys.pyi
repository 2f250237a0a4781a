import numpy as np
from numpy.typing import NDArray

def digest_of(
    group: int = 0,
    codec: bytes | bytearray | memoryview | None = None,
    tag: bytes | bytearray | memoryview | None = None,
) -> bytes: ...
def ram_keys(hashes: NDArray[np.uint8], digest: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]: ...
