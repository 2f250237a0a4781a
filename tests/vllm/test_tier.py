"""A disk below the pool: what it keeps comes back, over restarts, and is never wrong."""

import fcntl
import gc
import os
import resource
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rig import HAS_TRANSFER_RESULTS, HAS_WORKER_METADATA
from test_faults import refused

from kvortex import ConfigError
from kvortex.index import BlockIndex, ReserveStatus
from kvortex.integrations.vllm import worker_tier
from kvortex.integrations.vllm.connector import KVortexConnector
from kvortex.integrations.vllm.keys import keys_of
from kvortex.integrations.vllm.messages import GET, PUT, RANGE_SLOTS, Found, Moved, WorkerReport
from kvortex.integrations.vllm.options import ConnectorOptions
from kvortex.integrations.vllm.tier import PrefillRate, RanksStore, Tier
from kvortex.slots import Slots
from kvortex.tiers.base import BlockStatus

LONG_MS = 20_000
NUM_BLOCKS = 10  # of a prompt, of 16 tokens each


@pytest.fixture
def disk(tmp_path):
    return {
        "disk_path": str(tmp_path),
        "disk_bytes": "64MiB",
        "namespace": "the rig",
        "prefill_tokens_per_s": 0,
        "promote_timeout_ms": LONG_MS,
    }


@pytest.fixture
def prompts(prompt):
    return [prompt(number, NUM_BLOCKS * 16 + 1) for number in range(6)]


@pytest.fixture
def start(make_rig, disk):
    """Starts an engine on that disk, as if vLLM had taken its time to load the model."""

    def start(**options):
        extra = {**disk, **options.pop("extra", {})}
        rig = make_rig(extra=extra, **options)
        assert all(half.tier.adoption.wait(LONG_MS) for half in rig.halves)
        return rig

    return start


