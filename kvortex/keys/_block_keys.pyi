from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

def block_keys(token_ids: ArrayLike, block_size: int, salt: bytes = b"") -> NDArray[np.uint8]: ...
def block_keys_many(
    prompts: Sequence[ArrayLike] | NDArray[np.integer], block_size: int, salt: bytes = b""
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
def sha256(data: bytes | bytearray | memoryview) -> bytes: ...
