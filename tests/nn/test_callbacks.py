"""transformers' Trainer and Lightning train 2:4 by a callback, and resume."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.errors import CheckpointError, ConfigError
from megasparse.kernels import is_24
from megasparse.nn import SparseLinear
from megasparse.nn.callbacks import (
    FILE,
    lightning_callback,
    torchtitan_converter,
    trainer_callback,
)

SETTINGS = {"recipe": "fst", "layers": ["*.mlp.*"], "masked_decay": 1e-2, "seed": 5}
LLAMA = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def _trainer(transformers, folder, steps, callback):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    rows = torch.arange(12 * 8).view(12, 8) * 5 % 32
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    callback = trainer_callback(train_iters=8, dense_tail_fraction=0.0, **SETTINGS)
    whole = _trainer(transformers, tmp_path / "run", 4, callback)
    whole.train()
    assert any("sparsity/flip_rate" in entry for entry in whole.state.log_history)
    linears = [m for n, m in whole.model.named_modules() if ".mlp." in n and hasattr(m, "weight")]
    linears = [m for m in linears if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 3 and not any(isinstance(m, SparseLinear) for m in linears)
    assert all(is_24(m.weight) and is_24(m.weight, dim=0) for m in linears)

    again = trainer_callback(train_iters=8, dense_tail_fraction=0.0, **SETTINGS)
    resumed = _trainer(transformers, tmp_path / "run", 4, again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    (tmp_path / "run" / "checkpoint-2" / FILE).unlink()
    lost = _trainer(transformers, tmp_path / "run", 4, trainer_callback(**SETTINGS))
    with pytest.raises(CheckpointError, match="expected the sparsity state beside"):
        lost.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from tests.nn.models import Model, loss_of, micro_batch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Model()

        def training_step(self, batch, number):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, foreach=False)

    def fit(steps, checkpoint=None):
        module = Module()
        callback = lightning_callback(train_iters=8, dense_tail_fraction=0.0, **SETTINGS)
        saver = lightning.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1
        )
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, saver],
            gradient_clip_val=1.0,
        )
        data = torch.utils.data.DataLoader([micro_batch(n, 0) for n in range(2)], batch_size=None)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module

    whole = fit(4)
    from megasparse.nn import sparsify_

    by_hand, holder = Model(), torch.nn.Module()
    holder.net = by_hand  # the names, of which draws are a function
    handle = sparsify_(holder, train_iters=8, dense_tail_fraction=0.0, **SETTINGS)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, foreach=False)
    for number in range(4):
        loss_of(by_hand, micro_batch(number % 2, 0)).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    handle.finalize()
    for a, b in zip(whole.net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    resumed = fit(4, str(next(tmp_path.glob("*step=2*"))))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_converter_of_torchtitan():
    """As torchtitan 0.2 calls it: made of the job, given the model on the meta device."""
    job = SimpleNamespace(training=SimpleNamespace(steps=10))
    converter = torchtitan_converter(**{**SETTINGS, "layers": ["0"]}, dense_tail_fraction=0.5)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    made = converter(job, SimpleNamespace(tp=1, pp=1))
    made.convert(model)
    model.to_empty(device="cpu")
    torch.nn.init.normal_(model[0].weight)
    optimizer, phases = torch.optim.AdamW(model.parameters()), []
    for _ in range(10):
        phases.append(converter.handle.sparse_now)
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        made.post_optimizer_hook([model])
        optimizer.zero_grad()
    assert phases == [True] * 5 + [False] * 5
    assert converter.handle.finalize(prune=True) == 1 and is_24(model[0].weight)
    with pytest.raises(ConfigError, match="parallelism.tp is 2, expected 1"):
        converter(job, SimpleNamespace(tp=2, pp=1))
