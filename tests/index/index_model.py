"""What a BlockIndex is, in the simplest Python that says it. Shares no code and no constants with the real one."""

from collections import OrderedDict


class Model:
    """Holds every slot as a dict; `ready` is ordered, coldest first, and holds what may be evicted."""

    def __init__(self):
        self.free, self.by_key, self.slots, self.ready = [], {}, {}, OrderedDict()

    def add(self, first, count):
        self.free += range(first, first + count)

    def reserve_all(self, keys, length, after=None, stops=None):
        """A batch: with `after`, everything there of the chain is used now, the head last."""
        self.kept = []  # in the order of the chain
        if after is not None:
            self.touch(keys)
            self.touch(after)
            self.kept = [self.by_key[key] for key in after if self.has(key)]
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
            if not self.ready or next(iter(self.ready)) in (*self.kept, stop):
                return None, "full"
            self.evict()
        slot = self.free.pop(0)
        self.by_key[key] = slot
        self.slots[slot] = {"key": key, "length": length, "written": False, "pins": 0, "gone": False}
        return slot, "new"

    def commit(self, slots, pin):
        for slot in reversed(slots):
            block = self.slots[slot]
            block["written"] = True
            if block["gone"]:
                self.drop(slot)
            elif pin:
                block["pins"] = 1
            else:
                self.ready[slot] = None

    def abort(self, slots):
        for slot in reversed(slots):
            if not self.slots[slot]["gone"]:
                del self.by_key[self.slots[slot]["key"]]
            self.drop(slot)

    def has(self, key):
        return key in self.by_key and self.slots[self.by_key[key]]["written"]

    def acquire(self, keys, length):
        taken = []
        for key in keys:
            if not self.has(key) or self.slots[self.by_key[key]]["length"] != length:
                break
            self.slots[self.by_key[key]]["pins"] += 1
            self.ready.pop(self.by_key[key], None)
            taken.append(self.by_key[key])
        return taken

    def release(self, slots):
        for slot in reversed(slots):
            self.slots[slot]["pins"] -= 1
            if not self.slots[slot]["pins"]:
                if self.slots[slot]["gone"]:
                    self.drop(slot)
                else:
                    self.ready[slot] = None

    def touch(self, keys):
        for key in reversed(keys):
            if self.has(key) and self.by_key[key] in self.ready:
                self.ready.move_to_end(self.by_key[key])

    def evict(self):
        if not self.ready:
            return False
        self.forget(self.slots[next(iter(self.ready))]["key"])
        return True

    def forget(self, key):
        slot = self.by_key.pop(key, None)
        if slot is None:
            return False
        if slot in self.ready:
            del self.ready[slot]
            self.drop(slot)
        else:
            self.slots[slot]["gone"] = True
        return True

    def drop(self, slot):
        del self.slots[slot]
        self.free.insert(0, slot)