def serve(rig, prompts, name):
    """Blocks that each prompt finds."""
    found = [rig.serve(f"{name}{number}", prompt) // 16 for number, prompt in enumerate(prompts)]
    rig.require_clean()
    return found


def segments(tmp_path):
    return sorted(path for path in tmp_path.rglob("*.segment"))


def test_blocks_on_disk_are_there_after_a_restart(start, prompts):
    first = start()
    assert serve(first, prompts, "a") == [0] * 6
    first.close()
    assert serve(start(), prompts, "b") == [NUM_BLOCKS] * 6


def test_what_was_saved_last_reaches_the_disk_although_no_request_follows(start, prompts):
    rig = start(num_slots=200)
    rig.add("a", prompts[0])
    rig.step_until_served()
    rig.step()  # in which vLLM tells that the request is over
    rig.close()
    assert serve(start(), prompts[:1], "b") == [NUM_BLOCKS]


def test_a_block_is_written_to_disk_when_its_copy_is_over_and_not_before(start, prompts, host):
    rig = start(num_slots=200)
    host.hold()
    rig.add("a", prompts[0])
    rig.step_until_served()
    rig.step()
    tier = rig.halves[0].tier
    assert tier.waiting and not tier.running and not tier.moved
    host.release()
    rig.close()
    assert serve(start(), prompts[:1], "b") == [NUM_BLOCKS]


def test_blocks_that_the_pool_cannot_hold_come_back_from_the_disk(start, prompts):
    rig = start(num_slots=24)
    serve(rig, prompts, "a")
    assert rig.index.num_ready == 24
    rig.forget_device()
    assert serve(rig, prompts, "b") == [NUM_BLOCKS] * 6
    assert rig.half.tier.promoter.num_promoted >= 6 * NUM_BLOCKS - 24


def test_a_promoted_block_counts_for_the_request_that_waited_in_the_next_step(start, prompts):
    rig = start(num_slots=24)
    serve(rig, prompts, "a")
    rig.forget_device()
    rig.add("b", prompts[0])
    while not rig.half.tier.promoter.num_promoted:
        rig.step()
        assert "b" not in rig.computed_at_first
    rig.index.evict(24)  # what others may do meanwhile
    rig.step()
    assert "b" in rig.half.loading
    rig.run()
    rig.require_clean()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_block_that_is_damaged_in_one_rank_is_a_miss_for_all(start, prompts, tmp_path, num_ranks):
    rig = start(num_ranks=num_ranks)
    serve(rig, prompts, "a")
    rig.close()
    path = segments(tmp_path)[-1]
    content = bytearray(path.read_bytes())
    for at in range(4096 + 4096 + 100, len(content), 8192):  # the payload of every slot
        content[at] ^= 1
    path.write_bytes(content)
    again = start(num_ranks=num_ranks)
    assert serve(again, prompts, "b") == [0] * 6, "and a request waits once, not for ever"
    assert again.half.tier.promoter.misses["PAYLOAD_DAMAGED"] >= 6
    again.forget_device()
    again.reset()
    assert again.half.tier.catalogue.num_ready == 0


def test_what_one_rank_has_lost_is_a_miss(start, prompts, tmp_path):
    rig = start(num_ranks=2)
    serve(rig, prompts, "a")
    rig.close()
    segments(tmp_path)[-1].unlink()
    assert serve(start(num_ranks=2), prompts, "b") == [0] * 6


@pytest.mark.parametrize("groups", [("full", "window:64"), ("window:48", "window:80"), ("full", "chunk:64")])
def test_groups_that_forget_come_back_whole(start, prompts, groups):
    options = {"groups": groups, "num_slots": 40, "num_blocks": 131}
    rig = start(**options)
    serve(rig, prompts, "a")
    rig.close()
    again = start(**options)
    assert serve(again, prompts, "b") == [NUM_BLOCKS] * 6
    assert again.half.tier.promoter.num_promoted


@pytest.mark.skipif(not HAS_TRANSFER_RESULTS, reason="this vLLM keeps no states with a connector")
def test_states_come_back(start, prompt):
    options = {"groups": ("full", "state"), "block_tokens": 64, "num_slots": 60, "num_blocks": 131}
    prompts = [prompt(number, 64 * 5 + 1) for number in range(4)]
    rig = start(**options)
    serve(rig, prompts, "a")
    rig.close()
    again = start(**options)
    assert [again.serve(f"b{number}", prompt) // 64 for number, prompt in enumerate(prompts)] == [5] * 4
    again.require_clean()
    assert again.half.tier.promoter.num_promoted


def test_nothing_that_was_saved_between_a_reset_and_the_end_is_served_after_a_restart(start, prompts):
    rig = start()
    serve(rig, prompts[:3], "a")
    assert rig.reset()  # new weights, which nobody names
    assert serve(rig, prompts, "b") == [0] * 6
    rig.forget_device()
    assert serve(rig, prompts, "c") == [NUM_BLOCKS] * 6
    rig.close()
    again = start()  # with the weights that the first had at its start: what is left of its blocks may be served
    assert serve(again, prompts, "d")[3:] == [0] * 3


def test_a_reset_in_the_middle_of_writing_and_reading_serves_nothing_old(start, prompts, faulty_disk):
    rig = start(num_slots=24)
    serve(rig, prompts, "a")
    rig.forget_device()
    faulty_disk.plan("any", "hang")
    rig.add("b", prompts[0])
    rig.add("c", [*prompts[5], 7, 8, 9] * 2)
    for _ in range(20):
        rig.step()
    faulty_disk.wait_hanging()
    assert rig.reset()
    faulty_disk.mend()
    rig.run()
    serve(rig, prompts, "d")


def test_fifty_requests_over_half_of_a_pool_read_each_block_once_and_refuse_no_save(start, prompt):
    prompts = [prompt(number, NUM_BLOCKS * 16 + 1) for number in range(50)]
    rig = start(num_slots=100, num_blocks=67, extra={"disk_bytes": "64MiB"})
    serve(rig, prompts, "a")
    rig.forget_device()
    tier, index = rig.half.tier, rig.index
    reserve, refused = index.reserve, []

    class Watched:
        def __getattr__(self, name):
            return getattr(index, name)

        def reserve(self, *args, **settings):
            answer = reserve(*args, **settings)
            refused.append(int((answer[1] == ReserveStatus.FULL).sum()))
            return answer

    rig.half.index = Watched()
    ready_before, before = index.num_ready, tier.promoter.num_promoted
    for number, tokens in enumerate(prompts):
        rig.add(f"b{number}", tokens)
    most = 0
    while rig.scheduler.requests:
        rig.step()
        most = max(most, tier.promoter.num_pinned)
    rig.run()
    rig.half.index = index
    rig.require_clean()
    assert sum(refused) == 0, "a save was refused"
    assert most <= 50
    found = [rig.computed_at_first[f"b{number}"] // 16 for number in range(50)]
    assert found == [NUM_BLOCKS] * 50
    promoted = tier.promoter.num_promoted - before
    assert 500 - ready_before <= promoted <= 500, "a block that had come was evicted before it was read"


def one_waits_for_a_hung_read(start, prompts, faulty_disk):
    """An engine whose request "b" waits for blocks from a disk that does not answer."""
    rig = start(num_slots=24)
    serve(rig, prompts, "a")
    rig.forget_device()
    faulty_disk.plan("read", "hang")
    rig.add("b", prompts[0])
    for _ in range(5):
        rig.step()
    faulty_disk.wait_hanging()
    return rig


def test_a_request_that_is_aborted_leaves_no_pin(start, prompts, faulty_disk):
    rig = one_waits_for_a_hung_read(start, prompts, faulty_disk)
    rig.abort("b")
    rig.step()
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)
    assert serve(rig, prompts, "c") == [NUM_BLOCKS] * 6


@pytest.mark.parametrize("paths", ["", [], ["/tmp", ""], "a\0b", ["/tmp/x", "/tmp/x/."], [["/tmp"]], 5, None, True])
def test_folders_that_are_none_are_refused_before_anything_is_loaded(paths):
    with pytest.raises(ConfigError, match="path"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": "1MiB", "disk_path": paths, "disk_bytes": "1GiB"})


@pytest.mark.parametrize("more", [
    {"promote_timeout_ms": 10**400}, {"promote_timeout_ms": "5"}, {"flush_timeout_ms": 1 << 70}, {"disk_bytes": True},
    {"disk_bytes": 0}, {"disk_bytes": "many"}, {"write_bytes_per_s": -1}, {"prefill_tokens_per_s": 1.5},
    {"namespace": ""}, {"namespace": 7}, {"disk_codec": "zip"}, {"disk_level": 5}, {"disk_level": 1.5},
    {"disk_slot_ratio": "3"},
])  # fmt: skip
def test_values_that_are_none_are_refused_by_name(more):
    with pytest.raises(ConfigError, match=next(iter(more))):
        ConnectorOptions.parse({"cpu_pool_size_bytes": "1MiB", "disk_path": "/tmp/x", "disk_bytes": "1GiB", **more})


@pytest.mark.parametrize("more", [{}, {"disk_codec": "ecsq"}, {"codec": "q8"}])
def test_a_codec_of_the_disk_needs_to_see_each_layer_as_one_of_the_pool_does(more):
    disk = {"disk_path": "/tmp/x", "disk_bytes": "1GiB"}
    options = ConnectorOptions.parse({"cpu_pool_size_bytes": "1MiB", **disk, **more})
    assert options.is_lossy == bool(more)
    worker = SimpleNamespace(worker=SimpleNamespace(options=options))
    assert KVortexConnector.prefer_cross_layer_blocks.fget(worker) == (not more)


def test_verify_is_refused_beside_a_lossy_disk():
    disk = {"disk_path": "/tmp/x", "disk_bytes": "1GiB", "disk_codec": "ecsq"}
    with pytest.raises(ConfigError, match="verify compares blocks byte for byte"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": "1MiB", "verify": True, **disk})


@pytest.mark.parametrize("name", ["disk_bytes", "namespace", "promote_timeout_ms", "write_bytes_per_s", "disk_level"])
def test_a_setting_of_a_disk_without_one_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} needs a lower tier"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": "1MiB", name: 5})


def wait_until_clean(rig):
    """Step until the stores have told of all that they were asked for."""
    deadline = time.monotonic() + LONG_MS / 1000
    while rig.half.tier.store._batches:
        assert time.monotonic() < deadline
        rig.step()
    rig.require_clean()


@pytest.mark.parametrize("call", ["read", "write", "any"])
def test_no_request_waits_longer_for_a_hung_disk_than_it_may(start, prompts, faulty_disk, call):
    rig = start(num_slots=24, extra={"promote_timeout_ms": 100})
    serve(rig, prompts, "a")
    rig.forget_device()
    faulty_disk.plan(call, "hang")
    began = time.monotonic()
    for number, tokens in enumerate(prompts):
        rig.add(f"b{number}", tokens)
    rig.step_until_served()
    assert time.monotonic() - began < LONG_MS / 1000
    assert rig.wrong_tokens == 0
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)


