"""Fixed-rate codecs: a block's bfloat16 vectors in 8 to 4 bits a number, and where they lie in the packed block."""

from kvortex.codec._codec import FORMAT_VERSION, pack_block, unpack_block
from kvortex.codec.planes import CODECS, PackedBlock, Plane, planes_of

__all__ = ["CODECS", "FORMAT_VERSION", "PackedBlock", "Plane", "pack_block", "planes_of", "unpack_block"]
