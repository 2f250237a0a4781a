"""A disk tier that codes blocks with loss: what comes back, what is written again, and who gets it."""

import time
from dataclasses import replace

import numpy as np
import pytest
from tier_rig import PAYLOAD_BYTES, PLANES, SECONDS, keys_of, make_coder
from tiered_rig import NUMBERS, POOL_SLOTS, EngineRig, wait_until

from kvortex import ConfigError, DiskTier, KVLayout, KVortexConfig, KVortexEngine
from kvortex.codec import PackedBlock, pack_block, unpack_block
from kvortex.engine.tiering import STALLED_S
from kvortex.log import _told
from kvortex.tiers import cleaner

IDS = range(16)


@pytest.fixture
def rig(tmp_path):
    with EngineRig(tmp_path, coded=True) as made:
        yield made


def loaded(rig, key_id, **settings):
    """The block as a load brings it; None if it brings nothing."""
    return rig.memory[0].copy() if rig.load([key_id], **settings) else None


def test_the_disk_gives_back_what_the_record_says(rig):
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    assert all(np.array_equal(loaded(rig, key_id), rig.content(key_id, rig.weights)) for key_id in IDS)
    rig.forget_ram()
    for key_id in IDS:
        assert np.array_equal(loaded(rig, key_id, promote_timeout_ms=SECONDS), rig.decoded(key_id))
        assert not np.array_equal(rig.decoded(key_id), rig.content(key_id, rig.weights))


def test_records_are_small(tmp_path):
    """20 000 bytes and a page take 8 KiB and a page; the slots of the tier follow."""
    slots = make_coder(slot_ratio=None)
    assert slots.stride_bytes == 3 << 12
    with EngineRig(tmp_path, coded=True, disk={"slot_ratio": None}) as rig:
        assert rig.tier.record_bytes == 3 << 12 and rig.tier.catalogue.num_slots > 80
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == 0
        stats = rig.engine.get_stats().tiers[0]
        assert stats.codec == "ecsq" and stats.bytes_written <= 16 * 3 << 12
        assert rig.found(IDS) == [*IDS]


def test_what_came_from_a_record_is_never_coded_again(rig):
    """Not even if the tier has lost it: it would lose once more."""
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    rig.forget_ram()
    assert rig.found(IDS[:4]) == [*IDS[:4]]
    rig.tier.discard(keys_of(IDS))
    rig.save([100])
    written = rig.engine.get_stats().tiers[0].blocks_written
    assert rig.engine.flush(SECONDS) == 4  # which the tier will not have
    rig.require_quiet()
    assert rig.engine.get_stats().tiers[0].blocks_written == written + 1
    assert rig.known([*IDS, 100]) == [100]
    assert all(np.array_equal(loaded(rig, key_id), rig.decoded(key_id)) for key_id in IDS[:4])


def test_a_block_that_is_saved_anew_is_coded_anew(rig):
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    rig.forget_ram()
    assert rig.found(IDS) == [*IDS]
    rig.engine.discard_blocks(keys_of(IDS))
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    assert rig.known(IDS) == [*IDS]


def test_a_block_that_does_not_fit_stays_in_ram_and_is_counted(tmp_path, caplog, monkeypatch):
    _told.clear()
    monkeypatch.setattr(cleaner, "LEAST_RECORDS", 10)
    with EngineRig(tmp_path, coded=True, disk={"slot_ratio": 16}) as rig:
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == len(IDS)
        assert rig.engine.flush(SECONDS) == len(IDS)
        stats = rig.engine.get_stats().tiers[0]
        assert (stats.blocks_too_large, stats.blocks_not_written, stats.blocks) == (16, 16, 0)  # tried once
        assert not stats.is_suspended
        assert rig.found(IDS) == [*IDS]
    assert [record.event for record in caplog.records].count("records_too_large") == 1


@pytest.mark.parametrize("other", [{"codec": "exact", "slot_ratio": None}, {"level": 2}], ids=["exact", "level"])
def test_an_engine_never_gets_what_was_coded_otherwise(tmp_path, other):
    with EngineRig(tmp_path, coded=True) as rig:
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == 0
    with EngineRig(tmp_path, coded=True, disk=other) as rig:
        assert rig.adopted().found(IDS) == []
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == 0
    with EngineRig(tmp_path, coded=True) as rig:
        rig.adopted().forget_ram()
        assert all(
            np.array_equal(loaded(rig, key_id, promote_timeout_ms=SECONDS), rig.decoded(key_id)) for key_id in IDS
        )


def test_blocks_of_another_layout_stay_in_ram(rig):
    """The coder is made for the first layout's planes; other bytes must not be taken for numbers."""
    memory = np.frombuffer(NUMBERS[: 4 * PAYLOAD_BYTES], np.uint8).copy()
    other = KVLayout([(memory.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)], 4, name="other", owners=[memory])
    rig.engine.add_layout(other)
    rig.engine.save_blocks(keys_of(IDS[:4]), np.arange(4), layout=other).wait(SECONDS)
    rig.save([4])
    assert rig.engine.flush(SECONDS) == 4
    stats = rig.engine.get_stats().tiers[0]
    assert (stats.blocks, stats.blocks_written, stats.blocks_not_written) == (1, 1, 0)
    before = memory.copy()
    memory[:] = 0
    assert rig.engine.load_blocks(keys_of(IDS[:4]), np.arange(4), layout=other).wait(SECONDS) is None
    assert np.array_equal(memory, before)