@pytest.mark.parametrize("how", ["EIO", "ENOSPC", "short", "lie"])
@pytest.mark.parametrize("call", ["read", "write"])
def test_a_failing_or_lying_disk_serves_no_wrong_block(start, prompts, faulty_disk, call, how):
    rig = start(num_slots=24)
    if call == "write":
        faulty_disk.plan(call, how)
    serve(rig, prompts, "a")
    rig.forget_device()
    faulty_disk.plan(call, how)
    serve(rig, prompts, "b")
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)


def test_a_slot_that_a_rank_still_writes_from_is_not_given_to_others(start, prompts, faulty_disk):
    """One rank could not save a block, the other has saved it and writes it to its disk."""
    rig = start(num_ranks=2, num_slots=24)
    faulty_disk.plan("write", "hang")
    rig.halves[1].submit = lambda *args, **settings: None  # no job is free in this rank
    rig.add("a", prompts[0])
    rig.step_until_served()
    for _ in range(10):
        rig.step()
    faulty_disk.wait_hanging()
    behind = [slot for one in rig.half.tier.behind.values() for slot in one.slots.tolist()]
    assert behind and rig.index.num_writing == len(behind), "none of these may be used for another block"
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)
    assert rig.half.tier.catalogue.num_ready == 0


def test_a_tier_slot_is_there_for_others_only_when_every_rank_is_done_with_it(start, prompts):
    rig = start(num_ranks=2, num_slots=24)
    serve(rig, prompts[:2], "a")
    told, tier = [], rig.half.tier
    end = type(tier.store).reported

    def reported(moved):
        told.extend((number, ranks) for number, (ranks, _) in moved.items())
        end(tier.store, moved)

    tier.store.reported = reported
    held = rig.halves[1].tier
    collect, held.collect = held.collect, lambda: None  # this rank says nothing yet
    rig.add("b", prompts[2])
    rig.step_until_served()
    for _ in range(20):
        rig.step()
    assert told and tier.catalogue.num_writing > 0, "one rank of two has written them"
    held.collect = collect
    rig.run()
    rig.require_clean()
    assert tier.catalogue.num_writing == 0


