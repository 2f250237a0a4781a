"""vLLM's KV cache groups: which blocks of each a request needs to go on from some token, and which are worth keeping.

Layers that forget alike make a group, which has a block table of its own. All groups draw their blocks from one pool
on the device, so a slot holds a block of any of them.
"""

import math
from dataclasses import dataclass

import numpy as np

from kvortex import ConfigError
from kvortex.integrations.vllm.keys import as_bytes, keys_of

# Which blocks of a group a request needs to go on from some length.
RUN = "run"  # every block before it
WINDOW = "window"  # those with the last tokens
CHUNK = "chunk"  # those from the beginning of the chunk that the next token is in
STATE = "state"  # the last one

# By name, because not every version has all. And later versions derive kinds that forget otherwise from these.
KINDS = {
    "FullAttentionSpec": RUN,
    "MLAAttentionSpec": RUN,
    "SinkFullAttentionSpec": RUN,
    "TQFullAttentionSpec": RUN,
    "SlidingWindowSpec": WINDOW,
    "SlidingWindowMLASpec": WINDOW,
    "ChunkedLocalAttentionSpec": CHUNK,
    "MambaSpec": STATE,
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """What the connector must know of one group.

    Attributes
    ----------
    index : int
        Place among vLLM's groups.
    kind : {RUN, WINDOW, CHUNK, STATE}
    block_tokens : int
        Tokens of a block.
    hashes_per_block : int, default 1
        How many of vLLM's hashes a block has: vLLM may hash a request in pieces smaller than a block.
    reach_tokens : int, default 0
        WINDOW: tokens that a token sees, itself included. CHUNK: tokens of a chunk.
    hit_tokens : int, default 1
        Hits are multiples of it, whichever groups are kept: vLLM also aligns hits to groups that are left alone.
    peek_blocks : int, default 0
        Blocks behind a hit that must be there too: with EAGLE or MTP, vLLM computes the last block that it finds once
        more, so the hit ends before that block.
    """

    index: int
    kind: str
    block_tokens: int
    hashes_per_block: int = 1
    reach_tokens: int = 0
    hit_tokens: int = 1
    peek_blocks: int = 0

    @property
    def hash_tokens(self):
        """Tokens of one of vLLM's block hashes, the same in all groups."""
        return self.block_tokens // self.hashes_per_block

    def first_needed(self, length):
        """The first block that a request still needs when `length` tokens are computed; ints, or arrays of them.

        vLLM frees no block from this one on.
        """
        if self.kind == WINDOW:
            return not_negative(length - self.reach_tokens + 1) // self.block_tokens
        if self.kind == CHUNK:
            return length // self.reach_tokens * self.reach_tokens // self.block_tokens
        if self.kind == STATE:
            return not_negative(length // self.block_tokens - 1)
        return length * 0

    def needed(self, length, first_tokens=0):
        """First and end of the blocks for a hit of this length, without what the device has for `first_tokens`."""
        begin = max(self.first_needed(length), first_tokens // self.block_tokens)
        return begin, max(begin, -(-length // self.block_tokens))

    def most_blocks(self, num_tokens, step_tokens):
        """Most device blocks that a request holds for `num_tokens` and the next one."""
        whole = num_tokens // self.block_tokens + 1
        if self.kind == STATE:
            return 2
        if self.kind == RUN:
            return whole
        return min(whole, -(-(self.reach_tokens + step_tokens) // self.block_tokens) + 1)

    def worth_keeping(self, first, end, boundaries, interval):
        """Which of the blocks `first` to `end` a later hit can use: a list of (first, end), ascending.

        Parameters
        ----------
        first, end : int
        boundaries : iterable of int
            Lengths of hits to be expected.
        interval : int or None
            Distance in tokens of further such lengths, 0: no further ones. None: all blocks are kept.
        """
        if self.kind in (RUN, CHUNK) or interval is None:  # vLLM's own cache keeps all of a chunk, too
            return [(first, end)] if first < end else []
        lengths = set(boundaries)
        if interval:
            last = end * self.block_tokens + self.reach_tokens
            lengths.update(range(first * self.block_tokens // interval * interval, last + interval, interval))
        spans = []
        for length in sorted(lengths):
            begin = max(first, self.first_needed(length), spans[-1][1] if spans else 0)
            behind = min(end, length // self.block_tokens + self.peek_blocks)
            if begin < behind:
                spans.append((begin, behind))
        return spans


def not_negative(number):
    """The larger of the number and 0, for ints and arrays: `max` takes ints only, and numpy's is slow for them."""
    return (number + abs(number)) // 2


def groups_of(kv_cache_config, *, hash_tokens=None, parallel_tokens=1, drafts=False):
    """The groups whose blocks are kept, in the order in which their blocks are used: RUNs last.

    Parameters
    ----------
    kv_cache_config : KVCacheConfig
    hash_tokens : int, optional
        Tokens of one of vLLM's block hashes; by default those of a block.
    parallel_tokens : int, default 1
        Ranks that share the tokens of a block of attention (context parallelism).
    drafts : bool, default False
        Whether a drafter shortens hits, see `Group.peek_blocks`.

    Raises
    ------
    ConfigError
        A kind of group is not known, or blocks are no whole number of hashes.
    """
    all_groups = kv_cache_config.kv_cache_groups
    none_is_marked = not any(getattr(group, "is_eagle_group", False) for group in all_groups)
    # vLLM looks for no blocks of groups that are not cacheable, so none would be loaded.
    is_kept = [getattr(group.kv_cache_spec, "prefix_cacheable", True) for group in all_groups]
    left_alone = [group for group, kept in zip(all_groups, is_kept, strict=True) if not kept]
    hit_tokens = math.lcm(*(getattr(group.kv_cache_spec, "block_size", 1) for group in left_alone))
    groups = []
    for index, group in enumerate(all_groups):
        if not is_kept[index]:
            continue
        spec = group.kv_cache_spec
        require_plain(index, group)
        spec = one_of_all(spec)
        kind = KINDS[type(spec).__name__]
        block_tokens = spec.block_size * (1 if kind == STATE else parallel_tokens)
        hashes_per_block, rest = divmod(block_tokens, hash_tokens or block_tokens)
        if rest:
            raise ConfigError(
                f"KV cache group {index} has blocks of {block_tokens} tokens, and vLLM hashes {hash_tokens} at a time; "
                f"please report this with your model and vLLM version"
            )
        reach = {
            WINDOW: lambda spec: spec.sliding_window + getattr(spec, "extra_retained_tokens", 0),
            CHUNK: lambda spec: spec.attention_chunk_size,
        }
        groups.append(
            Group(
                index=index,
                kind=kind,
                block_tokens=block_tokens,
                hashes_per_block=hashes_per_block,
                reach_tokens=reach.get(kind, lambda spec: 0)(spec),
                hit_tokens=hit_tokens,
                peek_blocks=int(drafts and kind != STATE and (none_is_marked or group.is_eagle_group)),
            )
        )
    if not groups:
        raise ConfigError("vLLM looks for blocks of none of this model's KV cache groups, so nothing can be kept")
    return tuple(sorted(groups, key=lambda group: group.kind == RUN))


def require_plain(index, group):
    """Refuse groups that vLLM serves in ways of their own."""
    role = getattr(group, "role", None)
    unusual = {
        "enable_kv_transfer = False": not getattr(group, "enable_kv_transfer", True),
        "host_resident = True": getattr(group, "host_resident", False),
        f"role = {role}": role is not None and role.name != "DEFAULT",
        "prefix_replay_tokens": getattr(group.kv_cache_spec, "prefix_replay_tokens", 0) > 0,
    }
    for what, is_there in unusual.items():
        if is_there:
            raise ConfigError(
                f"KVortexConnector cannot keep KV cache group {index} of this model, which has {what}; serve the model "
                f"without --kv-transfer-config, and please report it"
            )


def one_of_all(spec):
    """The spec of a group. If its layers have their own, that of one: they do not differ in what matters here."""
    specs = list(getattr(spec, "kv_cache_specs", {0: spec}).values())
    for one in specs:
        if type(one).__name__ not in KINDS:
            known = ", ".join(sorted(KINDS))
            raise ConfigError(
                f"KVortexConnector cannot keep a KV cache of {type(one).__name__}, only of {known}; serve this model "
                f"without --kv-transfer-config, and please report it"
            )
    return specs[0]


def way_out_of_groups(groups, num_groups):
    """The end of an error message: the option that helps if the groups are the problem, or nothing if it would not.

    With that option vLLM gives layers with a window or with chunks the blocks of full attention, if the model has
    layers of full attention, too, and if all windows, all chunks and all blocks are of one size. Otherwise it does not.
    """
    kinds = {group.kind for group in groups}
    sizes = {(group.kind, group.block_tokens, group.reach_tokens) for group in groups}
    is_one_size = len({group.block_tokens for group in groups}) == 1 and len(sizes) == len(kinds)
    if len(groups) != num_groups or not {RUN} < kinds <= {RUN, WINDOW, CHUNK} or not is_one_size:
        return ""
    return ", or start vLLM with --disable-hybrid-kv-cache-manager, which serves all layers as one of full attention"


def align_tokens(groups):
    """Hits are multiples of it."""
    return math.lcm(*(math.lcm(group.block_tokens, group.hit_tokens) for group in groups))


@dataclass
class Hit:
    """What the index has of a request."""

    length: int  # tokens, those before included
    run: int  # tokens that groups of full attention alone could serve
    is_growing: bool  # the next block is being saved


def longest_hit(index, groups, request, first_tokens, limit_tokens, writing):
    """The longest hit that every group can serve.

    Parameters
    ----------
    index : BlockIndex
        Not changed.
    groups : tuple of Group
        As from `groups_of`.
    request
        vLLM's.
    first_tokens : int
        Tokens that the device has, a multiple of `align_tokens`. The hit is at least as long.
    limit_tokens : int
        All tokens of the request, or all but the last. If the last token ends a block that is there, a hit may end
        before that token: vLLM computes it into the loaded block once more. Not with states: the state at the block's
        end includes that token already.
    writing : set of bytes
        Keys of blocks that are being saved.
    """
    align, is_growing, most = align_tokens(groups), False, limit_tokens
    kinds = {group.kind for group in groups}
    if limit_tokens < request.num_tokens and request.num_tokens % align == 0 and STATE not in kinds and kinds != {RUN}:
        most = request.num_tokens
    # Behind a longer hit, the request itself has no whole block to peek at.
    longest = min((most // group.block_tokens - group.peek_blocks) * group.block_tokens for group in groups)
    longest = most if not any(group.peek_blocks for group in groups) else max(first_tokens, longest)
    for group in groups:
        if group.kind == RUN:
            begin = first_tokens // group.block_tokens
            keys = keys_of(request, group, begin, longest // group.block_tokens + group.peek_blocks)
            _, leading = index.lookup(keys)
            is_growing |= leading < len(keys) and keys[leading].tobytes() in writing
            longest = min(longest, (begin + max(0, leading - group.peek_blocks)) * group.block_tokens)
    if kinds == {RUN}:
        longest = max(first_tokens, longest - longest % align)
        return Hit(longest, longest, is_growing)
    lengths = np.arange(first_tokens, max(first_tokens, longest) + 1, align)
    if longest == request.num_tokens > limit_tokens:
        lengths[-1] = limit_tokens
    for group in groups:
        if group.kind != RUN:
            begin = first_tokens // group.block_tokens
            ends = -(-lengths // group.block_tokens) + group.peek_blocks - begin
            keys = keys_of(request, group, begin, most // group.block_tokens)[: ends[-1]]
            there, _ = index.lookup(keys)
            missing = np.concatenate([[0], np.cumsum(~there)])
            is_known = ends <= len(keys)
            ends = np.minimum(ends, len(keys))
            firsts = np.minimum(not_negative(group.first_needed(lengths) - begin), ends)
            is_served = is_known & (missing[ends] == missing[firsts])
            is_served[0] = True  # what the device has needs nothing
            lacking = keys[firsts[-1] : ends[-1]][~there[firsts[-1] : ends[-1]]]
            is_growing |= not is_served[-1] and len(lacking) > 0 and writing.issuperset(as_bytes(lacking))
            lengths = lengths[is_served]
    return Hit(int(lengths[-1]), longest, bool(is_growing))
