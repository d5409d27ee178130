"""States of weights that one rank has read, given to those that hold the same.

A state is a few small tensors of several types: all of them travel as one run of bytes, behind a
JSON head that says what they are.
"""

from __future__ import annotations

import json

import torch

from megasparse.megatron.grid import Replicas
from megasparse.tensor_files import raw_bytes

State = dict[str, torch.Tensor]


def share_states(
    replicas: Replicas, device: torch.device, owner: int, states: dict[int, State]
) -> dict[int, State]:
    """The states that one of the ranks that hold the same has read, on all of them, on the CPU.

    Args:
        device: of the ranks.
    """
    if replicas.size == 1:
        return states
    head, content = b"", torch.empty(0, dtype=torch.uint8)
    if replicas.rank == owner:
        flat = {(n, k): v for n, state in states.items() for k, v in state.items()}
        record = [[*key, str(v.dtype).split(".")[1], list(v.shape)] for key, v in flat.items()]
        head = json.dumps(record).encode()
        content = torch.frombuffer(
            bytearray(head + b"".join(raw_bytes(v) for v in flat.values())), dtype=torch.uint8
        )
    sizes = torch.tensor([len(head), content.numel()], device=device)
    replicas.from_rank(sizes, owner)
    length, total = sizes.tolist()
    room = torch.empty(total, dtype=torch.uint8, device=device)
    if replicas.rank == owner:
        room.copy_(content)
    content = replicas.from_rank(room, owner).cpu()
    found: dict[int, State] = {}
    place = length
    for number, kind, name, shape in json.loads(content[:length].numpy().tobytes()):
        dtype = getattr(torch, name)
        end = place + torch.Size(shape).numel() * dtype.itemsize
        values = content[place:end].clone().view(dtype).view(shape)
        found.setdefault(number, {})[kind] = values
        place = end
    return found
