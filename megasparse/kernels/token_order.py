"""The order of tokens in which four of one MVUE group stand side by side.

Groups of four neighbours take the tokens as they come. Strided groups are `(t, t + Q, t + 2 Q,
t + 3 Q)` with `Q = T / 4`: tokens that lie far apart differ more, and the estimator's variance is
less. A sum over tokens does not depend on their order, so both operands of `dW = dZ^T X` are laid
out group by group, and the sparse GEMM never knows.
"""

from __future__ import annotations

import torch


def by_groups(x: torch.Tensor) -> torch.Tensor:
    """x (T, ...) with its tokens in the order of strided groups: 0, Q, 2 Q, 3 Q, 1, Q + 1, ...

    Args:
        x: any dtype; T is a multiple of 4.

    Returns: a copy.
    """
    return x.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def step_within(tokens: int, strided: bool) -> int:
    """Tokens between one of a group and the next.

    Args:
        tokens: all of them, a multiple of 4, padding included.
    """
    return tokens // 4 if strided else 1
