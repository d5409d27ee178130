"""A page as a headless Chromium shows it; tests that need one are skipped where there is none."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1400,900", "--virtual-time-budget=30000", "--dump-dom",
]  # fmt: skip


@dataclass(frozen=True)
class Page:
    """What stands on the first screen.

    Attributes:
        dom: of the page once its scripts have run.
        pixels: `(900, 1400, 3)` uint8.
    """

    dom: str
    pixels: np.ndarray

    def count(self, red: int, green: int, blue: int, near: int = 8) -> int:
        """Pixels of about a colour."""
        distance = np.abs(self.pixels.astype(int) - (red, green, blue)).max(-1)
        return int((distance <= near).sum())


def open_page(address: str, folder: Path) -> Page:
    """Open a page; skips the test where no browser is.

    Args:
        folder: for the browser's own files and the picture.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"nothing to look at pages with: found none of {', '.join(NAMES)}")
    picture = folder / "screen.png"
    own = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}"]
    result = subprocess.run(
        [browser, *FLAGS, *own, address], capture_output=True, timeout=120, check=True
    )
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).astype(np.uint8)
    return Page(result.stdout.decode("utf-8", "replace"), pixels)
