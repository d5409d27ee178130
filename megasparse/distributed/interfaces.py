"""Which of this host's network interfaces leads to another host, found without sending anything.

gloo binds to the address that the host's own name resolves to, which on many systems is loopback:
between nodes the interface must be set.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_IPV6_TABLE = Path("/proc/net/if_inet6")


def is_loopback(host: str) -> bool:
    """Whether a name or address stands for this host alone, as far as can be resolved."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(a).partition("%")[0]).is_loopback for a in found)


def local_address(host: str) -> str | None:
    """This host's address on the way to `host`; None when there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: a look at the routes, no packet
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """The name of the interface that has `local_address(host)`; None when there is none."""
    address = local_address(host)
    if address is None:
        return None
    if ":" in address:
        return _ipv6_interface(address.partition("%")[0])
    for _, name in socket.if_nameindex():
        if _ipv4_address(name) == address:
            return name
    return None


def _ipv4_address(name: str) -> str | None:
    """The first IPv4 address of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def _ipv6_interface(address: str) -> str | None:
    wanted = ipaddress.ip_address(address)
    try:
        lines = _IPV6_TABLE.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        digits, *_, name = line.split()
        if ipaddress.IPv6Address(int(digits, 16)) == wanted:
            return name
    return None
