"""Files of a checkpoint are readable by others."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.checkpoint.saves import (
    tensors_of,
    write_checkpoint,
)


def test_files_are_plain_safetensors(tmp_path):
    folder = write_checkpoint(tmp_path, 7, ranks=1)
    loaded = load_file(folder / "rank-00000.safetensors")
    for name, (_, value) in tensors_of(7).items():
        assert torch.equal(loaded[name], value)
