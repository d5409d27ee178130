"""Comparisons of recipes and of ways to make a model 2:4: `python -m tools.experiments.NAME`."""
