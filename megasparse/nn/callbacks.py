"""`sparsify_` for transformers' Trainer, for Lightning and for torchtitan.

Steps need nothing from them: torch's hooks count and decay. A callback makes the model sparse once
the length of the run is known, keeps the sparsity state in their checkpoints, and logs.

Import `megasparse.nn.callbacks` where the trainer is installed; the classes are made from its own
base class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megasparse.errors import CheckpointError, ConfigError
from megasparse.nn.handle import SparsityHandle
from megasparse.nn.sparsify import sparsify_

FILE = "megasparse.pt"  # in a Trainer's checkpoint folder
KEY = "megasparse"  # in a Lightning checkpoint


def trainer_callback(finalize: bool = True, **arguments: Any) -> Any:
    """A `transformers.TrainerCallback` that trains the model 2:4.

    The state lies in each checkpoint folder as `megasparse.pt`, and a resumed run goes on with it.

    Args:
        finalize: after training, make plain linears with zeros where a sparse phase pruned, so
            that `trainer.save_model()` writes a 2:4 model.
        arguments: of `sparsify_`; `train_iters` is the Trainer's `max_steps` unless given.
    """
    from transformers import TrainerCallback

    class SparsityCallback(TrainerCallback):
        """Of one training."""

        handle: SparsityHandle | None = None

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if self.handle is not None and self.handle.layers:
                return
            self.handle = sparsify_(model, **{"train_iters": state.max_steps, **arguments})
            if state.global_step:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
                if not path.exists():
                    raise CheckpointError(
                        f"{path}: not found; the run goes on at step {state.global_step}, expected "
                        "the sparsity state beside its checkpoint"
                    )
                self.handle.load_state_dict(torch.load(path, weights_only=True))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.handle is None or not state.is_world_process_zero:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.handle.state_dict(), folder / FILE)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self.handle is not None and self.handle.layers and logs is not None:
                found = self.handle.metrics()
                logs.update(found)
                if state.log_history:  # a copy of the same
                    state.log_history[-1].update(found)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.handle is not None and finalize:
                self.handle.verify()
                self.handle.finalize()

    return SparsityCallback()


def lightning_callback(finalize: bool = True, **arguments: Any) -> Any:
    """A `lightning.Callback` (or `pytorch_lightning`'s) that trains the module 2:4.

    The state is in Lightning's own checkpoints, and a resumed run goes on with it.

    Args:
        finalize: as for `trainer_callback`.
        arguments: of `sparsify_`; `train_iters` is the trainer's estimate of its steps unless
            given.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback  # type: ignore[assignment]

    class SparsityCallback(Callback):
        """Of one fit."""

        handle: SparsityHandle | None = None
        _kept: Any = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if self.handle is None or not self.handle.layers:
                steps = int(trainer.estimated_stepping_batches)
                self.handle = sparsify_(pl_module, **{"train_iters": steps, **arguments})

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            self._kept = checkpoint.get(KEY)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if self._kept is not None and self.handle is not None:
                self.handle.load_state_dict(self._kept)
                self._kept = None

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            if self.handle is not None and self.handle.layers:
                checkpoint[KEY] = self.handle.state_dict()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.handle is not None and finalize:
                self.handle.verify()
                self.handle.finalize()

    return SparsityCallback()


def torchtitan_converter(**arguments: Any) -> type:
    """A `ModelConverter` of torchtitan 0.1 and 0.2 that trains the model 2:4.

    In the module that `--experimental.custom_import` names, register the class; then give
    `--model.converters megasparse`:

        converter = torchtitan_converter(recipe="fst", layers=["layers.*.feed_forward.*"])
        register_model_converter(converter, "megasparse")

    Its attribute `handle` is the latest model's; keep its `state_dict` beside the checkpoints.

    Args:
        arguments: of `sparsify_`; `train_iters` is `training.steps` unless given.
    """

    class SparsityConverter:
        """Of one model, before it is parallelized."""

        handle: SparsityHandle | None = None

        def __init__(self, job_config: Any, parallel_dims: Any) -> None:
            for name in ("tp", "pp"):
                if (size := getattr(parallel_dims, name)) > 1:
                    raise ConfigError(
                        f"torchtitan's parallelism.{name} is {size}, expected 1: tensor and "
                        "pipeline parallelism are megasparse.megatron's"
                    )
            self._steps = int(job_config.training.steps)

        def convert(self, model: torch.nn.Module) -> None:
            handle = sparsify_(model, **{"train_iters": self._steps, **arguments})
            type(self).handle = handle

        def post_optimizer_hook(self, model: Any) -> None:
            """Nothing: torch's hooks of the optimizers count steps and decay gradients."""

    return SparsityConverter
