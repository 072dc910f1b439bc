"""Programs that measure speed, memory and quality: `python -m benchmarks.NAME` from the root of the repository."""
