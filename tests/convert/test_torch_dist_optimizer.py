"""Adam's state in torch_dist checkpoints that megatron-core's own optimizers wrote, taken over."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import pickle
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megasparse.checkpoint.model import StoredModel
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config.shapes import VOCABULARY, parameters
from megasparse.convert.megatron.names import renamed
from megasparse.convert.megatron.torch_dist import TorchDistModel
from megasparse.convert.megatron.torch_dist_files import read_metadata
from megasparse.errors import CheckpointError, ConfigError
from megasparse.optim.adamw import MaskedAdamW
from megasparse.sparsity.shard import WeightShard
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.convert.models import VOCAB
from tests.convert.test_megatron import GPT, LLAMA, PADDED, SIZES, build
from tests.runs import TINY, train
from tools import convert_checkpoint

# No padding within Megatron's buffers, behind which it loses values.
WIDE = {**SIZES, "hidden_size": 64, "ffn_hidden_size": 64}
STEPS, LR, EPS, BETAS = 3, 1e-2, 1e-8, (0.9, 0.95)
KINDS = ("param", "exp_avg", "exp_avg_sq")
ADAM = {
    "optimizer": "adam", "lr": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS,
    "weight_decay": 0.0, "clip_grad": 0.0,
}  # fmt: skip
# Model, pipeline stages, data-parallel ranks, BF16, the form of a distributed optimizer's state.
WRITTEN: dict[str, tuple[dict, int, int, bool, str | None]] = {
    "distributed, TP 2": (LLAMA, 1, 1, True, "fully_reshardable"),
    "distributed, DP 2": (GPT, 1, 2, True, "fully_reshardable"),
    "tied, 2 stages": (GPT, 2, 1, True, None),
    "float32, TP 2": (LLAMA, 1, 1, False, None),
}
REFUSED = {
    "dp_reshardable": (LLAMA, 1, 1, True, "dp_reshardable"),
    "dp_zero_gather_scatter": (LLAMA, 1, 1, True, "dp_zero_gather_scatter"),
}


def _gradient(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def _write(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Models trained for some steps by made-up gradients and saved. Of this rank's parameters:
    master and moments when they were saved, and the master after one more step."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.megatron.on_cpu import OnCpu

    # Its writer wants a GPU, a manager process and children; here are none, and the rank is a
    # daemon.
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment, method-assign]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._get_write_results_queue = queue.Queue
    found: dict[str, Any] = {}
    for case, (sizes, stages, replicas, bf16, form) in (WRITTEN | REFUSED).items():
        arguments = {**WIDE, **sizes}
        model = build(rank, world, arguments, stages, replicas)
        if bf16:
            model.config.bf16, model.config.params_dtype = True, torch.bfloat16
            model.bfloat16()
        settings = {"use_distributed_optimizer": form is not None}
        with OnCpu():
            ddp = DistributedDataParallel(
                model.config, DistributedDataParallelConfig(**settings), model
            )
            config = OptimizerConfig(**ADAM, bf16=bf16, **settings)
            chained = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
            (optimizer,) = chained.chained_optimizers

            for number in range(STEPS):
                _step(model, chained, number)
            state = model.sharded_state_dict()
            metadata = {} if form is None else {"distrib_optim_sharding_type": form}
            path = Path(folder) / case / f"iter_{STEPS:07d}"
            path.mkdir(parents=True, exist_ok=True)
            content = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0}
            adam = chained.sharded_state_dict(state, metadata=metadata)
            dist_checkpointing.save({**content, "model": state, "optimizer": adam}, str(path))
            if case in WRITTEN and replicas == 1:
                saved = _state(model, optimizer)
                _step(model, chained, STEPS)
                found[case] = saved, _state(model, optimizer)
            elif case in WRITTEN:  # each rank has a half of the flat buffer
                found[case] = {
                    (one.key, one.global_offset[: one.prepend_axis_num]): one.data.clone()
                    for tensors in adam["param_state"].values()
                    for one in tensors.values()
                }
    return found


def _step(model: torch.nn.Module, optimizer: Any, number: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(_gradient(name, number, parameter.shape))
    optimizer.step()


def _state(model: torch.nn.Module, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Master and moments of this rank's parameters, from Megatron's optimizer itself."""
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(optimizer, "model_param_group_index_map"):
            state = optimizer._get_main_param_and_optimizer_states(parameter)
        else:
            main = getattr(parameter, "main_param", parameter)
            state = {"param": main, **optimizer.optimizer.state[main]}
        found[name] = {k: state[k].detach().clone().view(parameter.shape) for k in KINDS}
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("optimizer")
    return folder, dist.run(_write, 2, str(folder))


