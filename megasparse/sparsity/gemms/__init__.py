"""Implementations of the three GEMMs of a linear layer."""
