"""Stands in for what builds vLLM, where only its source is wanted: the metadata are in the archive."""
