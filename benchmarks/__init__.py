"""Benchmarks: `python -m benchmarks` runs all, `python -m benchmarks.ops` one of them."""
