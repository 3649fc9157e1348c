"""What training costs in CPU seconds and memory, beside other ways to do the same work. See `benchmarks.speed.run`."""
