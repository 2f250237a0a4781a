"""The one package that joins the parts: code that needs a key and an address, or a policy, is here."""

from kvortex.engine._engine import BlockHits
from kvortex.engine.engine import KVortexEngine

__all__ = ["BlockHits", "KVortexEngine"]
