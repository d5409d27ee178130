"""What the ranks of a tensor-parallel group exchange in a layer: gathers, sums, opened memory."""