def test_messages_name_each_batch_once(start, prompts):
    rig = start(num_slots=24)
    seen, half = [], rig.half
    build = half.build

    def watched(output):
        step = build(output)
        seen.extend((transfer.kind, transfer.number) for transfer in step.tier if transfer.kind in (PUT, GET))
        return step

    half.build = watched
    serve(rig, prompts, "a")
    rig.forget_device()
    serve(rig, prompts, "b")
    assert len(set(seen)) == len(seen) and {kind for kind, _ in seen} == {PUT, GET}
    del half.build


def test_a_step_does_not_go_over_the_whole_pool_for_the_disks_sake(start, prompt):
    rig = start(num_slots=400)
    serve(rig, [prompt(number, NUM_BLOCKS * 16 + 1) for number in range(30)], "a")
    tier = rig.half.tier
    rig.index.offer_again()
    taken = []
    for _ in range(12):
        before = tier.cleaner.num_taken
        rig.step()
        taken.append(tier.cleaner.num_taken - before)
    assert sum(taken) == 300 and max(taken) <= 200


def test_another_namespace_finds_nothing(start, prompts):
    first = start(extra={"namespace": "one"})
    serve(first, prompts, "a")
    first.close()
    assert serve(start(extra={"namespace": "other"}), prompts, "b") == [0] * 6


