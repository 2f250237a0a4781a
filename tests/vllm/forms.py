"""Every form of KV cache groups that a version of vLLM knows, as options of a `Rig`."""

from dataclasses import fields

from rig import HAS_WORKER_METADATA
from rig_cache import HAS_ONE_ALLOCATION
from vllm.v1.kv_cache_interface import KVCacheTensor

HAS_PACKED = "block_stride" in {field.name for field in fields(KVCacheTensor)}  # 0.26

FORMS = {
    "full": {"groups": ("full",)},
    "mla": {"groups": ("mla",)},
    "unequal_layers": {"groups": ("full",), "mixed_pages": True},
    "window": {"groups": ("window:64",)},
    "full_and_window": {"groups": ("full", "window:64")},
    "full_and_long_window": {"groups": ("full", "window:1024")},
    "full_and_chunks": {"groups": ("full", "chunk:64")},
    "full_and_state": {"groups": ("full", "state")},
    "state": {"groups": ("state",)},
    "mla_and_state": {"groups": ("mla", "state")},
    "six": {"groups": ("full", "window:64", "window:64", "window:32", "window:400", "chunk:64"), "layers": 1},
    "six_with_states": {"groups": ("full", "window:64", "window:40", "chunk:64", "state", "state"), "layers": 1},
    "long_blocks_of_a_window": {"groups": ("full", "window:64"), "block_tokens": (16, 32)},
    "short_blocks_of_a_window": {"groups": ("full", "window:64"), "block_tokens": (32, 16)},
    "fewer_layers": {"groups": ("full", "window:64", "window:64"), "layers": (3, 2, 1)},
    "no_layers": {"groups": ("full", "window:64", "full"), "layers": (2, 1, 0)},
}
if HAS_PACKED:
    FORMS["padded_pages"] = {"groups": ("full", "window:64"), "pad_bytes": 64}
    FORMS["packed_unequal_layers"] = {"groups": ("full", "window:64"), "mixed_pages": True, "layout": "BLHNC"}
if HAS_ONE_ALLOCATION:
    for layout in ("LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"):
        FORMS[f"layout_{layout}"] = {"groups": ("full", "window:64"), "layout": layout}
    FORMS["packed_states"] = {"groups": ("full", "state"), "layout": "BLHNC"}
    FORMS["half_blocks_hashed"] = {"groups": ("full", "state"), "block_tokens": 32, "hash_tokens": 16}
for form in FORMS.values():
    form["num_blocks"] = 61 if len(form["groups"]) < 3 else 211  # a prime, and some requests are preempted

STATES = [name for name, form in FORMS.items() if "state" in form["groups"]]
RUNNERS = ("v1", "v2") if HAS_WORKER_METADATA else ("v1",)
