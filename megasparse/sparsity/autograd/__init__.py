"""Autograd functions around the three GEMMs: linear, gated feed-forward, norm."""