def test_blocks_that_come_back_and_go_again_are_told_to_routers(start, prompts):
    rig = start(num_slots=24, events=True)
    serve(rig, prompts, "a")
    rig.forget_device()
    serve(rig, prompts, "b")
    there = set()
    for event in rig.events:
        if getattr(event, "medium", None) != "CPU":
            continue
        names = set(event.block_hashes)
        if type(event).__name__ == "BlockStored":
            there |= names
        else:
            there -= names
    assert len(there) == rig.index.num_ready == 24


def test_a_save_that_met_a_promotion_which_came_to_nothing_is_offered_again(start, prompts, faulty_disk):
    rig = one_waits_for_a_hung_read(start, prompts, faulty_disk)
    wishes = {"kvortex": {"load": False}}
    rig.add("c", prompts[0], 60, sampling={"extra_args": {"kv_transfer_params": wishes}})
    for _ in range(20):
        rig.step()
    request = rig.requests["c"]
    keys = keys_of(request, rig.half.groups[0], 0, NUM_BLOCKS)
    assert request.num_computed_tokens > NUM_BLOCKS * 16 and not rig.index.lookup(keys)[0].any()
    rig.half.tier.discard(keys)
    faulty_disk.mend()
    rig.run()
    assert rig.index.lookup(keys)[1] == NUM_BLOCKS
    rig.require_clean()


@pytest.mark.parametrize("pipelined", [False, True])
def test_what_was_computed_from_a_failed_load_never_reaches_the_disk(start, prompts, host, pipelined):
    rig = start(num_slots=200, load_async=False, pipelined=pipelined)
    serve(rig, prompts[:1], "a")
    rig.forget_device()
    longer = [*prompts[0][:-1], *prompts[1]]
    with refused(host, rig, "H2D"):
        rig.add("b", longer)
        while not any(half.has_failed for half in rig.halves):
            rig.step()
    rig.close()  # before the scheduler could say what it thinks of it
    serve(start(num_slots=200), [longer], "c")


def test_what_is_to_be_erased_is_not_written_afterwards(start, prompts, host):
    rig = start(num_slots=200)
    host.hold()
    rig.add("a", prompts[0])
    rig.step_until_served()
    behind, *_ = rig.half.tier.behind.values()
    rig.half.discard(behind.keys[:3])
    rig.step()
    host.release()
    rig.close()
    assert serve(start(num_slots=200), prompts[:1], "b") == [0]


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM shows no evictions")
def test_with_on_evict_a_save_that_finds_no_job_is_not_written(start, prompts):
    rig = start(num_slots=200, num_blocks=29, max_tokens=512, extra={"save": "on_evict"})
    half, seen = rig.halves[0], []
    submit = half.submit

    def refuse(queue, transfer, stream):
        if queue is not half.saver:
            return submit(queue, transfer, stream)
        seen.append(transfer)
        return None

    half.submit = refuse
    rig.add("a0", prompts[0])
    rig.step_until_served()
    rig.add("a1", [*prompts[1], *prompts[2], *prompts[3]][: 27 * 16 + 8])
    while rig.scheduler.requests and not seen:
        rig.step()
    rig.step()
    assert seen
    rig.close()
    serve(start(num_slots=200, num_blocks=131), prompts, "b")


