"""What the benchmarks share: models, baselines, cases, short runs, profiles."""