def test_threads_code_although_aio_was_asked_for(tmp_path):
    with EngineRig(tmp_path, coded=True, disk={"io": "aio"}) as rig:
        facts = rig.store.stats()
        assert facts["io_engine"] == "threads"
        assert facts["io_engine_reason"] == "records of ecsq are made by the threads"
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == 0 and rig.found(IDS) == [*IDS]


def test_a_layout_with_the_same_keys_and_other_numbers_is_refused(rig):
    """Its fingerprint says nothing of K and V; coded as the first layout, its bytes would come back as others."""
    memory = np.zeros(4 * PAYLOAD_BYTES, np.uint8)
    runs = [(memory.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)]
    swapped = [replace(plane, role={"k": "v", "v": "k"}[plane.role]) for plane in PLANES]
    for planes, message in (((), "no vectors of bfloat16"), (swapped, "K and V elsewhere in its blocks")):
        with pytest.raises(ConfigError, match=message):
            rig.engine.add_layout(KVLayout(runs, 4, planes=planes, owners=[memory]))
    rig.engine.add_layout(KVLayout(runs, 4, planes=PLANES, owners=[memory]))


def test_flush_does_not_wait_for_what_only_ram_can_have(rig):
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    rig.forget_ram()
    assert rig.found(IDS[:4]) == [*IDS[:4]]
    rig.tier.discard(keys_of(IDS))
    memory = NUMBERS[: 2 * PAYLOAD_BYTES].copy()
    other = KVLayout([(memory.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)], 2, name="other", owners=[memory])
    rig.engine.add_layout(other)
    rig.engine.save_blocks(keys_of(IDS[:2]), np.arange(2), layout=other).wait(SECONDS)
    with rig.engine.prefetch(keys_of(IDS[:1]), SECONDS) as held:  # somebody always holds something
        held.wait()
        began = time.monotonic()
        assert rig.engine.flush(SECONDS) >= 2
        assert time.monotonic() - began < STALLED_S / 2


def test_what_does_not_fit_costs_none_of_the_write_budget(tmp_path):
    settings = {"slot_ratio": 16, "write_bytes_per_s": 1 << 12}  # for ten seconds a few pages
    with EngineRig(tmp_path, coded=True, disk=settings) as rig:
        for number in IDS:
            rig.save([number])
            wait_until(lambda number=number: rig.engine.tiering._cleaner.num_too_large > number)
        stats = rig.engine.get_stats().tiers[0]
        assert stats.blocks_not_admitted == 0 and stats.blocks_admitted == len(IDS)


@pytest.mark.parametrize("codec", ["q8", "k6v4"])
def test_packed_blocks_are_unpacked_coded_decoded_and_packed(tmp_path, codec):
    num_blocks = 8
    packed = PackedBlock.of(PLANES, PAYLOAD_BYTES, codec)
    coder = make_coder(codec=codec)
    memory = NUMBERS[: num_blocks * PAYLOAD_BYTES].reshape(num_blocks, -1).copy()
    expected = memory.copy()
    for row in expected:  # as the way through RAM and disk leaves it
        slot, record = np.empty(packed.packed_bytes, np.uint8), np.empty(coder.stride_bytes - 4096, np.uint8)
        assert pack_block(packed, row, slot)
        assert coder.decode(record[: coder.encode(slot, record)], slot)
        unpack_block(packed, slot, row)
    layout = KVLayout([(memory.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)], num_blocks, planes=PLANES, owners=[memory])
    tier = DiskTier(tmp_path, "16MiB", codec="ecsq", segment_bytes="1MiB")
    config = KVortexConfig(cpu_pool_size_bytes="1MiB", device="host", codec=codec, tiers=(tier,), namespace="model")
    with KVortexEngine.create(config, layout=layout) as engine:
        keys, blocks = keys_of(range(num_blocks)), np.arange(num_blocks)
        engine.save_blocks(keys, blocks).wait(SECONDS)
        assert engine.flush(SECONDS) == 0
        engine.index.clear()
        memory[:] = 0
        job = engine.load_blocks(keys, blocks, promote_timeout_ms=SECONDS)
        job.wait(SECONDS)
        assert job.num_blocks == num_blocks and np.array_equal(memory, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codec": "zip"}, "codec of a disk tier must be one of exact, ecsq, got 'zip'"),
        ({"codec": "ecsq", "level": 5}, "level must be 1 to 4, got 5"),
        ({"codec": "ecsq", "level": 1.5}, "level must be a whole number"),
        ({"codec": "ecsq", "slot_ratio": 0.5}, "slot_ratio must be a number from 1 to 16, or None, got 0.5"),
        ({"codec": "ecsq", "slot_ratio": True}, "slot_ratio must be a number from 1 to 16, or None, got True"),
        ({"level": 2}, "level and slot_ratio are of a codec"),
        ({"slot_ratio": 3}, "level and slot_ratio are of a codec"),
    ],
)
def test_settings_outside_their_limits_are_refused(settings, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        DiskTier("/nowhere", "1GiB", **settings)


def test_blocks_in_which_nothing_can_be_coded_are_refused(tmp_path):
    config = KVortexConfig(
        cpu_pool_size_bytes="1MiB", block_bytes=PAYLOAD_BYTES, device="host", namespace="model",
        tiers=(DiskTier(tmp_path, "16MiB", codec="ecsq"),),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="codes blocks of a layout, and there is none"):
        KVortexEngine.create(config)
    memory = np.zeros(POOL_SLOTS * PAYLOAD_BYTES, np.uint8)
    layout = KVLayout([(memory.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)], POOL_SLOTS, owners=[memory])
    with pytest.raises(ConfigError, match="no vectors of bfloat16 are known in the blocks"):
        KVortexEngine.create(config, layout=layout)
    assert not list(tmp_path.rglob("*.segment"))