def _source(written, case: str) -> TorchDistModel:
    return TorchDistModel(written[0] / case / f"iter_{STEPS:07d}", optimizer_state=True)


def _read(source: TorchDistModel, name: str, kind: str) -> torch.Tensor:
    """A master or moment with rows for the padded vocabulary, NaN in them."""
    assert source.optimizer is not None
    value = source.read(name) if kind == "param" else source.optimizer.read(name, kind)
    assert value.dtype == torch.float32
    if name not in VOCABULARY:
        return value
    padding = torch.full((PADDED - value.shape[0], value.shape[1]), float("nan"))
    return torch.cat([value, padding])


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(torch.where(found.isnan(), wanted, found), wanted)


@pytest.mark.parametrize("case", ["distributed, TP 2", "float32, TP 2", "tied, 2 stages"])
def test_masters_moments_and_steps_are_those_of_megatrons_optimizer(written, case):
    source = _source(written, case)
    assert source.optimizer is not None and source.optimizer.steps == STEPS
    stages = WRITTEN[case][1]
    shapes = {one.name: one for one in parameters(source.model, PADDED)}
    seen = set()
    for rank, (saved, _) in enumerate(r[case] for r in written[1]):
        for name, state in saved.items():
            ours = renamed(name)
            if stages == 2 and rank == 1:  # the second stage counts from 0, its embedding is a copy
                ours = ours.replace("layers.0.", "layers.1.")
                if "embedding" in ours or ours == "output_layer.weight":
                    continue
            one = shapes[ours]
            shard = WeightShard(one.shape)
            if stages == 1:
                shard = WeightShard(one.shape, one.shard_dim, rank, 2, one.parts)
            for kind in KINDS:
                whole = _read(source, ours, kind)
                assert _equal(shard.slice_of(whole), state[kind]), (ours, kind)
            seen.add(ours)
    assert seen == shapes.keys()


def test_masters_and_moments_of_two_data_parallel_ranks(written):
    source = _source(written, "distributed, DP 2")
    checked = 0
    for (key, layer), value in written[1][0]["distributed, DP 2"].items():
        _, _, kind, name = key.split(".", 3)
        if layer:
            name = name.replace("layers.", f"layers.{layer[0]}.")
        whole = _read(source, renamed(name), kind)
        assert value.dtype == torch.float32 and value.abs().max() > 0
        assert _equal(whole, value.reshape(whole.shape)), name
        checked += 1
    assert checked == 3 * len(source.entries())


def test_the_next_step_gives_megatrons_numbers(written):
    """With the same gradient, so the count of steps is right too."""
    source = _source(written, "float32, TP 2")
    assert source.optimizer is not None
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    rows = source.read(name).shape[0] // 2
    weight = torch.nn.Parameter(source.read(name)[:rows])
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
    optimizer = MaskedAdamW([weight], lambda _: True, **options)
    optimizer.state[weight] = {
        "step": torch.tensor(float(source.optimizer.steps)),
        **{k: source.optimizer.read(name, k)[:rows].contiguous() for k in KINDS[1:]},
    }
    before = weight.detach().clone()
    weight.grad = _gradient(name, STEPS, weight.shape)
    optimizer.step()
    wanted = written[1][0]["float32, TP 2"][1][name]["param"]
    assert (weight - before).abs().max() > LR / 10
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-6)


