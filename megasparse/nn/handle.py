"""The handle of a sparse model: its step, its state in checkpoints, checks, and the way out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megasparse.errors import CheckpointError, NumericsError, ReplicaError
from megasparse.kernels import is_24
from megasparse.nn.linear import SparseLinear
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.automatic.updates import Target, Updates, install
from megasparse.sparsity.automatic.whole import local_of, part_of, whole_of
from megasparse.sparsity.state import SparseWeight

FORMAT = 1


@dataclass(frozen=True)
class Verified:
    """What `verify` found of one layer.

    Attributes:
        name: of the layer.
        density: non-zeros of the weight that the GEMMs use, over all; 1 in a dense phase.
        both: the transposed weight is 2:4 as well.
    """

    name: str
    density: float
    both: bool


class SparsityHandle:
    """What `sparsify_` returns.

    Steps need no call: hooks of `torch.optim` bring the masked decay between clipping and update,
    and count. `step()` is for optimizers that are no `torch.optim.Optimizer`.

    Attributes:
        layers: the linears by name: sparse ones, and dense ones in FP8.
    """

    def __init__(self, run: Run, layers: dict[str, SparseLinear]) -> None:
        self._run, self.layers = run, layers
        self._updates = Updates(run, layers, _locate)
        self._hooks = install(self._updates, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityHandle:
        """A copy of the model (an average of its weights) goes by the same clock."""
        return self

    @property
    def step_number(self) -> int:
        """Optimizer steps done."""
        self._run.finish_step()
        return self._run.clock.step

    @property
    def sparse_now(self) -> bool:
        """Whether GEMMs use the pruned weights in the step that is next or under way."""
        self._run.finish_step()
        return self._run.sparse_now

    def step(self) -> None:
        """Beside `optimizer.step()`: decay the gradients and count the step, if hooks have not.

        With a `torch.optim.Optimizer` the call is not needed and changes nothing. With another kind
        call it after clipping and before the optimizer's own step.
        """
        self._updates.by_hand()
        self._run.stepped = True

    def invalidate(self) -> None:
        """Make all operands anew: weights were changed by something other than an optimizer."""
        for layer in self.layers.values():
            layer.invalidate()

    def metrics(self) -> dict[str, float]:
        """Figures for a log: step, phase, lambda, and the flip rate of the latest refresh (the
        share of the mask's entries that changed; left out until there is one)."""
        self._run.finish_step()
        found = {
            "sparsity/step": float(self._run.clock.step),
            "sparsity/sparse": float(self._run.sparse_now),
            "sparsity/masked_decay": self._run.masked_decay(),
        }
        flips = [(s.flips, s.mask) for s in self._states().values() if s.flips is not None]
        entries = sum(mask.numel() for _, mask in flips if mask is not None)
        if entries:
            found["sparsity/flip_rate"] = sum(int(flipped) for flipped, _ in flips) / entries
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimizer: numbers, texts and tensors.

        It is of whole weights and the same on all ranks (FP8's delayed scales are each rank's own),
        so that one rank's is enough. A step that is half done is not kept.
        """
        self._run.finish_step()
        layers = {name: _owner(layer).export_state() for name, layer in self.layers.items()}
        run = self._run
        return {
            "format": FORMAT,
            "recipe": run.recipe.name,
            "seed": run.clock.seed,
            "step": run.clock.step,
            "layers": layers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, with the model's weights loaded.

        Raises:
            CheckpointError: it is of another format, recipe or model; nothing is changed then.
        """
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"sparsity state: format {state.get('format')!r}, expected {FORMAT}"
            )
        if state["recipe"] != self._run.recipe.name:
            raise CheckpointError(
                f"sparsity state: of the recipe {state['recipe']}, expected {self._run.recipe.name}"
            )
        kept, own = set(state["layers"]), set(self.layers)
        if kept != own:
            raise CheckpointError(
                f"sparsity state: layers differ: missing {_some(own - kept)}, "
                f"unexpected {_some(kept - own)}"
            )
        for name, layer in self.layers.items():
            mask = state["layers"][name].get("mask")
            if mask is not None and layer.state is not None:
                per = 16 if mask.shape[0] < layer.out_features else 4  # patterns of blocks, groups
                if mask.numel() * per != layer.in_features * layer.out_features:
                    raise CheckpointError(
                        f"sparsity state: {name}: a mask of {mask.numel() * per} entries, expected "
                        f"{layer.in_features * layer.out_features}"
                    )
        for name, layer in self.layers.items():
            kept_of_layer = state["layers"][name]
            if layer.state is not None:
                layer.state.import_state(kept_of_layer, layer.weight.device)
            elif layer.dense is not None:
                layer.dense.import_state(kept_of_layer)
            layer.invalidate()
        self._run.clock.seed, self._run.clock.step = int(state["seed"]), int(state["step"])
        self._run.stepped = False

    @torch.no_grad()
    def verify(self) -> list[Verified]:
        """Check every sparse weight as the GEMMs use it; with several ranks a collective call.

        Raises:
            NumericsError: a weight is not 2:4 (both ways for transposable masks), or has a NaN.
            ReplicaError: ranks disagree on masks or scales; it names the layer.
        """
        self._run.finish_step()
        found, digests = [], {}
        for name, state in self._states().items():
            weight = whole_of(self.layers[name].weight.detach())
            if bool(torch.isnan(weight).any()):
                raise NumericsError(f"{name}: the weight has a NaN")
            if not self._run.sparse_now:
                found.append(Verified(name, 1.0, False))
                continue
            used = self._used(state, weight)
            both = is_24(used, dim=0)
            if not is_24(used) or (state.now.transposable and not both):
                raise NumericsError(f"{name}: the weight that the GEMMs use is not 2:4")
            found.append(Verified(name, float(torch.count_nonzero(used)) / used.numel(), both))
            digests[name] = _digest(state)
        self._compare(digests)
        return found

    @torch.no_grad()
    def finalize(self, prune: bool | None = None) -> int:
        """End of sparse training: plain `torch.nn.Linear` again, with zeros where pruned.

        Args:
            prune: whether weights are made what the GEMMs use; None: in a sparse phase. After a
                dense tail the weights are dense, and stay so.

        Returns: how many weights were pruned. With FSDP2 a collective call.
        """
        self._run.finish_step()
        prune = self._run.sparse_now if prune is None else prune
        states = self._states()
        for name, layer in self.layers.items():
            state = states.get(name)
            if prune and state is not None:
                weight = layer.weight.detach()
                used = self._used(state, whole_of(weight))
                local_of(weight).copy_(part_of(used, weight, name))
        for layer in self.layers.values():
            layer.become_dense()
        for hook in self._hooks:
            hook.remove()
        self.layers = {}
        return len(states) if prune else 0

    def _used(self, state: SparseWeight, weight: torch.Tensor) -> torch.Tensor:
        """W~ `(N, K)` of the step that is next or under way."""
        return state.effective_at(weight, self._run.clock.step)

    def _states(self) -> dict[str, SparseWeight]:
        pairs = ((name, layer.state) for name, layer in self.layers.items())
        return {name: state for name, state in pairs if state is not None}

    def _compare(self, digests: dict[str, str]) -> None:
        rank, world = self._run.place()
        if world == 1:
            return
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, digests, group=self._run.group)
        for name in digests:
            other = next((r for r in range(world) if everyone[r].get(name) != digests[name]), None)
            if other is not None:
                raise ReplicaError(f"{name}: mask or scale of rank {other} is not rank {rank}'s")

    def __repr__(self) -> str:
        sparse = len(self._states())
        fp8 = "" if self._run.scaling is None else f", fp8 in {len(self.layers)} linears"
        return f"SparsityHandle({self._run.recipe.name}, {sparse} sparse linears{fp8})"


def _locate(name: str, layer: SparseLinear, held: Mapping[int, torch.Tensor]) -> Target | None:
    """The weight itself, or this rank's part of it."""
    weight = layer.weight
    if id(weight) not in held:
        return None
    return Target(weight, lambda mask: part_of(mask, weight.detach(), name))


def _owner(layer: SparseLinear) -> Any:
    return layer.dense if layer.state is None else layer.state


def _digest(state: SparseWeight) -> str:
    known = state.export_state()
    parts = [known[key].cpu().contiguous().view(-1).view(torch.uint8) for key in known]
    whole = hashlib.sha256()
    for key, part in zip(known, parts):
        if key in ("mask", "scale"):
            whole.update(part.numpy().tobytes())
    return whole.hexdigest()


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or (
        "none"
    )
