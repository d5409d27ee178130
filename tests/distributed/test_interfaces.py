"""Which interface leads where, on this machine."""

from __future__ import annotations

from megasparse.distributed.interfaces import interface_towards, is_loopback, local_address


def test_loopback_is_told_from_other_addresses():
    assert is_loopback("localhost") and is_loopback("127.0.1.1") and not is_loopback("10.9.9.9")


def test_the_way_to_this_host_is_loopback():
    assert interface_towards("127.0.0.1") == "lo" and local_address("127.0.0.1") == "127.0.0.1"
    assert local_address("no-such-host.invalid") is None
