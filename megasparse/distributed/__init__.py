"""Ranks and hosts: rendezvous, control plane, watchdog, signals, supervision; knows no model."""
