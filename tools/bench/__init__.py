"""Measurements, run from the root as `python -m tools.bench.NAME`, and tests of endurance."""
