"""The line of one host's processes: all hear what one says, and there is always one that leads."""

from __future__ import annotations

import os
import socket

import pytest

from megasparse.distributed.host_line import HostLine


@pytest.fixture
def name(tmp_path) -> str:
    return str(tmp_path)


def _heard(lines: list[HostLine]) -> list[list[dict]]:
    """What each hears, once all has been passed on."""
    heard: list[list[dict]] = [[] for _ in lines]
    for _ in range(8):
        for messages, line in zip(heard, lines, strict=True):
            messages += line.hear(0.002)
    return heard


def test_all_hear_what_one_says_and_those_who_come_later_too(name):
    lines = [HostLine(name) for _ in range(5)]
    _heard(lines)
    assert [line.leads for line in lines] == [True] + [False] * 4
    failed, order = {"failed": 1}, {"order": 2}
    lines[3].say(failed)
    assert _heard(lines) == [[failed], [failed], [failed], [], [failed]]
    lines[0].say(order)
    assert _heard(lines) == [[], [order], [order], [order], [order]]
    late = HostLine(name)
    assert _heard([lines[0], late])[1] == [failed, order]
    assert _heard([HostLine(f"{name}/other")]) == [[]]


@pytest.mark.parametrize("gone", [1, 3])
def test_another_one_leads_when_the_leader_has_ended(name, gone):
    """What the leader said last is heard, and what others said to it is not lost."""
    lines = [HostLine(name) for _ in range(5)]
    _heard(lines)
    for number in range(gone):
        (leader,) = [line for line in lines if line.leads]
        lines.remove(leader)
        leader.say({"last": number})
        lines[-1].say({"unheard": number})
        leader.close()
        heard = _heard(lines)
        assert sum(line.leads for line in lines) == 1
        assert all({"last": number} in messages for messages in heard), heard
        assert all({"unheard": number} in messages for messages in heard[:-1]), heard


def test_what_is_no_message_does_no_harm(name):
    leader = HostLine(name)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(leader._address)
        stranger.sendall(b'no json\n[1]\n{"half": ')
        member = HostLine(name)
        member.say({"failed": 0})
        assert _heard([leader, member])[0] == [{"failed": 0}]
        stranger.sendall(bytes(100_000))  # a line without an end
        assert _heard([leader]) == [[]]
        assert len(leader._peers) == 1


def test_another_user_who_has_the_name_is_not_listened_to(name, monkeypatch):
    stranger = HostLine(name)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    line = HostLine.__new__(HostLine)
    line.__dict__.update(stranger.__dict__, _server=None, _peers={}, leads=False)
    line._join()
    assert line.leads and not line._peers
