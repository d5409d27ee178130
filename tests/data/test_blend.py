"""`--data-path` and `--split`: Megatron's readings where it reads rightly, errors elsewhere."""

from __future__ import annotations

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.utils import get_blend_from_list

from megasparse.data.blend import Blend, parse_data_path, parse_split
from megasparse.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (["a"], Blend(("a",), None)),
        (["a", "b"], Blend(("a", "b"), None)),
        (["a", "b", "c"], Blend(("a", "b", "c"), None)),
        (["1", "a"], Blend(("a",), (1.0,))),
        (["0.7", "a", "0.3", "b"], Blend(("a", "b"), (0.7, 0.3))),
        (["30", "x/1", "7e1", "x/2", "0.5", "./3"], Blend(("x/1", "x/2", "./3"), (30, 70, 0.5))),
    ],
)
def test_data_path_is_read_as_megatron_reads_it(words: list[str], blend: Blend) -> None:
    assert parse_data_path(words) == blend
    assert parse_data_path(" ".join(words)) == blend
    prefixes, weights = get_blend_from_list(words)
    assert (tuple(prefixes), None if weights is None else tuple(weights)) == (
        blend.prefixes,
        blend.weights,
    )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "nothing"),
        ("  ", "nothing"),
        (["5"], "'5'"),
        (["1", "2"], "'1 2'"),
        (["a", "0.3"], "'a 0.3'"),
        (["0.3", "a", "b"], "'0.3 a b'"),
        (["0.3", "a", "b", "0.7"], "'0.3 a b 0.7'"),
        (["0.3", "a", "b", "c"], "'0.3 a b c'"),
        (["-1", "a", "2", "b"], "weight -1 for a"),
        (["1", "a", "nan", "b"], "weight nan for b"),
        (["inf", "a"], "weight inf for a"),
        (["0", "a", "0", "b"], "weight 0 for a"),
        (["1", "a", "0", "b"], "weight 0 for b"),
        (["a", "b", "a"], "found a twice"),
        (["1", "x/a", "2", "x//./a"], "twice"),
        (["a.bin"], "without .bin"),
        (["1", "a.idx"], "without .idx"),
        (["a", ""], "empty prefix"),
    ],
)
def test_data_path_refuses(words: list[str] | str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_data_path(words)
    assert str(caught.value).startswith("--data-path: ") and found in str(caught.value)


@pytest.mark.parametrize("split", ["969,30,1", "99,1,0", "1,0,0", "8,2", "1", "0.9, 0.05, 0.05"])
def test_split_is_normalised_as_megatron_does(split: str) -> None:
    fractions = parse_split(split)
    assert fractions == pytest.approx(parse_and_normalize_split(split), abs=1e-15)
    assert sum(fractions) == pytest.approx(1)


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("", "''"),
        ("a,b,c", "'a,b,c'"),
        ("1,2,3,4", "'1,2,3,4'"),
        ("9;1", "'9;1'"),
        ("9,,1", "'9,,1'"),
        ("9,-1,1", "-1 for valid"),
        ("9,nan,1", "nan for valid"),
        ("9,1,inf", "inf for test"),
        ("0,0,0", "train part above 0"),
        ("0,5,5", "train part above 0"),
        ("1e308,1e308,0", "not finite"),
    ],
)
def test_split_refuses(split: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_split(split)
    assert str(caught.value).startswith("--split: ") and found in str(caught.value)