def test_the_next_engine_of_a_process_does_not_get_the_disk_of_the_one_before(start, prompts):
    first = start()
    kept = first.workers[0]
    first.caches.clear()
    gc.collect()
    second = start(extra={"namespace": "another model"})
    with pytest.raises(ConfigError, match="another engine of this process"):
        kept.register_kv_caches(second.caches[0])


def pin(rig, prompt):
    """A user's request keeps its blocks in the pool."""
    request = rig.add("pin", prompt)
    request.kv_transfer_params = {"kvortex": {"pin_s": 3600}}
    rig.run()
    assert rig.index.num_pinned


def blocks_found(rig, name, prompt, most_s=2):
    """Of a request, from its arrival to its first step, which comes soon."""
    began = time.monotonic()
    rig.add(name, prompt)
    while name not in rig.computed_at_first:
        rig.step()
    assert time.monotonic() - began < most_s
    return rig.computed_at_first[name] // 16


def test_half_of_a_long_prompt_comes_although_others_hold_something(start, prompts):
    rig = start(num_slots=24, num_blocks=131)
    long = [*prompts[0][:-1], *prompts[1]]  # of 20 blocks
    serve(rig, [long, prompts[2]], "a")
    pin(rig, prompts[3][:33])
    for number, prompt in enumerate(prompts[4:]):
        rig.serve(f"x{number}", prompt)
    rig.scheduler.reset_prefix_cache()
    assert blocks_found(rig, "b", long) >= 12
    rig.run()


def test_half_of_a_long_prompt_comes_while_a_disk_hangs_at_a_write(start, prompts, faulty_disk):
    rig = start(num_slots=24, num_blocks=131)
    long = [*prompts[0][:-1], *prompts[1]]
    serve(rig, [long, *prompts[2:4]], "a")
    rig.forget_device()
    faulty_disk.plan("write", "hang", nth=1, count=1)
    rig.add("w", prompts[4])
    rig.step_until_served()
    for _ in range(3):
        rig.step()
    faulty_disk.wait_hanging()
    assert blocks_found(rig, "b", long) >= 10
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)


def test_a_hung_disk_has_half_of_the_pool_at_the_most(start, prompts, faulty_disk):
    rig = start(num_slots=24, num_blocks=131, extra={"promote_timeout_ms": 50})
    serve(rig, prompts, "a")
    rig.forget_device()
    rig.half.tier.breaker.allows = lambda now_s: True
    faulty_disk.plan("read", "hang")
    most = 0
    for round_ in range(4):
        for number, tokens in enumerate(prompts):
            rig.add(f"b{round_}-{number}", tokens)
        while rig.scheduler.requests:
            rig.step()
            most = max(most, rig.half.tier.promoter.num_writing)
        rig.scheduler.reset_prefix_cache()
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)
    assert 0 < most <= 12


def test_a_hung_disk_writes_to_no_descriptor_of_others(start, prompts, faulty_disk, tmp_path):
    rig = start(num_slots=24, extra={"flush_timeout_ms": 100})
    faulty_disk.plan("write", "hang")
    rig.add("a", prompts[0])
    rig.step_until_served()
    for _ in range(10):
        rig.step()
    faulty_disk.wait_hanging()
    event = rig.halves[0].tier.event
    rig.close()
    path = tmp_path / "of others"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    if file != event:
        os.dup2(file, event)
    faulty_disk.mend()
    time.sleep(0.3)
    assert path.read_bytes() == b""


def test_a_server_with_a_thousand_connections_waits_for_its_disk(start, prompts, faulty_disk, monkeypatch):
    """Its descriptors have numbers that `select` does not take."""
    make, limits = os.eventfd, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    monkeypatch.setattr(os, "eventfd", lambda *flags: fcntl.fcntl(make(*flags), fcntl.F_DUPFD_CLOEXEC, 1500))
    rig = start(num_slots=24)
    assert rig.halves[0].tier.event >= 1500
    faulty_disk.plan("write", "hang")
    rig.add("a", prompts[0])
    rig.step_until_served()
    for _ in range(10):
        rig.step()
    faulty_disk.wait_hanging()
    rig.step()
    faulty_disk.mend()
    rig.run()
    wait_until_clean(rig)


