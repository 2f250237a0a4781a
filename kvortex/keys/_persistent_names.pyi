import numpy as np
from numpy.typing import NDArray

def persistent_names(keys: NDArray[np.uint8], namespace: bytes, rank: int, tag: bytes) -> NDArray[np.uint8]: ...
