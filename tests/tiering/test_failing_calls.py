"""Any system call of an engine's disk fails, in any way: the engine goes on, and no block is wrong."""

import contextlib

import pytest
from tier_rig import SECONDS, keys_of
from tiered_rig import EngineRig

from kvortex import TierError

WAYS = ["EIO", "EINVAL", "ENOSPC", "short", "nothing", "lie"]
IDS = range(6)


class Rig(EngineRig):
    """An engine that is asked for the same again and again, each time with new weights."""

    num_turns = 0

    def put_and_promote(self, timeout_ms=SECONDS):
        """Blocks go to the disk and come back; how many came back."""
        self.num_turns += 1
        self.engine.clear()
        self.weights = f"unnamed {self.num_turns}"
        assert self.save(IDS) == len(IDS)
        with contextlib.suppress(TierError):  # what was to be durable is not
            self.engine.flush(timeout_ms)
        assert self.load(IDS) == len(IDS), "RAM does not depend on the disk"
        self.forget_ram()
        return len(self.found(IDS, timeout_ms))

    @property
    def is_read_only(self):
        return self.engine.get_stats().tiers[0].read_only is not None


@pytest.fixture(params=["threads", "aio"])
def opened(request, tmp_path, faulty_disk):
    """Return a function that opens such an engine over an empty folder; closed after the test, if not before."""
    built = []

    def make():
        built.append(Rig(tmp_path / str(len(built)), disk={"io": request.param}))
        built[-1].engine.tiering._breaker.allows = lambda now_s: True  # else no more calls are made after the third
        return built[-1]

    yield make
    faulty_disk.mend()
    for rig in built:
        rig.close()


def counted(rig, faulty_disk):
    """How many system calls it takes to put blocks and to bring them back."""
    with rig:
        faulty_disk.count()
        assert rig.put_and_promote() == len(IDS)
        assert faulty_disk.seen >= 2 * len(IDS)
        return faulty_disk.seen


@pytest.mark.parametrize("how", WAYS)
def test_each_call_of_a_put_and_a_promotion_may_fail_once(opened, faulty_disk, how):
    num_read_only = 0
    for nth in range(1, counted(opened(), faulty_disk) + 1):
        with opened() as rig:
            faulty_disk.plan("any", how, nth, count=1)
            came = rig.put_and_promote()
            assert came >= len(IDS) - 1 or rig.is_read_only
            rig.require_quiet()
            faulty_disk.mend()
            assert rig.put_and_promote() == (0 if rig.is_read_only else len(IDS))
            num_read_only += rig.is_read_only
    assert (num_read_only > 0) == (how == "ENOSPC")


@pytest.mark.parametrize("opened", ["threads"], indirect=True)
@pytest.mark.parametrize("how", WAYS)
def test_from_any_call_on_all_may_fail_for_a_while(opened, faulty_disk, how):
    for nth in range(1, counted(opened(), faulty_disk) + 1):
        with opened() as rig:
            faulty_disk.plan("any", how, nth)
            rig.put_and_promote(timeout_ms=100)
            faulty_disk.mend()
            rig.require_quiet()
            assert rig.put_and_promote() == (0 if rig.is_read_only else len(IDS))


@pytest.mark.parametrize("how", ["EIO", "short", "nothing"])
def test_a_block_that_cannot_be_read_is_missing_from_then_on_and_is_written_anew(opened, faulty_disk, how):
    """Else whoever asks for it waits in vain again and again."""
    with opened() as rig:
        rig.save(IDS)
        assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        faulty_disk.plan("read", how, nth=1)
        assert rig.found([3]) == []
        faulty_disk.mend()
        assert rig.known(IDS) == [i for i in IDS if i != 3]
        assert rig.engine.check_blocks(keys_of([3])).leading_anywhere == 0
        rig.save([3])
        assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        assert rig.found(IDS) == [*IDS]
