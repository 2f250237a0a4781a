"""A connector to stand beside KVortex's in a real engine on a CPU: keeps every other prompt, whole blocks, in a dict.

It writes as soon as a step begins, heeds no stream and waits for nobody. The engine core runs in one process with its
worker, so that both instances share the dict.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1 import base

KEPT = {}  # hash of a block -> its content in every layer
NUM_LOADED = 0


@dataclass
class Blocks(base.KVConnectorMetadata):
    loads: list = field(default_factory=list)  # (request, [(hash, block), ...])
    saves: list = field(default_factory=list)  # (hash, block)


class EngineOther(base.KVConnectorBase_V1, base.SupportsHMA):
    def __init__(self, vllm_config, role, kv_cache_config=None):
        super().__init__(vllm_config, role, kv_cache_config)
        self.block_tokens = vllm_config.cache_config.block_size
        self.num_blocks = kv_cache_config.num_blocks
        self.found, self.tables, self.step = {}, {}, Blocks()
        self.layers, self.received = [], set()

    # ---- in the scheduler --------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        first, hashes = num_computed_tokens // self.block_tokens, request.block_hashes
        count = 0
        while first + count < len(hashes) and bytes(hashes[first + count]) in KEPT:
            count += 1
        self.found[request.request_id] = first
        return count * self.block_tokens, count > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.tables[request.request_id] = request, list(blocks.get_block_ids()[0])
        first = self.found.pop(request.request_id, 0)
        if num_external_tokens:
            last = first + num_external_tokens // self.block_tokens
            hashes, block_ids = request.block_hashes[first:last], blocks.get_block_ids()[0][first:last]
            pairs = [(bytes(name), block) for name, block in zip(hashes, block_ids, strict=True)]
            self.step.loads.append((request.request_id, pairs))

    def build_connector_meta(self, output):
        for name, count in output.num_scheduled_tokens.items():
            request, table = self.tables[name]
            hashes = request.block_hashes
            full = (request.num_computed_tokens + count) // self.block_tokens
            if hashes and hashes[0][-1] % 2:
                self.step.saves += [(bytes(name), block) for name, block in zip(hashes[:full], table, strict=False)]
        step, self.step = self.step, Blocks()
        return step

    def request_finished(self, request, block_ids):
        self.tables.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids)

    def reset_cache(self):
        KEPT.clear()
        return True

    # ---- in the worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches):
        self.layers = [layer.movedim(layer.shape.index(self.num_blocks), 0) for layer in kv_caches.values()]

    def start_load_kv(self, forward_context, **kwargs):
        global NUM_LOADED
        for request_id, blocks in self._get_connector_metadata().loads:
            for name, block in blocks:
                for layer, content in zip(self.layers, KEPT[name], strict=True):
                    layer[block] = content
            NUM_LOADED += len(blocks)
            self.received.add(request_id)

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        for name, block in self._get_connector_metadata().saves:
            if name not in KEPT:
                KEPT[name] = [layer[block].clone() for layer in self.layers]

    def get_finished(self, finished_req_ids):
        received, self.received = self.received, set()
        return None, received or None
