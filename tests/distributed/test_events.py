"""Points of a run reach every listener in order; what each listener makes of them."""

from __future__ import annotations

from megasparse.distributed.events import NO_LISTENERS, Events


def test_every_listener_is_called_in_order():
    heard = []
    events = Events(lambda *at: heard.append(("a", *at)), lambda *at: heard.append(("b", *at)))
    events("build")
    events("forward", 3, 1)
    assert heard == [
        ("a", "build", 0, 0),
        ("b", "build", 0, 0),
        ("a", "forward", 3, 1),
        ("b", "forward", 3, 1),
    ]
    NO_LISTENERS("forward", 3, 1)
