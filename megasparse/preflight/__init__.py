"""Checks before the first step: settings, data, hosts, links."""
