"""Adam's state in a `torch_dist` checkpoint: float32 masters, moments, and the number of steps.

    optimizer.state.exp_avg.NAME       NAME and pieces as of the weight, whatever the layout
    optimizer.state.exp_avg_sq.NAME
    optimizer.state.param.NAME         masters of Megatron's distributed optimizer
    optimizer.state.fp32_param.NAME    those of its other one; of a float32 model there are none
    common.pt                          "optimizer": the form, the settings and steps of each group

So write the distributed optimizer with `--dist-ckpt-optim-fully-reshardable` and the optimizer
that is not distributed. All other forms are refused by the name that `common.pt` gives them: they
hold the flat buffers of a layout's ranks (`dp_reshardable`), or pickled objects
(`dp_zero_gather_scatter`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megasparse.config.shapes import VOCABULARY
from megasparse.convert.megatron.torch_dist_files import DistTensor
from megasparse.convert.optimizer_state import MOMENTS
from megasparse.convert.source import require_finite
from megasparse.errors import CheckpointError

READ_FORM = "fully_reshardable"
_FLAG = "Megatron's --dist-ckpt-optim-fully-reshardable writes it"
_MASTERS = ("param", "fp32_param")
_SETTINGS = ("lr", "betas", "eps", "weight_decay")


class TorchDistOptimizer:
    """An `OptimizerState`; see there.

    Args:
        common: content of `common.pt`.
        stored: all tensors of the checkpoint, by the names there.
        weights: tensors of the parameters, by megasparse's names.
        shapes: of the parameters, the vocabulary without padding.
        where: names the checkpoint in messages.

    Attributes:
        steps: that it has made.
        masters: float32 tensors of the parameters, by megasparse's names.
        settings: of each parameter group, for the record; JSON.

    Raises:
        CheckpointError: there is no state, or it is of another optimizer or in another form.
    """

    def __init__(
        self,
        common: dict[str, Any],
        stored: dict[str, DistTensor],
        weights: dict[str, DistTensor],
        shapes: dict[str, tuple[int, ...]],
        where: str,
    ) -> None:
        self._where, self._stored, self._shapes = where, stored, shapes
        inner = _readable(common.get("optimizer"), where)
        groups = _groups(inner, where)
        self.steps = _steps(inner, groups, where)
        self.settings = [
            {"steps": self.steps, **{k: _plain(g[k]) for k in _SETTINGS if k in g}} for g in groups
        ]
        self._moments = {
            (name, kind): self._beside(weight, kind)
            for name, weight in weights.items()
            for kind in MOMENTS
        }
        self.masters = {name: self._master(weight) for name, weight in weights.items()}

    def read(self, name: str, kind: str) -> torch.Tensor:
        value = self._moments[name, kind].read()
        if name in VOCABULARY:
            value = value[: self._shapes[name][0]].contiguous()
        require_finite(value, f"{self._where}: {kind} of {name}")
        return value.float()

    def _beside(self, weight: DistTensor, kind: str) -> DistTensor:
        """A tensor of the state that is cut like a weight.

        Raises:
            CheckpointError: missing, or of another shape.
        """
        found = self._stored.get(f"optimizer.state.{kind}.{weight.name}")
        if found is None:
            raise CheckpointError(
                f"{self._where}: holds no optimizer.state.{kind}.{weight.name}; the state of Adam "
                "is read, of every weight"
            )
        found = dataclasses.replace(found, layer=weight.layer)
        if found.stacked != weight.stacked:
            raise CheckpointError(
                f"{self._where}: {found.name}: found shape {found.stacked}, expected "
                f"{weight.stacked}"
            )
        assert found.dtype  # refuses others
        return found

    def _master(self, weight: DistTensor) -> DistTensor:
        kinds = [k for k in _MASTERS if f"optimizer.state.{k}.{weight.name}" in self._stored]
        master = self._beside(weight, kinds[0]) if kinds else weight
        if master.dtype != torch.float32:
            raise CheckpointError(
                f"{self._where}: {master.name}: found {master.dtype_name}, expected a float32 "
                "master beside it (optimizer.state.param or .fp32_param)"
            )
        return master


def _readable(state: Any, where: str) -> dict[str, Any]:
    """The state of one optimizer, without what Megatron's optimizers lay around it."""
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"{where}: common.pt holds no state of an optimizer (--no-save-optim)"
        )
    if any(isinstance(key, int) for key in state):
        raise CheckpointError(f"{where}: holds the states of {len(state)} optimizers, expected one")
    form = state.get("param_state_sharding_type", READ_FORM)
    if form != READ_FORM:
        raise CheckpointError(
            f"{where}: the optimizer's state has the form {form!r}, expected {READ_FORM!r}; {_FLAG}"
        )
    inner = state.get("optimizer", state)
    return inner if isinstance(inner, dict) else {}


def _groups(inner: dict[str, Any], where: str) -> list[dict[str, Any]]:
    groups = inner.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{where}: common.pt: found no param_groups of an optimizer")
    return groups


def _steps(inner: dict[str, Any], groups: list[dict[str, Any]], where: str) -> int:
    """Steps that all parameters have made."""
    state = inner.get("state")
    found = [group["step"] for group in groups if "step" in group]
    if isinstance(state, dict) and "common_step" in state:
        found.append(state["common_step"])
    numbers = sorted({_plain(step) for step in found if isinstance(_plain(step), (int, float))})
    if len(numbers) != 1 or numbers[0] < 1 or numbers[0] != int(numbers[0]):
        raise CheckpointError(
            f"{where}: common.pt: found {numbers or 'no'} steps of the optimizer, expected one "
            "number, at least 1"
        )
    return int(numbers[0])


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, str)) else None
