"""A connector to stand beside KVortex's in a `MultiConnector`: what it has, it writes itself, as one that reads over a
network does. It heeds no stream and waits for nobody, and its sends read blocks of requests that are over.

It lives in the rig, which is the network: it knows what the KV of each token must be.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1 import base


@dataclass
class Pull:
    """Tokens of a request that another engine has computed."""

    name: str
    first: int  # token
    last: int
    block_ids: list  # of all of the request


@dataclass
class OtherMetadata(base.KVConnectorMetadata):
    pulls: list = field(default_factory=list)
    sends: list = field(default_factory=list)  # (request, its number of tokens with KV, its blocks)


class OtherConnector(base.KVConnectorBase_V1, base.SupportsHMA):
    """Options: ``load_async``; ``pull_steps`` and ``send_steps``, how many steps a pull and a send take."""

    rig = None  # of those that are made next

    def __init__(self, vllm_config, role, kv_cache_config=None):
        super().__init__(vllm_config, role, kv_cache_config)
        options = self._kv_transfer_config.kv_connector_extra_config
        self.load_async = options["load_async"]
        self.pull_steps, self.send_steps = options.get("pull_steps", 0), options.get("send_steps", 0)
        self.network, self.meta = self.rig, OtherMetadata()
        self.found = {}  # request -> tokens computed before ours
        self.caches, self.pulling, self.sending, self.invalid = None, [], [], set()

    # ---- in the scheduler --------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        offered = min(self.network.offered.get(request.request_id, 0), request.num_tokens - (not self.load_async))
        count = max(0, offered - num_computed_tokens)
        self.found[request.request_id] = num_computed_tokens
        return count, self.load_async and count > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        first = self.found.pop(request.request_id, 0)
        if num_external_tokens:
            del self.network.offered[request.request_id]  # once, like NIXL: whoever is preempted computes
            pull = Pull(request.request_id, first, first + num_external_tokens, list(blocks.get_block_ids()[0]))
            self.meta.pulls.append(pull)

    def build_connector_meta(self, scheduler_output):
        meta, self.meta = self.meta, OtherMetadata()
        return meta

    def request_finished(self, request, block_ids):
        if not self.send_steps or not request.num_computed_tokens or request.request_id in self.network.aborted:
            return False, None
        num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        self.meta.sends.append((request.request_id, num_tokens, block_ids))
        return True, {"remote": request.request_id}

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids[0])

    # ---- in a worker -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches):
        self.caches = kv_caches

    def start_load_kv(self, forward_context, **kwargs):
        meta = self._get_connector_metadata()
        for pull in meta.pulls:
            self.network.pull(self, pull)  # at once: this is where a block that is still being saved is lost
            self.pulling.append([self.pull_steps, pull])
        self.sending += [[self.send_steps, send] for send in meta.sends]

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass

    def get_finished(self, finished_req_ids):
        received = {pull.name for pull in self.due(self.pulling)} if self.load_async else set()
        sent = self.due(self.sending)
        for send in sent:
            self.network.send(self, *send)
        return {name for name, _, _ in sent} or None, received or None

    def due(self, waiting):
        """What has waited for its number of steps."""
        over = [what for steps, what in waiting if steps == 0]
        waiting[:] = [[steps - 1, what] for steps, what in waiting if steps]
        return over

    def get_block_ids_with_load_errors(self):
        invalid, self.invalid = self.invalid, set()
        return invalid
