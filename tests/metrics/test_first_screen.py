"""TensorBoard's first screen, in a browser: loss, learning rate and throughput."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request

from megasparse.config import LoggingConfig
from megasparse.metrics.schema import METRICS
from megasparse.metrics.writers import MetricsWriter
from tests.browser import open_page
from tests.dist import free_port

ORANGE, LINE = (245, 124, 0), (66, 80, 102)  # of its head, and of the first run's curves


def test_the_first_screen_is_loss_learning_rate_and_throughput(tmp_path):
    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "tb"))
    writer = MetricsWriter(tmp_path, logging)  # type: ignore[arg-type]
    for step in range(1, 9):
        every = {m.key: 1.0 + step % 3 for m in METRICS if m.tag}
        writer.write({**every, "step": step}, {"w": {"density": 0.5}})
    writer.close()
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "tb")]
        + ["--port", str(port), "--host", "127.0.0.1", "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_it_has_read(address)
        page = open_page(address, tmp_path)
    finally:
        server.kill()
        server.wait()
    cards = list(dict.fromkeys(re.findall(r"curves/[a-z_]+|[a-z_]+/[a-z_]+/w", page.dom)))
    wanted = ["learning_rate", "loss", "tokens_per_second", "validation_loss"]
    assert cards[:4] == [f"curves/{name}" for name in wanted]
    assert page.count(*ORANGE) > 10_000 and page.count(*LINE) > 300


def _wait_until_it_has_read(address: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags") as answer:
                if b"curves/loss" in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError("TensorBoard has not read the run within a minute")
