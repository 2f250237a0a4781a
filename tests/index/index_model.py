"""What a BlockIndex is, in the simplest Python that says it. Shares no code and no constants with the real one."""

from collections import OrderedDict


class Model:
    """Holds every slot as a dict. What may be evicted is in `offered` or in `ready`, coldest first in both.

    `offered` holds what a cleaner has passed, and goes first.
    """

    def __init__(self):
        self.free, self.by_key, self.slots = [], {}, {}
        self.ready, self.offered = OrderedDict(), OrderedDict()

    def add(self, first, count):
        self.free += range(first, first + count)

    def reserve_all(self, keys, length, after=None, stops=None, admit=0):
        """A batch: with `after`, everything there of the chain is used now, the head last."""
        self.kept, self.victims, self.admit = [], [], admit  # kept: in the order of the chain
        if after is not None:
            self.touch(keys)
            self.touch(after)
            self.kept = [self.by_key[key] for key in dict.fromkeys(after) if self.has(key)]
        stops = [None] * len(keys) if stops is None else stops
        return [self.reserve(key, length, stop) for key, stop in zip(keys, stops, strict=True)]

    def reserve(self, key, length, stop):
        slot = self.by_key.get(key)
        if slot is not None:
            block = self.slots[slot]
            if not block["written"]:
                return None, "pending"
            if block["length"] == length:
                self.kept = [other for other in self.kept if other != slot] + [slot]
                self.touch([self.slots[other]["key"] for other in self.kept])
                return None, "present"
            if block["pins"]:
                return None, "pending"
            self.forget(key)
            self.kept = [other for other in self.kept if other != slot]
        if not self.free:
            if self.coldest_slot() in (None, *self.kept, stop):
                return None, "full"
            self.victims.append(self.slots[self.coldest_slot()])
            self.evict()
        slot = self.free.pop(0)
        self.by_key[key] = slot
        facts = {"admitted"} if self.admit > 0 else set()
        self.admit -= 1
        self.slots[slot] = {"key": key, "length": length, "written": False, "pins": 0, "gone": False, "facts": facts}
        return slot, "new"

    def commit(self, slots, pins, clean):
        for slot, count in reversed([*zip(slots, pins, strict=True)]):
            block = self.slots[slot]
            block["written"] = True
            block["facts"] |= {"clean"} if clean else set()
            if block["gone"]:
                self.drop(slot)
            elif count:
                block["pins"] = count
            else:
                self.ready[slot] = None

    def abort(self, slots):
        for slot in reversed(slots):
            if not self.slots[slot]["gone"]:
                del self.by_key[self.slots[slot]["key"]]
            self.drop(slot)

    def has(self, key):
        return key in self.by_key and self.slots[self.by_key[key]]["written"]

    def acquire(self, keys, length, gaps):
        taken = []
        for key in keys:
            if not self.has(key) or self.slots[self.by_key[key]]["length"] != length:
                if not gaps:
                    break
                taken.append(None)
                continue
            slot = self.by_key[key]
            self.slots[slot]["pins"] += 1
            self.slots[slot]["facts"] -= {"offered"}
            self.unlink(slot)
            taken.append(slot)
        return taken

    def release(self, slots):
        for slot in reversed(slots):
            self.slots[slot]["facts"] -= {"offered"}
            if self.unpin(slot):
                self.ready[slot] = None

    def unpin(self, slot):
        block = self.slots[slot]
        block["pins"] -= 1
        if block["pins"] == 0 and block["gone"]:
            self.drop(slot)
        return block["pins"] == 0 and not block["gone"]

    def coldest(self, n):
        taken = list(self.ready)[:n]
        for slot in taken:
            del self.ready[slot]
            self.slots[slot]["pins"] = 1
            self.slots[slot]["facts"] |= {"offered"}
        return taken

    def release_offered(self, slots, passed, clean):
        failed = []
        for slot, has_passed, is_clean in zip(slots, passed, clean, strict=True):
            block = self.slots[slot]
            if not has_passed:
                failed.append(slot)
                continue
            block["facts"] |= {"clean"} if is_clean else set()
            if self.unpin(slot):
                (self.offered if "offered" in block["facts"] else self.ready)[slot] = None
        for slot in reversed(failed):
            block = self.slots[slot]
            if self.unpin(slot):
                self.ready[slot] = None
                if "offered" in block["facts"]:
                    self.ready.move_to_end(slot, last=False)
            block["facts"] -= {"offered"}

    def offer_again(self):
        self.ready = OrderedDict.fromkeys([*self.offered, *self.ready])
        self.offered.clear()

    def touch(self, keys):
        for key in reversed(keys):
            if self.has(key):
                slot = self.by_key[key]
                self.slots[slot]["facts"] -= {"offered"}
                if self.unlink(slot):
                    self.ready[slot] = None

    def unlink(self, slot):
        """Whether it was on one of the lists."""
        was_linked = slot in self.ready or slot in self.offered
        self.ready.pop(slot, None)
        self.offered.pop(slot, None)
        return was_linked

    def coldest_slot(self):
        return next(iter([*self.offered, *self.ready]), None)

    def evict(self):
        slot = self.coldest_slot()
        return slot is not None and self.forget(self.slots[slot]["key"])

    def forget(self, key):
        slot = self.by_key.pop(key, None)
        if slot is None:
            return False
        if self.unlink(slot):
            self.drop(slot)
        else:
            self.slots[slot]["gone"] = True
        return True

    def drop(self, slot):
        del self.slots[slot]
        self.free.insert(0, slot)