def test_the_first_request_knows_all_that_was_found(start, prompt, monkeypatch):
    monkeypatch.setattr(worker_tier, "MOST_ROWS", 256)
    prompts = [prompt(f"many{number}", NUM_BLOCKS * 16 + 1) for number in range(80)]
    first = start(num_slots=400)
    serve(first, prompts, "a")
    first.close()
    again = start(num_slots=400)
    assert serve(again, prompts[::-1], "b") == [NUM_BLOCKS] * 80


def test_a_small_promotion_beside_a_long_forward_does_not_make_the_disk_look_slow(start, prompts, prompt):
    # 50 blocks a second; the disk reads thousands, and two blocks a forward would be 10.
    rig = start(num_slots=24, extra={"prefill_tokens_per_s": 800})
    serve(rig, prompts, "a")
    rig.forget_device()
    forward = rig.forward

    def slow(runs):
        time.sleep(0.2 if runs else 0)
        return forward(runs)

    rig.forward = slow
    rig.add("runs", prompt("other", 20), 400)
    rig.step()
    assert [blocks_found(rig, name, tokens, 10) for name, tokens in (("b", prompts[0][:33]), ("c", prompts[1]))] == [
        2,
        10,
    ]
    rig.forward = forward
    rig.run()


# ---- what ranks tell ------------------------------------------------------------------------------------------------


def told(first, slots, keys, num_slots=0):
    """A rank's report of one range, the first with the size of its store."""
    slots, keys = np.array(slots, np.uint32), np.repeat(np.array(keys, np.uint8)[:, None], 32, axis=1)
    return WorkerReport(tier_slots=(int(num_slots > 0), num_slots), found={first: (1, Found(slots, keys))})


def make_tier(num_ranks):
    slots = Slots.of(64 << 12, 4096)
    index = BlockIndex(slots.num_slots)
    return Tier(index, slots, num_ranks=num_ranks, bytes_per_s=0, promote_timeout_ms=LONG_MS, blocks_per_token=1)


@pytest.mark.parametrize("together", [False, True])
def test_only_what_all_ranks_have_in_the_same_slot_is_known(together):
    tier = make_tier(2)
    reports = told(0, [1, 3, 5], [1, 3, 5], num_slots=RANGE_SLOTS + 9), told(0, [1, 4, 5, 7], [1, 4, 6, 7], num_slots=8)
    if together:
        tier.reported(reports[0].aggregate(reports[1]))
    else:
        tier.reported(reports[0])
        assert tier.is_silent and tier.catalogue.num_ready == 0
        tier.reported(reports[1])
    assert tier.catalogue.num_slots == 8 and tier.catalogue.slots_added == 8 and not tier.is_adopting
    there = np.repeat(np.arange(9, dtype=np.uint8)[:, None], 32, axis=1)
    assert np.flatnonzero(tier.catalogue.lookup(there)[0]).tolist() == [1]


@pytest.mark.parametrize("together", [False, True])
def test_a_block_has_come_only_if_every_rank_says_so(together):
    store = RanksStore(2)
    slots, keys = np.arange(3, dtype=np.uint32), np.zeros((3, 32), np.uint8)
    batch = store.get(slots, slots, keys, 4096, tag=bytes(32), timeout_ms=LONG_MS)
    damaged, late = BlockStatus.PAYLOAD_DAMAGED, BlockStatus.LATE
    reports = [
        WorkerReport(moved={1: (1, Moved(np.array(statuses, np.uint8), seconds))})
        for statuses, seconds in (([0, damaged, 0], 2), ([0, 0, late], 1))
    ]
    if together:
        store.reported(reports[0].aggregate(reports[1]).moved)
    else:
        store.reported(reports[0].moved)
        assert not batch.done() and (batch.statuses == BlockStatus.PENDING).all()
        store.reported(reports[1].moved)
    assert batch.done() and batch.statuses.tolist() == [0, damaged, late] and batch.seconds == 2


