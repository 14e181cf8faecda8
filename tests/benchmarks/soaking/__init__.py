"""The rounds of `tests/benchmarks/soak.py`: world, disk, hub, programs, damage."""
