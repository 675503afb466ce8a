"""Benchmarks: `pytest benchmarks`, `python -m benchmarks.against`, `python -m benchmarks.scaling` and others."""
