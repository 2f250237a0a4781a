"""vLLM's own `OffloadingConnector` on a CPU: its scheduler's half as it is, and a worker that copies at once.

vLLM's worker wants a GPU. What is compared with ours is what the scheduler's half finds, and that is vLLM's.
"""

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class CopyingWorker(OffloadingWorker):
    def __init__(self, kv_caches, num_chunks):
        self.device, self.refs, self.finished = kv_caches.tensors, kv_caches.group_data_refs, []
        self.host = [torch.zeros(num_chunks, tensor.page_size_bytes, dtype=torch.int8) for tensor in self.device]

    def copy(self, job_id, gpu_spec, cpu_spec, *, to_host):
        assert len(gpu_spec.block_ids) == len(cpu_spec.block_ids) == sum(gpu_spec.group_sizes)
        first = 0
        for refs, count in zip(self.refs, gpu_spec.group_sizes, strict=True):
            rows = [torch.from_numpy(spec.block_ids[first : first + count]).long() for spec in (gpu_spec, cpu_spec)]
            for ref in refs if count else ():
                size = ref.page_size_bytes
                device, host = self.device[ref.tensor_idx].tensor[:, :size], self.host[ref.tensor_idx][:, :size]
                if to_host:
                    host[rows[1]] = device[rows[0]]
                else:
                    device[rows[0]] = host[rows[1]]
            first += count
        self.finished.append(TransferResult(job_id=job_id, success=True))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        return self.copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self.copy(job_id, dst_spec, src_spec, to_host=False)

    def get_finished(self):
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids):
        """Nothing is ever under way."""


def get_worker(self, kv_caches):
    assert self.blocks_per_chunk == 1
    if not self._worker:
        self._worker = CopyingWorker(kv_caches, self.num_chunks)
    return self._worker


CPUOffloadingSpec.get_worker = get_worker