def _convert(written, case: str, output: Path, *flags: str) -> int:
    arguments = ["--from", "megatron", "--to", "megasparse", "--vocab-size", str(VOCAB)]
    arguments += ["--input", str(written[0] / case / f"iter_{STEPS:07d}"), "--output", str(output)]
    return convert_checkpoint.main([*arguments, "--make-vocab-size-divisible-by", "16", *flags])


GPT_RUN = [
    *TINY, "--ffn-hidden-size", "64", "--kv-channels", "8", "--max-position-embeddings", "64",
    "--vocab-size", str(VOCAB), "--train-iters", "1", "--adam-beta1", "0.9", "--adam-beta2", "0.95",
    "--bf16",
]  # fmt: skip


def test_tensor_parallel_ranks_read_their_parts_of_moments(written, tmp_path):
    """Of a vocabulary that is padded to another size too."""
    assert _convert(written, "distributed, TP 2", tmp_path / "start", "--optimizer-state") == 0
    (folder,) = tmp_path.glob("start/step-*")
    stored, source = StoredModel(CheckpointReader(folder)), _source(written, "distributed, TP 2")
    assert stored.optimizer_steps == STEPS and source.optimizer is not None
    for one in parameters(stored.model, VOCAB + 5):
        for kind in KINDS[1:]:
            whole = source.optimizer.read(one.name, kind)
            if one.name in VOCABULARY:
                whole = torch.nn.functional.pad(whole[:VOCAB], (0, 0, 0, 5))
            for rank in range(2):
                shard = WeightShard(one.shape, one.shard_dim, rank, 2, one.parts)
                found = stored.moment_part(one.name, kind, shard)
                assert found is not None and torch.equal(found, shard.slice_of(whole)), one.name
    assert stored.moment_part("decoder.nothing", "exp_avg", WeightShard((4,))) is None


def test_a_run_goes_on_with_the_moments(written, tmp_path, dataset):
    """With them and without them the gradient of the first step is the same: the moments after it
    differ by what decayed moments of before add. The vocabulary is padded to another size."""
    assert _convert(written, "tied, 2 stages", tmp_path / "start", "--optimizer-state") == 0
    after = []
    for more in ([], ["--finetune"]):
        run = str(tmp_path / f"run{len(more)}")
        flags = [*GPT_RUN, "--load", str(tmp_path / "start"), "--run-dir", run, *more]
        flags += ["--zero-stage", "2"]
        flags += ["--data-path", dataset, "--make-vocab-size-divisible-by", "24"]
        dist.run(train, 2, flags)
        after.append(newest_valid(Path(run) / "checkpoints"))
    with_them, without = after
    assert with_them is not None and without is not None
    assert with_them.meta["optimizer_steps"] == STEPS + 1
    assert without.meta["optimizer_steps"] == 1
    source = _source(written, "tied, 2 stages")
    assert source.optimizer is not None
    for entry in source.entries():
        rows = VOCAB if entry.name in VOCABULARY else entry.shape[0]
        for kind, beta in zip(KINDS[1:], BETAS):
            key = f"optim/{entry.name}/{kind}"
            added = with_them.read(key)[:rows] - without.read(key)[:rows]
            wanted = beta * source.optimizer.read(entry.name, kind)[:rows]
            torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused_by_name(written, tmp_path, form):
    message = f"has the form '{form}', expected 'fully_reshardable'; Megatron's --dist-ckpt-optim"
    with pytest.raises(CheckpointError, match=message):
        _source(written, form)
    assert _convert(written, form, tmp_path / "weights alone") == 0


