"""The commands. Measurements are in `bench/`, the comparisons of recipes in `experiments/`."""
