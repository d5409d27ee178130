"""Lines of progress."""

from __future__ import annotations

from megasparse.metrics import schema as metrics_module


def test_time_left_is_readable():
    texts = [metrics_module._clock(s) for s in (0, 65, 3600, 86399, 90061)]
    assert texts == ["0:00", "1:05", "1:00:00", "23:59:59", "1 d 01:01:01"]
