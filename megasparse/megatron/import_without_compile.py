"""megatron-core without torch's compiler, for a quicker start."""

from __future__ import annotations

import torch


def import_megatron() -> None:
    """Import megatron-core as for a torch that has no `torch.compile`.

    It decorates small functions (fused activations, cross entropy, dropout) with the compiler, the
    import of which takes longer than torch's own (`python -X importtime`). The models that this
    package builds use none of them, with or without GPUs; here they remain what they are in Python.
    Only for a process whose models are all its own, and before anything else imports megatron-core:
    it changes nothing later.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_function
