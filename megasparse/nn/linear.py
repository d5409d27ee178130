"""`torch.nn.Linear` with the three GEMMs of a recipe.

The parameter stays the one that the model had, dense and in its own precision, so that optimizers,
checkpoints and wrappers see nothing new. The operands of a step are made at the layer's first use
in it, of the whole weight: what FSDP2 has gathered by then.
"""

from __future__ import annotations

import weakref

import torch
from torch.distributed.tensor import DTensor

from megasparse.errors import ConfigError
from megasparse.log import warn_once
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.clock import draw_key
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.protocol import LinearGemms
from megasparse.sparsity.state import SparseWeight

# torch.compile shows it with the graph break, or in the error that fullgraph=True raises.
_NOT_COMPILED = "megasparse's GEMMs choose their operands on the host, once an optimizer step"


class SparseLinear(torch.nn.Linear):
    """A linear layer of a model that `sparsify_` was called on; made by `become`.

    Attributes:
        state: mask, scale and operands of the weight; None: it stays dense, in FP8.
        dense: its FP8 operands then.
    """

    state: SparseWeight | None
    dense: DenseFp8Weight | None
    _run: Run | None
    _name: str
    _key: int
    _draws: tuple[int, int, int]  # step, backward passes in it, the weight's version
    _summed: bool  # a gradient was added to `weight.grad` since the last draw
    _made_of: tuple[torch.dtype, int] | None  # dtype and version of the operands' weight

    @staticmethod
    def become(
        module: torch.nn.Linear, owner: SparseWeight | DenseFp8Weight, name: str, run: Run
    ) -> SparseLinear:
        """Turn a linear into one, in place: parameters, hooks and references stay.

        Args:
            owner: of the weight's operands.
            name: of the layer in the model.
            run: shared with the other layers.
        """
        was: type[torch.nn.Linear] = type(module)
        kind: type[torch.nn.Linear] = SparseLinear
        if was is not torch.nn.Linear:  # a subclass that computes the same
            kind = type(f"Sparse{was.__name__}", (SparseLinear, was), {})
        module.__class__ = kind
        assert isinstance(module, SparseLinear)
        module.__dict__["_was"] = (was, kind)
        sparse = isinstance(owner, SparseWeight)
        # Beside the module's parameters and buffers: neither `state_dict` nor a cast finds it.
        module.__dict__["state"] = owner if sparse else None
        module.__dict__["dense"] = None if sparse else owner
        module._run, module._name, module._key = run, name, draw_key(name)
        module._draws, module._made_of, module._summed = (0, 0, 0), None, False
        module._watch_gradient()
        return module

    def _watch_gradient(self) -> None:
        """Note when gradients are summed, so that one which is dropped can be told (`_seed`)."""
        mine = weakref.ref(self)

        def note(_: torch.Tensor) -> None:
            if (layer := mine()) is not None:
                layer._summed = True

        if self.weight.requires_grad:
            self.__dict__["_hook"] = self.weight.register_post_accumulate_grad_hook(note)

    def become_dense(self) -> None:
        """Be a plain `torch.nn.Linear` again."""
        if (hook := self.__dict__.pop("_hook", None)) is not None:
            hook.remove()
        known = ("state", "dense", "_handle", "_name", "_key", "_draws", "_made_of", "_summed")
        for name in known:
            self.__dict__.pop(name, None)
        self._run = None
        was, became = self.__dict__["_was"]
        if type(self) is became:  # else FSDP2 has made a class of its own of it
            del self.__dict__["_run"], self.__dict__["_was"]
            self.__class__ = was

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W~^T + b`, `(..., K)` -> `(..., N)`; in autocast's precision where that is on."""
        run = self._run
        if run is None:
            return super().forward(x)
        run.begin_forward()
        kind, dtype = x.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype != dtype:
            raise RuntimeError(f"{self._name}: the input is {x.dtype}, expected {dtype}")
        with torch.autocast(kind, enabled=False):
            gemms = self._gemms(run, dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            if x.numel() == 0:  # no tokens, no draws
                return torch.nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)
            tokens = x.to(dtype) if x.dim() > 1 else x.to(dtype)[None]
            z = linear(tokens, self.weight, gemms, seed=self._seed, bias=bias)
        return z if x.dim() > 1 else z[0]

    def _gemms(self, run: Run, dtype: torch.dtype) -> LinearGemms:
        weight = self.weight
        if isinstance(weight, DTensor):
            raise ConfigError(
                f"{self._name}: the weight is sharded {weight.placements} while it is used, "
                "expected a whole one; tensor parallelism is megasparse.megatron's"
            )
        if run.scaling is not None and dtype != torch.bfloat16:
            raise ConfigError(
                f"{self._name}: fp8 with {dtype}, expected bfloat16: FP8 GEMMs give bfloat16; use "
                "torch.autocast(..., dtype=torch.bfloat16) or model.bfloat16()"
            )
        step, sparse, made = run.clock.step, run.sparse_now, (dtype, weight._version)
        if self._made_of is not None and self._made_of != made:
            self._note_change(made, step)
        if self.state is None:
            assert self.dense is not None
            fresh = self._made_of is not None and self.dense.ready_for == step
            operand = weight if fresh else weight.detach().to(dtype)
            self._made_of = made
            return self.dense.gemms(operand, step)
        self._follow(weight.device)
        fresh = self._made_of is not None and self.state.ready_for == (step, sparse)
        operand = weight if fresh else weight.detach().to(dtype)
        self._made_of = made
        return self.state.gemms(operand, step, sparse, run.monitor)

    def _note_change(self, made: tuple[torch.dtype, int], step: int) -> None:
        """The weight, or the precision that it is wanted in, is not that of the operands."""
        assert self._made_of is not None
        if self._made_of[0] != made[0]:
            self.forget_operands()
            return
        owner = self.state or self.dense
        assert owner is not None
        ready = owner.ready_for
        if (ready[0] if isinstance(ready, tuple) else ready) == step and self.training:
            warn_once(
                "%s: the weight has changed, but no torch optimizer stepped on it; with an "
                "optimizer of another kind call handle.step() before its step",
                self._name,
            )
        self.invalidate()

    def _follow(self, device: torch.device) -> None:
        """Take the state along to where the model was moved."""
        assert self.state is not None
        mask = self.state.mask
        if mask is not None and mask.device != device:
            self.state.import_state(self.state.export_state(), device)

    def forget_operands(self) -> None:
        """Make operands anew, of another precision."""
        if self.state is not None:
            self.state.forget_operands()
        self.invalidate()

    def invalidate(self) -> None:
        """The weight was changed from outside: make its operands anew at their next use."""
        if self._run is None:
            return
        for owner in (self.state, self.dense):
            if owner is not None:
                owner.invalidate()
        self._made_of = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self.invalidate()

    def _seed(self) -> int:
        """Of the draws of one backward pass; asked in it, so that recomputation counts once.

        A gradient that is gone while the weight is what it was belonged to a step that was skipped,
        as by GradScaler: the step begins anew, and draws what it would have drawn.
        """
        run, weight = self._run, self.weight
        assert run is not None
        step, number, version = self._draws
        dropped = self._summed and weight.grad is None and version == weight._version
        if step != run.clock.step or dropped:
            number = 0
        self._draws, self._summed = (run.clock.step, number + 1, weight._version), False
        return run.seed(self._key, number)

    def extra_repr(self) -> str:
        """One line for `print(model)`, an audit of what is sparse."""
        if self._run is None:
            return super().extra_repr()
        how = "dense" if self.state is None else f"{self._run.recipe.name} 2:4"
        return super().extra_repr() + f", {how}" + (", fp8" if self._run.scaling else "")
