"""A pickle read as data gives what pickle gives; objects become records, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import pickle

import pytest
import torch

from megasparse.convert.megatron.inert_pickle import Record, read
from megasparse.errors import CheckpointError

SHARED = ["shared"]
VALUES = {
    "constants": [None, True, False],
    "whole numbers": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**40), 1 << 3000],
    "other values": [0.5, "", "text", "ä" * 300, b"bytes", b"x" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((1,), 2))],
    "lists": [[], [1], [1, 2], [[1], [2, [3]]]],
    "dicts": [{}, {"a": 1}, {"a": 1, "b": {"c": (2, [3])}}, {1: None}],
    "an empty set": [set()],
    "the same twice": [SHARED, SHARED, (SHARED, "shared")],
    "many": [[f"n{i}", i] for i in range(400)] * 2,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_values_are_pickles(name, protocol):
    value = VALUES[name]
    if protocol == 2 and name == "other values":
        value = [one for one in value if not isinstance(one, bytes)]  # by a function there
    if protocol < 4 and name == "an empty set":
        value = []  # likewise
    found = read(pickle.dumps(value, protocol), "file")
    assert found == value and list(map(type, found)) == list(map(type, value))
    if name == "the same twice":
        assert found[0] is found[1] is found[2][0]


class Plain:
    """Something with attributes."""


class Listed:
    """Something with a state that is a tuple."""

    def __getstate__(self):
        return (1, "two")

    def __setstate__(self, state):
        raise AssertionError("nothing is run")


class Given:
    """Made with arguments."""

    def __reduce__(self):
        return Given, ("argument", 2), {"more": 3}


class Bare:
    """With a state that is neither a dict nor a tuple."""

    def __getstate__(self):
        return [1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_become_records(protocol):
    plain = Plain()
    plain.size, plain.inner = 3, [argparse.Namespace(a=1)]
    values = [plain, Listed(), Given(), Bare(), torch.Size([2, 3]), torch.Size([]), Plain]
    one, listed, given, bare, size, none, kind = read(pickle.dumps(values, protocol), "file")
    name = f"{__name__}.Plain"
    assert (one.name, one.args, one.state["size"]) == (name, (), 3)
    (inner,) = one.state["inner"]
    assert (inner.name, inner.state) == ("argparse.Namespace", {"a": 1})
    assert (listed.args, listed.state) == ((1, "two"), {})
    assert (given.args, given.state) == (("argument", 2), {"more": 3})
    assert (bare.args, bare.state) == ((), {})
    assert size == (2, 3) and none == () and type(size) is tuple
    assert isinstance(kind, Record) and (kind.name, kind.args, kind.state) == (name, (), {})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps([1, 2], 0), "has the operation"),
        (pickle.dumps({1, 2}, 4), "has the operation ADDITEMS, which is not read"),
        (pickle.dumps(collections.OrderedDict(a=1).items, 4), None),
        (pickle.dumps([1, 2], 4)[:-1], "damaged"),
        (b"", "damaged"),
        (b"\x80\x04}K\x01K\x02\x85\x85R.", "an object without a class"),  # calls a number
        (b"\x80\x04K\x01(K\x02K\x03\x90.", "has the operation ADDITEMS"),
        (b"\x80\x04}(K\x01u.", "damaged"),  # a key without a value
    ],
)
def test_what_is_no_data_is_refused(data, words):
    if words is None:
        with pytest.raises(CheckpointError, match="file: "):
            read(data, "file")
        return
    with pytest.raises(CheckpointError, match=f"file: .*{words}"):
        read(data, "file")