def test_nothing_found_is_known_when_the_weights_have_changed():
    tier = make_tier(1)
    tier.clear(b"1" * 32)
    tier.reported(told(0, [1], [1], num_slots=8))
    assert tier.catalogue.num_ready == 0 and tier.catalogue.slots_added == 8


# ---- what pays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks_per_s, waits", [(0, [True, True]), (100, [True, False])])
def test_one_request_finds_out_what_the_disk_brings_and_nobody_waits_for_it(blocks_per_s, waits):
    tier = make_tier(1)
    tier.rate.break_even.blocks_per_s = blocks_per_s
    assert [tier.wish(name, keys_of_four(number)) for number, name in enumerate("ab")] == waits
    assert tier.is_answered("b") != waits[1], "it takes what the pool has"


@pytest.mark.parametrize(
    "tier_blocks_per_s, waits", [(10, [False] * 3), (120, [True, False, False]), (1e9, [True] * 3)]
)
def test_a_request_waits_only_if_what_is_ahead_leaves_it_a_gain(tier_blocks_per_s, waits):
    tier = make_tier(1)
    tier.rate.break_even.blocks_per_s = 100
    tier.rate.break_even.measured(tier_blocks_per_s * tier.slots.stride_bytes, 1, time.monotonic())
    assert [tier.wish(name, keys_of_four(number)) for number, name in enumerate("abc")] == waits
    assert tier.counters()["tier_misses_slower_than_computing"] == 4 * waits.count(False)


def keys_of_four(number):
    return np.repeat(np.arange(4 * number, 4 * number + 4, dtype=np.uint8)[:, None], 32, axis=1)


def test_what_the_model_computes_is_learnt_from_steps_that_compute_much():
    now = [0.0]
    rate = PrefillRate(None, 1 / 16, lambda: now[0])
    for seconds, num_tokens in [(1, 1600), (1, 1600), (1, 8), (5, 8), (9, 1600), (2, 1600), (1, 8)]:
        now[0] += seconds
        rate.step(num_tokens)
    assert rate.break_even.blocks_per_s == (1600 / 1 + 1600 / 2) / 2 / 16
    assert PrefillRate(320, 1 / 16, time.monotonic).break_even.blocks_per_s == 20


def test_where_steps_overlap_the_tokens_of_those_under_way_do_not_count():
    now = [0.0]
    rate = PrefillRate(None, 1 / 16, lambda: now[0], 2)
    for seconds in (0, 0.002, *[0.4] * 30):  # the second is scheduled at once
        now[0] += seconds
        rate.step(8000)
    assert 8000 / 0.41 < 16 * rate.break_even.blocks_per_s < 8000 / 0.39
    for _ in range(20):  # a prompt that comes alone: its first decode is scheduled at once
        for seconds, num_tokens in [(0, 8000), (0.002, 1), (0.4, 1), (3600, 1)]:
            now[0] += seconds
            rate.step(num_tokens)
    now[0] += 3600
    rate.step(8000)
    assert 8000 / 0.41 < 16 * rate.break_even.blocks_per_s < 8000 / 0.39


def test_what_was_saved_never_falls_when_the_rate_changes():
    tier, before = make_tier(1), 0
    for rate in (10, 1000, 5):
        tier.rate.break_even.blocks_per_s = rate
        step, tier.promoter.step = tier.promoter.step, lambda now_s: setattr(tier.promoter, "num_promoted", 7) or False
        tier.promoter.num_promoted = 0
        tier.step()
        tier.promoter.step = step
        assert tier.counters()["tier_saved_seconds"] == pytest.approx(before + 7 / rate)
        before += 7 / rate
