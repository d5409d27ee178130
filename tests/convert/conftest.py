"""A tiny dataset shared by the tests of runs that start from, or end in, another format."""

from __future__ import annotations

import pytest

from tests.runs import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("converted") / "data")
