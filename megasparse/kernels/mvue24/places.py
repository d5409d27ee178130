"""Where the tokens of a gradient lie among those that its draws are counted over.

A rank of context parallelism has two runs of tokens that do not follow each other. MVUE's draws are
functions of the global token, so the kernels that draw take the place of each run.
"""

from __future__ import annotations

from typing import NamedTuple

from megasparse.errors import KernelError

# Runs of consecutive tokens: (first local token, its place in the whole), in order, at most two.
Places = tuple[tuple[int, int], ...]
FIRST: Places = ((0, 0),)


class GroupShifts(NamedTuple):
    """What a kernel adds to the local number of a group of 4 tokens to get its global one.

    Attributes:
        split: groups from here on are of the second run.
        first, second: shifts of the groups before `split` and from it on.
    """

    split: int
    first: int
    second: int


def check_places(op: str, places: Places, strided: bool = False) -> None:
    """KernelError unless there are one or two runs, from local token 0 on, of whole groups.

    Args:
        strided: groups reach over all tokens, so all must be here.
    """
    if strided and places != FIRST:
        raise KernelError(f"{op}: runs {places} of tokens, expected all of them where strided")
    starts = [start for start, _ in places]
    if len(places) not in (1, 2) or starts[0] != 0 or starts != sorted(set(starts)):
        raise KernelError(f"{op}: runs {places} of tokens, expected one or two from token 0 on")
    if any(start % 4 or place % 4 or place < 0 for start, place in places):
        raise KernelError(f"{op}: runs {places} of tokens, expected multiples of 4")


def group_shifts(places: Places) -> GroupShifts | None:
    """For a kernel; None where local numbers are the global ones."""
    if places == FIRST:
        return None
    (_, place), (start, second) = places[0], places[-1]
    split = start // 4 if len(places) == 2 else (1 << 31) - 1
    return GroupShifts(split, place // 4, (second - start) // 4)
