"""A seeded campaign of faults against real runs: ``python -m benchmarks.chaos`` (``make chaos``)."""
