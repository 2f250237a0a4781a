"""The cleaner: what it writes and in which order, and that nobody notices it."""

import random
import threading
import time

import numpy as np
import pytest
from engine_rig import EngineRig
from faulty_store import FaultyBatch
from tier_rig import PAYLOAD_BYTES, SECONDS, STRIDE_BYTES, block, keys_of

from kvortex import ConfigError, DiskTier, KVLayout, KVortexConfig, TierError
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.plan import BreakEven, WriteBudget


@pytest.fixture
def make_rig(tmp_path):
    rigs = []

    def make(folder="disk", **settings):
        rigs.append(EngineRig(tmp_path / folder, **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def coldest_first(index):
    """The ids of an index in the order in which they would go; nobody else may use it meanwhile."""
    index.offer_again()
    blocks = index.coldest(index.num_slots)
    index.release(blocks.slots, offered=True)
    names = {keys_of([i])[0].tobytes(): i for i in range(400)}
    return [names[key.tobytes()] for key in blocks.keys]


def between_batches(rig, do):
    """Let the tiering thread do something when the cleaner holds nothing."""
    over, errors = threading.Event(), []

    def try_it(_):
        if rig.cleaner.num_pinned:
            rig.engine.tiering._messages.append((try_it, over))
            return rig.cleaner.step(time.monotonic())
        try:
            do()
        except BaseException as error:
            errors.append(error)
        over.set()

    rig.engine.tiering._messages.append((try_it, over))
    rig.engine.tiering.wake()
    assert over.wait(SECONDS / 1000) and not errors, errors


def test_what_is_saved_is_on_disk_soon(make_rig):
    rig = make_rig()
    rig.save(range(8))
    rig.wait_for(lambda: rig.on_disk(range(8)) == [*range(8)])
    rig.wait_for(lambda: rig.engine.get_stats().pool_blocks_clean == 8)
    rig.save(range(100, 108))
    rig.wait_for(lambda: rig.stats().blocks_written == 16)
    rig.save(range(200, 208))
    assert rig.engine.get_stats().blocks_dropped == 0 and rig.engine.get_stats().blocks_evicted == 8
    assert rig.load(range(8), promote_timeout_ms=SECONDS) == 8


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_eviction_is_that_without_a_cleaner(make_rig, tmp_path, seed):
    """Each operation goes to both engines; the second one has a tier that is written to all the time.

    What is being written just then cannot be evicted, so operations come between batches.
    """
    draw = random.Random(seed)
    plain, cleaned = make_rig("plain"), make_rig("cleaned")
    plain.engine.tiering._breaker._until_s = float("inf")  # its cleaner rests for ever
    for _ in range(60):
        verb, first = draw.choice(("save", "save", "load", "touch")), draw.randrange(30)
        ids = range(first, first + draw.randrange(1, 6))
        for rig in (plain, cleaned):
            if verb == "touch":
                between_batches(rig, lambda rig=rig, ids=ids: rig.engine.touch_blocks(keys_of(ids)))
            else:
                between_batches(rig, lambda verb=verb, rig=rig, ids=ids: getattr(rig, verb)(ids))
        if draw.random() < 0.5:
            assert cleaned.engine.flush(SECONDS) == 0
        assert plain.in_ram(range(40)) == cleaned.in_ram(range(40))
    assert plain.stats().blocks_written == 0 < cleaned.stats().blocks_written
    for rig in (plain, cleaned):
        rig.wait_for(lambda rig=rig: rig.cleaner.num_pinned == 0)
        rig.engine.tiering.close(SECONDS)
    assert coldest_first(plain.index) == coldest_first(cleaned.index)


def test_the_order_of_the_tier_is_that_in_which_blocks_leave_ram(make_rig):
    rig = make_rig()
    rig.save(range(8))
    assert rig.engine.flush(SECONDS) == 0
    rig.load(range(2, 4))
    rig.save(range(8, 12))
    assert rig.engine.flush(SECONDS) == 0
    rig.engine.tiering._breaker._until_s = float("inf")
    assert coldest_first(rig.tier.catalogue) == coldest_first(rig.index) == [7, 6, 5, 4, 1, 0, 3, 2, 11, 10, 9, 8]


def test_beyond_the_budget_the_heads_are_written_and_the_rest_when_all_is_idle(make_rig):
    rig = make_rig(pool_blocks=32, write_bytes_per_s=STRIDE_BYTES)  # ten blocks at once
    rig.save(range(16))
    rig.wait_for(lambda: rig.stats().blocks_written == 10)
    rig.wait_for(lambda: rig.cleaner._num_passed)
    assert rig.on_disk(range(16)) == [*range(10)]
    assert (rig.stats().blocks_admitted, rig.stats().blocks_not_admitted) == (10, 6)
    rig.engine.tiering.budget.pace(lambda: time.monotonic() + 20)  # as after twenty seconds
    rig.wait_for(lambda: rig.on_disk(range(16)) == [*range(16)])
    rig.wait_for(lambda: rig.stats().blocks_written_beyond == 6)


def test_a_flush_writes_what_the_budget_did_not_allow(make_rig):
    rig = make_rig(pool_blocks=32, write_bytes_per_s=STRIDE_BYTES)
    rig.save(range(16))
    assert rig.engine.flush(SECONDS) == 0
    assert rig.on_disk(range(16)) == [*range(16)] and rig.stats().blocks_written_beyond == 6
    assert rig.engine.flush(SECONDS) == 0 and rig.stats().blocks_written == 16, "nothing is written twice"


def test_what_a_save_did_not_need_is_not_spent(make_rig):
    rig = make_rig(pool_blocks=32, write_bytes_per_s=STRIDE_BYTES)
    rig.save(range(8))
    for _ in range(5):
        rig.save(range(8))  # there already
    rig.save(range(100, 102))
    assert rig.stats().blocks_not_admitted == 0


def test_what_the_tier_has_already_is_not_paid_for(make_rig):
    rig = make_rig(pool_blocks=32, write_bytes_per_s=STRIDE_BYTES)
    rig.put_away(range(4))
    rig.save(range(4))
    rig.wait_for(lambda: rig.engine.get_stats().pool_blocks_clean == 4)
    rig.save(range(100, 106))
    assert rig.stats().blocks_not_admitted == 0, "six of ten are left"
    rig.wait_for(lambda: rig.stats().blocks_written == 10)
    rig.index.evict(32)
    rig.save(range(4))  # whatever the budget says, the tier has them
    rig.wait_for(lambda: rig.engine.get_stats().pool_blocks_clean == 4)
    assert rig.stats().blocks_written == 10


def test_a_hung_disk_pins_an_eighth_and_is_in_nobodys_way(make_rig):
    rig = make_rig(pool_blocks=32)
    rig.store.hold("put")
    rig.save(range(16))
    rig.wait_for(lambda: rig.cleaner.num_pinned == 4)
    for first in range(100, 180, 8):
        assert list(rig.save(range(first, first + 8)).statuses) == [0] * 8
        assert rig.load(range(first, first + 8)) == 8
    assert rig.cleaner.num_pinned == 4 and rig.engine.get_stats().blocks_dropped == 16 + 80 - 32
    assert rig.engine.flush(50) > 0
    rig.store.let_go()
    assert rig.engine.flush(SECONDS) == 0
    rig.wait_for(rig.is_at_rest)


def test_a_block_that_is_being_written_is_there_for_everybody(make_rig):
    rig = make_rig()
    rig.store.hold("put")
    rig.save([0])
    rig.wait_for(lambda: rig.cleaner.num_pinned == 1)
    assert list(rig.save([0]).statuses) == [1] and rig.load([0]) == 1
    assert rig.on_disk([0]) == [], "it may not be there yet"


def test_a_block_that_is_used_while_it_is_written_is_the_most_recent(make_rig):
    rig = make_rig(pool_blocks=16)
    rig.save([0, 1])
    rig.store.hold("put")
    rig.wait_for(lambda: rig.cleaner.num_pinned == 2 or rig.stats().blocks_written == 2)
    rig.save(range(2, 16))
    rig.load([1])
    rig.store.let_go()
    assert rig.engine.flush(SECONDS) == 0
    rig.save(range(100, 115))
    assert rig.in_ram(range(16)) == [1]


@pytest.mark.parametrize("how", ["clear", "discard"])
def test_what_is_forgotten_while_it_is_written_is_nowhere(make_rig, how):
    rig = make_rig()
    rig.store.hold("put")
    rig.save([0, 1])
    rig.wait_for(lambda: rig.cleaner.num_pinned == 2)
    if how == "clear":
        rig.engine.clear()
    else:
        assert rig.engine.discard_blocks(keys_of([0, 1, 2])) == 2
    assert rig.engine.check_blocks(keys_of([0, 1])).where.tolist() == [0, 0]
    rig.store.let_go()
    rig.wait_for(rig.is_at_rest)
    assert rig.on_disk([0, 1]) == [] and rig.tier.catalogue.num_ready == 0
    rig.save([0, 1], generation=1)
    assert rig.engine.flush(SECONDS) == 0
    rig.index.evict(16)
    assert rig.load([0, 1], generation=1, promote_timeout_ms=SECONDS) == 2
    rig.engine.shutdown()
    again = make_rig()
    assert again.on_disk([0, 1]) == ([] if how == "clear" else [0, 1]), "a bare clear's tag dies with the process"


def test_a_put_of_old_weights_that_comes_late_is_not_found_again(make_rig):
    """Not even by a process that was told the new weights' name."""
    rig = make_rig()
    rig.store.hold("put")
    rig.save([0, 1])
    rig.wait_for(lambda: rig.cleaner.num_pinned == 2)
    rig.engine.clear(weights="new")
    rig.store.let_go()
    rig.wait_for(rig.is_at_rest)
    rig.engine.shutdown()
    assert make_rig(engine_weights="new").on_disk([0, 1]) == []


class FailingStore:
    """A store whose first puts fail, though they write."""

    def __init__(self, rig, count):
        self._store, rig.store._store = rig.store._store, self
        self.count, self.num_puts = count, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, *args, **settings):
        batch = self._store.put(*args, **settings)
        self.num_puts += 1
        return FaultyBatch(batch, range(len(batch.wait()))) if self.num_puts <= self.count else batch


def test_a_put_that_fails_is_tried_again(make_rig):
    rig = make_rig()
    failing = FailingStore(rig, 2)
    rig.save([0, 1])
    rig.wait_for(lambda: rig.on_disk([0, 1]) == [0, 1])
    rig.wait_for(rig.is_at_rest)
    assert rig.stats().blocks_not_written == 4 and failing.num_puts == 3
    assert rig.stats().suspensions == 0


def test_what_was_admitted_is_written_at_the_end_and_found_by_the_next(make_rig):
    rig = make_rig()
    rig.save(range(12))
    rig.engine.shutdown()
    assert (again := make_rig()).on_disk(range(12)) == [*range(12)]
    assert again.load(range(12), promote_timeout_ms=SECONDS) == 8, "half of the pool at a time"


def test_a_flush_waits_for_saves_in_flight(make_rig, host):
    rig = make_rig()
    memory = [np.frombuffer(block(i), np.uint8).copy() for i in range(8)]
    host.hold()
    job = rig.engine.save_blocks(keys_of(range(8)), data_ptrs=memory)
    assert rig.engine.flush(20) == 8
    threading.Timer(0.05, host.release).start()
    assert rig.engine.flush(SECONDS) == 0
    assert job.done() and rig.on_disk(range(8)) == [*range(8)]


def test_the_index_counts_what_is_clean(make_rig):
    rig = make_rig()
    rig.save(range(8))
    assert rig.engine.flush(SECONDS) == 0
    counts = rig.index.counters()
    assert (counts["num_clean"], counts["dirty_evictions"]) == (8, 0)
    rig.engine.discard_blocks(keys_of([0]))
    assert rig.index.counters()["num_clean"] == 7
    rig.index.evict(3)
    assert rig.index.counters()["num_clean"] == 4
    rig.engine.clear()
    assert rig.index.counters()["num_clean"] == 0
    assert rig.index.lengths_of([0]).tolist() == [0]
    (slot,), _ = rig.index.reserve(keys_of([5]), 777)
    assert rig.index.lengths_of([slot]).tolist() == [777]
    rig.index.abort([slot])
    with pytest.raises(ValueError, match="lengths_of"):
        rig.index.lengths_of([16])


# ---- settings --------------------------------------------------------------------------------------------------------


def test_tiers_need_a_namespace_and_are_tiers(tmp_path):
    tier = DiskTier(tmp_path, 1 << 20)
    for settings, complaint in [
        ({"tiers": (tier,)}, 'namespace="'),
        ({"tiers": (tier,), "namespace": ""}, "namespace must be a text"),
        ({"tiers": tier}, "must be a tuple"),
        ({"tiers": ("/mnt",), "namespace": "m"}, "must be such as DiskTier"),
        ({"tiers": (tier, tier), "namespace": "m"}, "one tier"),
        ({"weights": 3}, "weights must be a text"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=4096, **settings)
    with pytest.raises(ConfigError, match="write_bytes_per_s must be 0"):
        DiskTier(tmp_path, 1 << 20, write_bytes_per_s=-1)


def test_an_engine_whose_tier_cannot_be_opened_gives_everything_back(make_rig, tmp_path):
    rig = make_rig()
    with pytest.raises(TierError, match="in use by process"):
        make_rig()
    rig.engine.shutdown()
    assert make_rig().save([1]).num_blocks == 1


def test_engines_of_other_namespaces_share_nothing(make_rig):
    rig = make_rig(engine_namespace="one")
    rig.put_away(range(4))
    rig.engine.shutdown()
    assert make_rig(engine_namespace="two").on_disk(range(4)) == []


@pytest.mark.parametrize("wrong", [3, b"w"])
def test_weights_are_named_by_a_text(make_rig, wrong):
    with pytest.raises(TypeError, match="weights must be a str"):
        make_rig().engine.clear(weights=wrong)


def test_layouts_of_an_engine_without_one_have_keys_of_their_own(make_rig):
    """On disk blocks outlive the order in which layouts were added: what was first then may be second now."""
    rig = make_rig()
    rig.save([1])
    memory = np.zeros((8, PAYLOAD_BYTES // 4), np.float32)
    rig.engine.add_layout(layout := KVLayout.from_tensors([memory]))
    assert rig.engine.check_blocks(keys_of([1]), layout=layout).leading == 0


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def budget_of(bytes_per_s):
    """A budget, and a clock that is set by hand."""
    now = [0.0]
    return WriteBudget(bytes_per_s, lambda: now[0]), now


def test_a_budget_accrues_and_is_spent_from_the_first_block_on():
    budget, now = budget_of(100)
    assert budget.admit(150, 10) == 100, "ten seconds of it at the start"
    now[0] = 0.05
    assert budget.admit(5, 10) == 0
    now[0] = 0.3
    assert budget.admit(5, 10) == 3
    budget.give_back(20)
    assert budget.admit(5, 10) == 2
    now[0] = 1000.0
    assert budget.admit(1000, 10) == 100, "and ten seconds at the most"


def test_a_budget_holds_over_any_time():
    (budget, now), written = budget_of(100), []
    for tick in range(1, 40_001):
        now[0] = tick / 1000
        written.append(10 * budget.admit(4, 10))
    assert sum(written[20_000:]) == pytest.approx(2000, rel=0.01)


def test_a_budget_is_idle_when_it_was_full_for_a_second():
    budget, now = budget_of(100)

    def is_idle_at(seconds):
        now[0] = seconds
        return budget.is_idle()

    assert not is_idle_at(0.9) and is_idle_at(1.0)
    budget.admit(1, 500)
    assert not is_idle_at(6.9) and is_idle_at(7.0), "five seconds to be full again, and one more"
    budget.admit(0, 500)
    assert is_idle_at(7.01), "nothing was spent"
    budget.spend(10)
    assert not is_idle_at(7.05)


def test_a_budget_of_none_admits_all():
    assert WriteBudget(0).admit(1000, 1 << 30) == 1000


def test_blocks_are_left_where_computing_is_faster():
    pays = BreakEven(1000)
    assert pays.pays(10, 1 << 40, 0.0), "nothing is known of the tier yet"
    pays.measured(1000, 1.0, 0.0)
    assert pays.pays(10, 10, 1.0) and not pays.pays(10, 11, 1.0)
    assert pays.pays(10, 11, 61.0), "what was slow a minute ago is tried again"
    assert BreakEven(0).pays(1, 1 << 40, 0.0) and pays.saved_s(500) == 0.5


def test_a_breaker_rests_longer_each_time_and_forgets_that():
    breaker, bad, good = Breaker("disk"), [BlockStatus.LATE, BlockStatus.OK], [BlockStatus.OK]
    for _ in range(2):
        breaker.saw(bad, 0.0)
    assert breaker.allows(0.0)
    breaker.saw(bad, 0.0)
    assert not breaker.allows(0.9) and breaker.allows(1.0) and breaker.suspensions == 1
    breaker.saw(bad, 1.0)
    assert not breaker.allows(2.9) and breaker.allows(3.0)
    breaker.saw(good, 3.0)
    for _ in range(3):
        breaker.saw(bad, 3.0)
    assert breaker.allows(4.0) and breaker.suspensions == 3


@pytest.mark.parametrize(
    "statuses, is_bad",
    [
        ([BlockStatus.IO_ERROR, BlockStatus.OK], False),
        ([BlockStatus.IO_ERROR, BlockStatus.SHORT], True),
        ([BlockStatus.PAYLOAD_DAMAGED], False),
        ([BlockStatus.DROPPED], False),
        ([BlockStatus.NO_SPACE, BlockStatus.READ_ONLY], False),
        ([], False),
    ],
)
def test_what_counts_against_a_tier(statuses, is_bad):
    breaker = Breaker("disk")
    for _ in range(3):
        breaker.saw(np.array(statuses, np.uint8), 0.0)
    assert breaker.allows(0.5) != is_bad


# ---- what happens between two steps ----------------------------------------------------------------------------------


def test_what_is_discarded_before_the_tier_knows_it_is_not_kept(make_rig):
    rig = make_rig()
    index = rig.index

    class Index:
        def __getattr__(self, name):
            return getattr(index, name)

        def coldest(self, n):
            blocks = index.coldest(n)
            if len(blocks.slots):
                rig.engine.discard_blocks(keys_of([1]))
                rig.cleaner.index = index  # once: later the tier knows the block
            return blocks

    rig.cleaner.index = Index()
    rig.save([0, 1, 2])
    rig.wait_for(lambda: rig.on_disk([0, 2]) == [0, 2])
    rig.wait_for(rig.is_at_rest)
    assert rig.on_disk([1]) == []
    rig.engine.shutdown()
    assert make_rig().on_disk([0, 1, 2]) == [0, 2], "nor by the next process"


def test_a_clear_that_is_interrupted_writes_no_old_block_under_a_new_name(make_rig):
    rig = make_rig()
    rig.store.hold("put")
    rig.save([0, 1])
    rig.wait_for(lambda: rig.cleaner.num_pinned == 2)
    rig.engine.clear(weights="new")
    rig.store.let_go()
    rig.wait_for(rig.is_at_rest)
    rig.save([0, 1], generation=1)
    rig.engine.shutdown()
    again = make_rig(engine_weights="new")
    assert again.load([0, 1], generation=1, promote_timeout_ms=SECONDS) == 2


def test_what_is_saved_while_headers_are_read_is_written_when_there_is_room(make_rig, tmp_path):
    rig = make_rig()
    rig.put_away(range(8))
    rig.engine.shutdown()
    for left in tmp_path.rglob("manifest.sqlite"):
        left.unlink()
    rig = make_rig()
    full = [3] * 4
    reserve = rig.tier.catalogue.reserve

    class Catalogue:
        def __getattr__(self, name):
            return getattr(catalogue, name)

        def reserve(self, keys, lengths):
            slots, statuses = reserve(keys, lengths)
            if full:
                full.pop()
                catalogue.abort(slots[statuses == 0])
                return np.full(len(keys), 0xFFFFFFFF, np.uint32), np.full(len(keys), 3, np.uint8)
            return slots, statuses

    class Scanning:
        is_over = False

        def __getattr__(self, name):
            return getattr(adoption, name)

    catalogue, adoption = rig.tier.catalogue, rig.tier.adoption
    rig.tier.catalogue, rig.tier.adoption = Catalogue(), Scanning()
    rig.save([100, 101])
    rig.wait_for(lambda: catalogue.lookup(keys_of([100, 101]))[1] == 2)
    rig.tier.catalogue, rig.tier.adoption = catalogue, adoption


def test_at_the_end_a_put_that_failed_is_tried_again(make_rig):
    rig = make_rig()
    FailingStore(rig, 1)
    rig.save(range(6))
    rig.engine.shutdown()
    assert make_rig().on_disk(range(6)) == [*range(6)]


# ---- flush -----------------------------------------------------------------------------------------------------------


def test_a_flush_ends_where_every_put_fails(make_rig):
    rig = make_rig()
    FailingStore(rig, 1000)
    rig.save(range(4))
    assert rig.engine.flush() == 4 and rig.stats().is_suspended


def test_a_flush_does_not_wait_for_reads_that_hang(make_rig):
    rig = make_rig()
    rig.put_away(range(2))
    rig.store.hold("get")
    prefetch = rig.prefetch(range(2))
    rig.wait_for(lambda: rig.gets() > 0)
    rig.save([7])
    assert rig.engine.flush(SECONDS) == 0
    prefetch.close()


def test_a_flush_waits_for_blocks_that_somebody_holds(make_rig):
    rig = make_rig()
    rig.engine.tiering._breaker._until_s = float("inf")
    rig.save(range(4))
    held = rig.index.acquire(keys_of(range(4)))
    rig.engine.tiering._breaker._until_s = 0.0
    threading.Timer(0.1, rig.index.release, [held]).start()
    assert rig.engine.flush(SECONDS) == 0 and rig.on_disk(range(4)) == [*range(4)]


def test_a_flush_ends_where_nothing_more_can_be_written_though_others_hold_blocks(make_rig, monkeypatch):
    monkeypatch.setattr("kvortex.engine.tiering.STALLED_S", 0.1)
    rig = make_rig()
    rig.engine.tiering._breaker._until_s = float("inf")
    rig.save(range(4))
    held = rig.index.acquire(keys_of(range(4)))
    rig.engine.tiering._breaker._until_s = 0.0
    assert rig.engine.flush() == 4
    rig.index.release(held)


def test_a_flush_says_what_a_smaller_disk_has_no_room_for(make_rig):
    rig = make_rig(disk_blocks=8)
    rig.save(range(16))
    assert rig.engine.flush(2000) == 8


@pytest.mark.parametrize("wrong", [-1, 0.5, "5", True])
def test_a_flush_takes_whole_milliseconds(make_rig, wrong):
    with pytest.raises(ValueError, match="timeout_ms must be a whole number"):
        make_rig().engine.flush(wrong)


def test_a_tier_of_more_segments_than_its_queue_holds_is_made_durable(make_rig):
    rig = make_rig(queue_blocks=2, disk_blocks=64)
    rig.save([1])
    assert rig.engine.flush(SECONDS) == 0
