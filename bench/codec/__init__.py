"""What a codec costs a model: `python -m bench.codec`."""
