"""Rank 6: adapters to inference engines. Each imports its engine only when it is asked for."""
