"""The version: here, so that what `kvortex` imports may name it."""

__version__ = "0.1.0"
