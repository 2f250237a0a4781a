"""What other compiled modules may cimport; the names here stay, those of the modules below may move.

    from kvortex.capi cimport BlockIndex, PinnedPool, TransferQueue, chain_keys

The C compiler needs ``kvortex.get_include()`` among its include folders. Nothing here takes or needs the GIL unless it
returns an object. What each verb promises stands where it is declared: index/_block_index.pxd, keys/_block_keys.pxd,
keys/_ram_keys.pxd, memory/_pinned_pool.pxd, transfer/_transfer_queue.pxd.
"""

from kvortex._c cimport (
    KV_CUDA_NOT_READY,
    KV_KEY_BYTES,
    KV_NO_SLOT,
    KV_RESERVE_FULL,
    KV_RESERVE_NEW,
    KV_RESERVE_PENDING,
    KV_RESERVE_PRESENT,
    kv_slots_payload,
)
from kvortex.driver._device cimport Device
from kvortex.index._block_index cimport BlockIndex, IndexCounters
from kvortex.keys._block_keys cimport chain_keys, hash_root
from kvortex.keys._ram_keys cimport xor_keys
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._job_table cimport OUTCOME_DONE, OUTCOME_FAILED, OUTCOME_PENDING, JobOutcome
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._transfer_queue cimport TransferQueue
