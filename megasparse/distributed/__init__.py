"""Ranks and hosts: rendezvous, control plane, watchdog, signals, supervision; without a model."""
