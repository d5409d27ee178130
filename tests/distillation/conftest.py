"""A dense model that the tests of retraining share."""

from __future__ import annotations

import pytest

from tests import dist
from tests.distillation.runs import DENSE
from tests.runs import train


@pytest.fixture(scope="session")
def dense(tmp_path_factory, dataset) -> str:
    """Folder of the checkpoints of a dense run."""
    folder = tmp_path_factory.mktemp("dense")
    dist.run(train, 1, [*DENSE, "--data-path", dataset, "--run-dir", str(folder)])
    return str(folder / "checkpoints")
