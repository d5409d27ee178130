"""One-shot pruning and quantization as tools: from a run's checkpoint to files that work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasparse.inference import quantized_model
from megasparse.inference.offline import OfflineModel, StoredRun
from megasparse.kernels import is_24
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.distillation.runs import AST, DENSE
from tests.runs import LLAMA, make_dataset, train
from tools import prune_oneshot, quantize

GATED = [*LLAMA, "--num-query-groups", "4", "--ffn-hidden-size", "64"]
CALIBRATION = ["--calibration-samples", "8", "--eval-iters", "4"]


COMMANDS = {"prune_oneshot": prune_oneshot, "quantize": quantize}


def _call(rank, world, name, arguments):
    tool = COMMANDS[name]
    return tool.run(tool.parse(arguments))


def _tool_run(name, *arguments):
    return dist.run(_call, 1, name, [str(argument) for argument in arguments])[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def dense(tmp_path_factory, dataset):
    """Dense models: GELU with biases, and gated with a K/V head a query head."""
    folders = {}
    for style, flags in (("gpt", []), ("llama", GATED)):
        folder = tmp_path_factory.mktemp(style)
        dist.run(train, 1, [*DENSE, *flags, "--data-path", dataset, "--run-dir", str(folder)])
        folders[style] = folder / "checkpoints"
    return folders


def test_one_shot_methods_prune_and_their_checkpoints_start_runs(tmp_path, dataset, dense):
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        folder = tmp_path / method
        arguments = ["--load", dense["llama"], "--output", folder, "--method", method]
        report = _tool_run("prune_oneshot", *arguments, *CALIBRATION)
        assert report["pruned"] == 8
        losses[method] = report["loss_after"]
        assert report["loss_after"] > report["loss_before"]
    # So small a model loses little; which method is better is tested on matrices.
    assert len(set(losses.values())) == 3
    reader = newest_valid(tmp_path / "sparsegpt")
    name = "param/decoder.layers.0.mlp.linear_fc1.weight"
    assert is_24(reader.read(name)) and not is_24(newest_valid(dense["llama"]).read(name))
    # The saved model is the measured one: a run that starts from it has its loss.
    flags = [
        *AST,
        *GATED,
        "--load",
        str(tmp_path / "sparsegpt"),
        "--train-iters",
        "1",
        "--lr",
        "1e-12",
        "--eval-iters",
        "4",
        "--micro-batch-size",
        "4",
        "--global-batch-size",
        "4",
        "--data-path",
        dataset,
        "--run-dir",
        str(tmp_path / "next"),
    ]
    rows = dist.run(train, 1, flags)[0]
    assert rows[-1]["valid_loss"] == pytest.approx(losses["sparsegpt"], rel=1e-4)


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_quantized_ast_with_slorb(tmp_path, dataset, dense, style):
    flags = [
        *AST,
        *(GATED if style == "llama" else []),
        "--slorb-k",
        "8",
        "--data-path",
        dataset,
        "--load",
        str(dense[style]),
        "--run-dir",
        str(tmp_path / "ast"),
    ]
    dist.run(train, 1, flags)
    losses = {}
    source = tmp_path / "ast" / "checkpoints"
    for kind, extra in (("int4", ["--group-size", 32]), ("fp8", []), ("int4", ["--no-awq"])):
        out = tmp_path / f"{kind}{len(losses)}"
        group = [] if "--group-size" in extra else ["--group-size", 32]
        report = _tool_run(
            "quantize",
            "--load",
            source,
            "--output",
            out,
            "--format",
            kind,
            *extra,
            *group,
            *CALIBRATION,
        )
        losses[(kind, *extra)] = report["loss_after"]
        assert report["loss_after"] == pytest.approx(report["loss_before"], abs=0.05)
        assert report["loss_after"] != report["loss_before"]
        found = report["sizes"]
        linears = found["linears FP32"] // 4
        assert found["values"] == linears * (0.25 if kind == "int4" else 0.5)
        assert found["places"] == linears / 8
        stored = (out / "model.safetensors").stat().st_size
        assert found["total"] <= stored <= found["total"] + 20_000  # the header
        if "--no-awq" not in extra and kind == "int4":
            folded = 4 if style == "llama" else 3  # a GELU lets no scale of fc2 through
            assert len(report["alphas"]) == 2 * folded
            assert any(alpha > 0 for alpha in report["alphas"].values())


def test_folding_leaves_the_function_as_it_is(tmp_path, dense):
    """Scales are folded and nothing is rounded: the weights change, the logits do not."""
    differences = dist.run(_folded, 1, {k: str(v) for k, v in dense.items()})[0]
    for style, (difference, moved) in differences.items():
        assert moved > 0.1, style
        assert difference < 1e-4, (style, difference)


def _folded(rank, world, folders):
    """Largest change of the logits when all scales are folded and nothing is rounded."""

    class Exact:
        def __init__(self, weight):
            self.weight = weight

        def pack(self):
            return {"values": self.weight}

        def dequantize(self):
            return self.weight

    def scales(weight, gram, mean_abs, group_size):
        found = mean_abs.clamp(min=1e-4).sqrt()
        return found / found.mean(), 0.5

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_model, "quantize", lambda weight, *_: Exact(weight))
        patch.setattr(quantized_model, "awq_scales", scales)
        for style, folder in folders.items():
            results[style] = _change_by_folding(Path(folder))
    return results


def _change_by_folding(folder):
    """Largest changes of the logits and of a weight."""
    stored = StoredRun(folder)
    model = OfflineModel(stored, None, 4)
    model.put(stored.folded())
    batch = next(model.micro_batches("valid", 1))
    with torch.no_grad():
        before = model.model(batch["tokens"], batch["position_ids"], None).clone()
        quantizer = quantized_model.ModelQuantizer(stored, "int4", 128, awq=True)
        model.calibrate(1, quantizer.layer)
        after = model.model(batch["tokens"], batch["position_ids"], None)
    changes = [
        float((p.cpu() - stored.weights[name]).abs().max())
        for name, p in model.model.named_parameters()
    ]
    return float((after - before).abs().max()), max(changes)


@pytest.mark.parametrize("tool", ["prune_oneshot", "quantize"])
def test_refusals(tmp_path, tool, capsys):
    assert COMMANDS[tool].main(["--load", str(tmp_path), "--output", str(tmp_path / "new")]) == 66
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