def test_weights_alone_are_converted_without_the_flag(written, tmp_path):
    assert _convert(written, "distributed, TP 2", tmp_path / "a") == 0
    (folder,) = tmp_path.glob("a/step-*")
    reader = CheckpointReader(folder)
    assert reader.meta["optimizer_steps"] == 0 and not reader.keys("optim/")
    assert reader.dtype("param/decoder.final_layernorm.weight") == torch.bfloat16


def _common(folder: Path) -> dict[str, Any]:
    """What Megatron has written of no rank: in a file, or as an object among the tensors."""
    if (folder / "common.pt").is_file():
        return torch.load(folder / "common.pt", weights_only=False)
    data = read_metadata(folder).objects["common_state/shard_0_1"].data("common_state")
    return torch.load(io.BytesIO(data), weights_only=False)[0]


def test_what_was_in_common_may_be_an_object_among_the_tensors(written, tmp_path):
    """So megatron-core 0.19 writes it."""
    folder = tmp_path / "iter"
    shutil.copytree(written[0] / "distributed, TP 2" / f"iter_{STEPS:07d}", folder)
    common = _common(folder)
    (folder / "common.pt").unlink(missing_ok=True)
    torch.save([common], folder / "__9_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    size = (folder / "__9_0.distcp").stat().st_size
    index = MetadataIndex("common_state/shard_0_1")
    metadata.storage_data[index] = _StorageInfo("__9_0.distcp", 0, size)
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    source = TorchDistModel(folder, optimizer_state=True)
    assert source.model == _source(written, "distributed, TP 2").model
    assert source.optimizer is not None and source.optimizer.steps == STEPS
    torch.save([7], folder / "__9_0.distcp")
    with pytest.raises(
        CheckpointError, match="common_state/shard_0_1: found list, expected a dict"
    ):
        TorchDistModel(folder)
    torch.save([Hostile(tmp_path / "made")], folder / "__9_0.distcp")
    with pytest.raises(CheckpointError, match="common_state/shard_0_1: names .*mkdir, expected"):
        TorchDistModel(folder)
    assert not (tmp_path / "made").exists()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("optimizer"), "holds no state of an optimizer"),
        (lambda c: c.update(optimizer={0: {}, 1: {}}), "states of 2 optimizers"),
        (lambda c: c["optimizer"].pop("optimizer"), "no param_groups"),
        (lambda c: c["optimizer"]["optimizer"]["param_groups"][0].update(step=7.0), "3.0, 7.0"),
        (
            lambda c: [g.pop("step") for g in c["optimizer"]["optimizer"]["param_groups"]],
            "no steps",
        ),
    ],
)
def test_what_common_says_is_checked(written, tmp_path, change, message):
    folder = tmp_path / "iter"
    shutil.copytree(written[0] / "distributed, TP 2" / f"iter_{STEPS:07d}", folder)
    common = _common(folder)
    change(common)
    torch.save(common, folder / "common.pt")
    with pytest.raises(CheckpointError, match=message):
        TorchDistModel(folder, optimizer_state=True)
    TorchDistModel(folder)


def test_a_damaged_moment_is_named(written, tmp_path):
    source = _source(written, "distributed, TP 2")
    assert source.optimizer is not None
    del source.optimizer._stored["optimizer.state.exp_avg.decoder.final_layernorm.weight"]
    weight = source._tensors["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match="holds no optimizer.state.exp_avg_sq.optimizer"):
        source.optimizer._beside(weight, "exp_avg_sq")


def test_the_flag_is_of_torch_dist_alone(tmp_path, capsys):
    common = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--optimizer-state"]
    with pytest.raises(SystemExit):
        convert_checkpoint.main(["--from", "huggingface", "--to", "megasparse", *common])
    flags = ["--from", "megatron", "--to", "megasparse", *common]
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*flags, "--dtype", "bfloat16"])
    assert "float32 masters, --dtype is bfloat16" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="torch_dist checkpoints alone"):
        convert_checkpoint.open_source(convert_checkpoint.parse_args(flags))
