"""GEMMs for tests, with their operands: of a weight that is pruned already."""

from __future__ import annotations

import torch

from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms
from megasparse.sparsity.gemms.simulated_fp8 import SimulatedFp8Gemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe


def drawing(mvue):
    """A recipe that prunes output gradients in a way."""
    return make_recipe("fst", mvue=mvue)


def filled(gemms, w_NK):
    """The GEMMs with all of a weight."""
    gemms.refill(w_NK.detach(), Projected(torch.ones_like(w_NK, dtype=torch.bool)))
    return gemms


def reference_sparse(effective_NK, mvue, channels):
    return filled(ReferenceSparseGemms(drawing(mvue), channels), effective_NK)


def simulated_fp8(effective_NK, mvue, channels):
    return filled(SimulatedFp8Gemms(drawing(mvue), channels), effective_NK)


def dense_fp8(w_NK, quantizers):
    return filled(DenseFp8Gemms(quantizers), w_NK)
