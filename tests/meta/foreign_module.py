"""Build the ```cython example of a page as a foreign module, against the kvortex that Python finds, and use it.

Run in a folder of its own, by the Python whose kvortex is meant: ``python foreign_module.py PAGE``.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import kvortex

SETUP = """
import kvortex
from Cython.Build import cythonize
from setuptools import Extension, setup

extension = Extension("saver", ["saver.pyx"], include_dirs=[kvortex.get_include()], extra_compile_args=["-Werror"])
setup(name="saver", ext_modules=cythonize([extension], language_level=3))
"""
BLOCK_TOKENS = 16


def build(page):
    """Write the example beside a setup.py, compile it in place and import it."""
    (example,) = re.findall(r"^```cython\n(.*?)^```$", page.read_text(), re.M | re.S)
    Path("saver.pyx").write_text(example)
    Path("setup.py").write_text(SETUP)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True)
    sys.path.insert(0, str(Path.cwd()))
    import saver

    return saver


def use(saver):
    """Save with the foreign module; look, and load back, with the library itself."""
    cache = np.random.default_rng(0).random((2, 4, 64, BLOCK_TOKENS, 2, 8), np.float32)
    layout = kvortex.KVLayout.contiguous(
        cache, num_layers=4, num_blocks=64, block_size=BLOCK_TOKENS, num_heads=2, head_dim=8, itemsize=4
    )
    tokens = np.arange(BLOCK_TOKENS * 20 + 5, dtype=np.uint32)
    keys = kvortex.block_keys(tokens, BLOCK_TOKENS, salt=b"tenant-a")
    blocks = np.arange(20, dtype=np.int64)
    with (
        kvortex.Device.open("host") as device,
        kvortex.PinnedPool(24 * 8192, layout.block_bytes, device) as pool,
        kvortex.Stream.create(device) as stream,
        kvortex.TransferQueue(device, "D2H") as saves,
        kvortex.TransferQueue(device, "H2D") as loads,
    ):
        index = kvortex.BlockIndex(pool.num_slots)
        index.add_slots(0, pool.num_slots)
        save = saver.Saver(index, pool, saves, layout, b"tenant-a")
        assert save(tokens[: BLOCK_TOKENS * 12], blocks, stream.handle) == 12
        assert save(tokens, blocks, stream.handle) == 20
        assert save(tokens, blocks[::-1].copy(), stream.handle) == 20, "what is there is not saved again"
        for unfit in (blocks[:19], blocks + 45):
            try:
                save(tokens, unfit, stream.handle)
                raise AssertionError(f"{unfit} was taken")
            except ValueError:
                pass
        slots = index.acquire(keys, layout.block_bytes)
        assert len(slots) == 20 and index.lookup(keys)[1] == 20
        loads.submit(layout, np.arange(40, 60), pool, slots, stream=stream).wait()
        assert (cache[:, :, 40:60] == cache[:, :, :20]).all()
        # Everything is pinned but 4 slots: what finds no room is not saved, and said so.
        assert save(tokens[7:], blocks, stream.handle) == 4
        index.release(slots)
        saves.close()
        assert save(tokens[9:], blocks, stream.handle) == 0, "a closed queue refuses, and its slots are given back"
        assert save(tokens[9:], blocks, stream.handle) == 0
    print(f"a module built against {Path(kvortex.__file__).parent} saved and loaded {len(slots)} blocks")


if __name__ == "__main__":
    use(build(Path(sys.argv[1]).resolve()))
