"""Benchmarks: `pytest benchmarks`, `python -m benchmarks.ratios`, `python -m benchmarks.scaling`."""
