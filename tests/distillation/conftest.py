"""A tiny dataset and a dense model trained on it, shared by the tests of retraining."""

from __future__ import annotations

import pytest

from tests import dist
from tests.distillation.runs import DENSE
from tests.runs import make_dataset, train


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def dense(tmp_path_factory, dataset) -> str:
    """Folder of the checkpoints of a dense run."""
    folder = tmp_path_factory.mktemp("dense")
    dist.run(train, 1, [*DENSE, "--data-path", dataset, "--run-dir", str(folder)])
    return str(folder / "checkpoints")
