"""Row-wise 2:4 pruning of a trained weight without training: the baselines of AST's paper.

| method    | keeps the two largest of                          | and then                |
|-----------|---------------------------------------------------|-------------------------|
| magnitude | `|w_ij|`                                          |                         |
| wanda     | `|w_ij| ||x_j||` (Sun et al., ICLR 2024)          |                         |
| sparsegpt | `w_ij^2 / U_jj^2` (Frantar, Alistarh, ICML 2023)  | corrects later columns  |

`G = X^T X` is the Gram matrix of the layer's inputs over the calibration tokens, U the upper
Cholesky factor of `(G + damping)^-1`. SparseGPT goes through the columns from left to right: the
error of a pruned entry is made up for by the columns right of it, `w_i,j: -= e U_j,j:`.
"""

from __future__ import annotations

import torch

from megasparse.errors import NumericsError
from megasparse.kernels import prune24_mask

METHODS = ("magnitude", "wanda", "sparsegpt")
_BLOCK = 128  # columns whose errors are brought to the rest in one product


def prune(
    weight: torch.Tensor, method: str, gram: torch.Tensor | None = None, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """A 2:4 weight and its mask.

    Args:
        weight: `(N, K)`.
        method: one of METHODS.
        gram: `X^T X` `(K, K)`, float32; its diagonal `(K,)` is enough for Wanda, and magnitude
            needs none.
        damping: SparseGPT's, as a share of the mean diagonal.

    Returns:
        The weight in its dtype with zeros where it is pruned, and the bool mask `(N, K)`.

    Raises:
        NumericsError: the Gram matrix is not positive definite even with the damping.
    """
    if method == "sparsegpt":
        assert gram is not None
        return _sparsegpt(weight, gram, damping)
    scores = weight
    if method == "wanda":
        assert gram is not None
        squares = gram if gram.dim() == 1 else gram.diagonal()
        scores = weight.float() * squares.clamp(min=0).sqrt()
    mask = prune24_mask(scores)
    return torch.where(mask, weight, torch.zeros_like(weight)), mask


def _sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    w = weight.detach().float().clone()
    columns = w.shape[1]
    factor = _inverse_factor(gram, damping)
    # Inputs that are always zero: their weights do nothing, and go first.
    w[:, gram.diagonal() <= 0] = 0.0
    mask = torch.empty_like(w, dtype=torch.bool)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if j % 4 == 0:
                four = slice(j, j + 4)
                mask[:, four] = prune24_mask((w[:, four] / factor.diagonal()[four]).contiguous())
            pruned = torch.where(mask[:, j], 0.0, w[:, j])
            error = pruned / factor[j, j]
            # Column j itself becomes w - pruned; those right of it in the block make up for it.
            w[:, j + 1 : stop] -= torch.outer(error, factor[j, j + 1 : stop])
            w[:, j] -= pruned
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(mask, w, 0.0).to(weight.dtype), mask


def _inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper, with `(G + damping mean(diag G))^-1 = U^T U`; float32 from float64."""
    g = gram.double().clone()
    diagonal = g.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damping * float(diagonal.mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(g))
        return torch.linalg.cholesky(inverse, upper=True).float()
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"a Gram matrix of {tuple(gram.shape)} is not positive definite ({error}); more "
            "calibration samples or a larger damping"
        ) from None
