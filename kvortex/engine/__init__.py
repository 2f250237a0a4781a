"""The one package that joins the parts: whoever needs a key and an address, or a policy, lives here."""

from kvortex.engine._engine import BlockHits
from kvortex.engine.engine import KVortexEngine

__all__ = ["BlockHits", "KVortexEngine"]
