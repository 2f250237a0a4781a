"""`verify`: compare each slot with what the device holds at the point where vLLM's next forward may start.

If a copy ran too early, or memory was overwritten too early, they differ. On vLLM's stream the check costs one copy
inside the device, so it does not change the races that it looks for.
"""

import ctypes
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from kvortex.codec import pack_block, unpack_block
from kvortex.log import Guarded
from kvortex.transfer import packed_block

logger = Guarded(logging.getLogger("vllm.kvortex"))

SCRATCH_BYTES = 4 << 30  # of captures that are not compared yet
_memcmp = ctypes.CDLL(None).memcmp  # releases the GIL
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class Capture:
    """Blocks as the device held them, on their way to the host."""

    slots: np.ndarray
    block_ids: np.ndarray
    content: torch.Tensor  # (n, block_bytes) uint8 in host memory
    scratch: torch.Tensor  # the same on the device, held until the copy to the host is over
    arrived: object = None  # a CUDA event
    future: object = field(default=None)


class Verifier:
    """Capture blocks and compare them with their slots.

    Parameters
    ----------
    layout : KVLayout
        Made from torch tensors, which are its `owners`. The verifier holds only their memory.
    pool : PinnedPool
    torch_device : torch.device
    codec, exact_layers
        How blocks are packed in their slots. A saved block must pack to what its slot holds; what a slot holds must
        unpack to the loaded block.
    """

    def __init__(self, layout, pool, torch_device, codec="exact", exact_layers=()):
        self.packed = None if codec == "exact" else packed_block(layout, codec, exact_layers)
        self.block_bytes, self.pool, self.torch_device = layout.block_bytes, pool, torch_device
        self.pieces = [piece_view(layout, *run) for run in layout.runs]
        self.on_gpu = torch_device.type == "cuda"
        self.side_stream = torch.cuda.Stream(torch_device) if self.on_gpu else None
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="kvortex-verify")
        self.bytes_held = 0
        self.blocks_compared = self.blocks_wrong = self.captures_skipped = 0

    def capture(self, block_ids, slots):
        """Copy blocks aside on torch's current stream. If too many captures wait already, return None."""
        nbytes = len(block_ids) * self.block_bytes
        if self.bytes_held + nbytes > SCRATCH_BYTES:
            return None
        self.bytes_held += nbytes
        rows = torch.from_numpy(np.asarray(block_ids, dtype=np.int64))
        if self.on_gpu:  # pinned, or the host would wait for the forward
            rows = rows.pin_memory().to(self.torch_device, non_blocking=True)
        scratch = torch.empty((len(block_ids), self.block_bytes), dtype=torch.uint8, device=self.torch_device)
        offset = 0
        for pieces in self.pieces:
            size = pieces.shape[1] * pieces.element_size()
            scratch[:, offset : offset + size].view(pieces.dtype).copy_(pieces.index_select(0, rows))
            offset += size
        if not self.on_gpu:
            return Capture(slots, block_ids, scratch, scratch)
        content = torch.empty(scratch.shape, dtype=torch.uint8, pin_memory=True)
        self.side_stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self.side_stream):
            content.copy_(scratch, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Capture(slots, block_ids, content, scratch, arrived)

    def wait(self, capture):
        """Wait until the device's blocks have been read."""
        if capture.arrived is not None:
            capture.arrived.synchronize()

    def verdict(self, capture, wait):
        """Compare a capture whose slots are complete. Return counters, or None: ask again (never if `wait`)."""
        if capture is None:
            self.captures_skipped += 1
            return {"verify_skipped": 1}
        if capture.future is None:
            capture.future = self.threads.submit(self.mismatches, capture)
        if not (wait or capture.future.done()):
            return None
        self.release(capture)
        wrong = capture.future.result()
        self.blocks_compared += len(capture.slots)
        self.blocks_wrong += len(wrong)
        if wrong:
            logger.error("KVortex verify: device blocks %s differ from their slots", wrong)
        return {"verify_blocks": len(capture.slots), "verify_mismatches": len(wrong)}

    def release(self, capture):
        """Make room for other captures: this one is not needed any more."""
        self.bytes_held -= capture.content.nbytes

    def mismatches(self, capture):
        """The device blocks whose slots differ from the capture."""
        self.wait(capture)
        if self.packed is not None:
            content, pairs = capture.content.numpy(), zip(capture.block_ids, capture.slots, strict=True)
            return [int(block) for row, (block, slot) in enumerate(pairs) if not self.agree(content[row], slot)]
        first, nbytes = capture.content.data_ptr(), self.block_bytes
        return [
            int(block)
            for row, (block, slot) in enumerate(zip(capture.block_ids, capture.slots, strict=True))
            if _memcmp(first + row * nbytes, self.pool.address(int(slot)), nbytes)
        ]

    def agree(self, block, slot):
        """Whether a packed slot has this block: it unpacks to the block, or the block packs to it."""
        held = np.frombuffer(self.pool.view(int(slot)), np.uint8)[: self.packed.packed_bytes]
        packed, unpacked = np.empty_like(held), np.empty_like(block)
        unpack_block(self.packed, held, unpacked)
        if np.array_equal(unpacked, block):
            return True
        pack_block(self.packed, block, packed)  # works for refused blocks, too
        return np.array_equal(packed, held)

    def close(self):
        self.threads.shutdown()


def piece_view(layout, base, stride, piece_bytes):
    """The pieces of one run, one a row, in words of 8 bytes where that fits."""
    for tensor in layout.owners:
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= base < storage.data_ptr() + storage.nbytes():
            break
    else:
        raise AssertionError(f"no tensor of the layout holds {base:#x}")
    word = 8 if all(number % 8 == 0 for number in (base, stride, piece_bytes)) else 1
    flat = torch.empty(0, dtype=torch.int64 if word == 8 else torch.uint8, device=tensor.device).set_(storage)
    size = (layout.num_blocks, piece_bytes // word)
    return flat.as_strided(size, (stride // word, 1), (base - storage.data_ptr()) // word)
