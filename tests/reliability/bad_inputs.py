"""Wrong configurations and damaged inputs, each with the exit code and words that it must give."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megasparse.data.tokenizers.tokenizer import train_sentencepiece
from tests.checkpoint.saves import write_checkpoint
from tests.runs import TINY, make_dataset

CONFIG, DATA, CHECKPOINT, STORAGE = 64, 65, 66, 74


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: for reports.
        flags: after the defaults of a good run.
        code, words: exit code, and what the one line must contain.
        world: number of ranks.
        environment: variables on top.
    """

    name: str
    flags: tuple[str, ...]
    code: int
    words: str
    world: int = 2
    environment: tuple[tuple[str, str], ...] = ()


def good_flags(root: Path) -> list[str]:
    """The run that every case spoils; it passes all checks."""
    return [*TINY, "--data-path", str(root / "data"), "--run-dir", str(root / "run")]


def build(root: Path) -> list[Case]:
    """All cases, with the files that they need below `root`."""
    make_dataset(root / "data")
    return [
        *_sizes(),
        *_values(),
        *_flags(),
        *_yaml(root),
        *_blends(root),
        *_index_files(root),
        *_tokenizers(root),
        *_folders(root),
        *_environment(),
    ]


def _config(name: str, words: str, *flags: str, world: int = 2) -> Case:
    return Case(name, flags, CONFIG, words, world)


def _sizes() -> list[Case]:
    tp2 = ("--tensor-model-parallel-size", "2")
    return [
        _config("world", "world size 2 is not divisible by", "--tensor-model-parallel-size", "3"),
        _config("heads", "num_attention_heads 5", "--num-attention-heads", "5"),
        _config(
            "heads-tp", "num_query_groups 1 is not divisible by", "--num-query-groups", "1", *tp2
        ),
        _config("groups", "num_query_groups 3", "--num-query-groups", "3"),
        _config("hidden", "hidden_size 66", "--hidden-size", "66", "--kv-channels", "16"),
        _config("ffn", "ffn_hidden_size 90", "--ffn-hidden-size", "90"),
        _config("ffn-tp", "ffn_hidden_size 100", "--ffn-hidden-size", "100", *tp2),
        _config("kv", "kv_channels 6", "--kv-channels", "6"),
        _config("batch", "global_batch_size 6", "--global-batch-size", "6"),
        _config("positions", "seq_length 32 is longer than", "--max-position-embeddings", "16"),
        _config(
            "sp-length",
            "seq_length 31 is not divisible",
            "--sequence-parallel",
            "--seq-length",
            "31",
            *tp2,
        ),
        _config("gqa", "group_query_attention needs", "--group-query-attention"),
        _config(
            "zero-3",
            "zero_stage 3 with pipeline_model_parallel_size 2",
            "--zero-stage",
            "3",
            "--pipeline-model-parallel-size",
            "2",
        ),
    ]


def _values() -> list[Case]:
    wrong = {
        "num-layers": ("0", "-1", "two", "1.5"),
        "hidden-size": ("0", "1e99"),
        "seq-length": ("1", ""),
        "micro-batch-size": ("0", "-4"),
        "train-iters": ("0", "nan"),
        "lr": ("0", "-1", "nan", "inf", "fast"),
        "hidden-dropout": ("1.0", "-0.1"),
        "adam-beta2": ("1", "2"),
        "seed": ("-1",),
        "num-workers": ("-1",),
        "hang-timeout": ("-1",),
        "exit-interval": ("0",),
        "exit-duration-in-mins": ("0",),
        "max-restarts": ("-1",),
        "keep-last": ("-1", "all"),
        "save-interval": ("0",),
        "masked-decay": ("-1",),
    }
    cases = [
        _config(f"{name}={value}", f"--{name}: found ", f"--{name}={value}")
        for name, values in wrong.items()
        for value in values
    ]
    return [
        *cases,
        _config("warmup", "lr_warmup_iters 30 is more than", "--lr-warmup-iters", "30"),
        _config("warmups", "expected one", "--lr-warmup-iters", "3", "--lr-warmup-fraction", "0.1"),
        _config("min-lr", "min_lr 1.0 is above lr", "--min-lr", "1"),
        _config(
            "dense",
            "expected at most 1",
            "--dense-warmup-fraction",
            "0.7",
            "--dense-tail-fraction",
            "0.7",
        ),
        _config("recipe", "found 'magic', expected one of dense", "--sparsity-recipe", "magic"),
        _config("norm", "found 'BatchNorm'", "--normalization", "BatchNorm"),
        _config("positions-kind", "found 'alibi'", "--position-embedding-type", "alibi"),
    ]


def _flags() -> list[Case]:
    return [
        _config(
            "unknown-flag",
            "unknown flag --hiden-size, did you mean --hidden-size?",
            "--hiden-size",
            "64",
        ),
        _config("unknown-word", "unexpected argument 'surplus'", "--lr=1e-3", "surplus"),
        _config("no-value", "--lr: found no value, expected a number", "--lr"),
        _config("two-sources", "exactly one of data_path", "--mock-data"),
        _config(
            "decay-dense", "masked_decay", "--sparsity-recipe", "dense", "--masked-decay", "1e-3"
        ),
    ]


def _yaml(root: Path) -> list[Case]:
    contents = {
        "missing": (None, "cannot be read"),
        "binary": (b"\xff\xfe\x00", "cannot be read"),
        "broken": (b"model: [1, 2", "not valid YAML"),
        "scalar": (b"hello", "found str, expected groups"),
        "group": (b"modell:\n  num_layers: 2\n", "did you mean model"),
        "key": (b"model:\n  num_layer: 2\n", "did you mean num_layers?"),
        "place": (b"model:\n  lr: 1.0e-3\n", "did you mean train.lr"),
        "twice": (b"model:\n  num_layers: 2\n  num_layers: 3\n", "given twice (line 3)"),
        "type": (b"model:\n  num_layers: [2]\n", "expected a whole number"),
        "bool": (b"train:\n  bf16: 7\n", "expected true or false"),
        "object": (b"model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        "none": (b"train:\n  lr:\n", "found no value"),
        "bare-group": (b"model: 3\n", "expected settings"),
    }
    cases = []
    for name, (content, words) in contents.items():
        path = root / f"{name}.yaml"
        if content is not None:
            path.write_bytes(content)
        cases.append(_config(f"yaml-{name}", words, "--config", str(path)))
    return cases


def _data(name: str, words: str, *flags: str, code: int = DATA) -> Case:
    return Case(name, flags, code, words)


def _blends(root: Path) -> list[Case]:
    data = str(root / "data")
    return [
        _data("no-data", f"{root}/none.bin: cannot read", "--data-path", str(root / "none")),
        _data("suffix", "expected it without .bin", "--data-path", f"{data}.bin", code=CONFIG),
        _data("weights", "pairs of a weight", "--data-path", "0.5", data, "0.5", code=CONFIG),
        _data("weight", "expected a number above 0", "--data-path", "-1", data, code=CONFIG),
        _data("nan-weight", "expected a number above 0", "--data-path", "nan", data, code=CONFIG),
        _data("double", "twice", "--data-path", data, data, code=CONFIG),
        _data("split", "expected up to three numbers", "--split", "a,b", code=CONFIG),
        _data("split-train", "expected a train part", "--split", "0,1,0", code=CONFIG),
        _data(
            "no-valid", "validation data holds no sample", "--split", "1,0,0", "--eval-iters", "1"
        ),
        _data("small", "expected at least one global batch", "--seq-length", "4000"),
        _data("vocab", "expected 0 to 63", "--vocab-size", "64"),
    ]


def _index_files(root: Path) -> list[Case]:
    """Copies of the dataset, one damage each."""
    idx = (root / "data.idx").read_bytes()
    sequences = struct.unpack_from("<Q", idx, 18)[0]
    lengths, pointers = 34, 34 + 4 * sequences
    documents = pointers + 8 * sequences

    def put(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
        size = struct.calcsize(form)
        return lambda b: b[:offset] + struct.pack(form, value) + b[offset + size :]

    damages: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
        "idx-missing": ("idx", None, "cannot read"),
        "bin-missing": ("bin", None, "cannot read"),
        "idx-empty": ("idx", lambda b: b"", "found 0 bytes"),
        "bin-empty": ("bin", lambda b: b"", "found an empty file"),
        "idx-head": ("idx", lambda b: b[:20], "found 20 bytes"),
        "idx-middle": ("idx", lambda b: b[: len(b) // 2], "expected"),
        "idx-tail": ("idx", lambda b: b[:-1], "expected"),
        "idx-longer": ("idx", lambda b: b + b"x", "expected"),
        "magic": ("idx", lambda b: b"X" + b[1:], "found magic"),
        "version": ("idx", put(9, "<Q", 2), "found version 2"),
        "big-endian": ("idx", put(9, ">Q", 1), "expected 1 (little-endian)"),
        "dtype-float": ("idx", put(17, "B", 7), "floating-point"),
        "dtype-unknown": ("idx", put(17, "B", 77), "dtype code 77"),
        "count-huge": ("idx", put(18, "<Q", 1 << 40), "expected"),
        "length-negative": ("idx", put(lengths, "<i", -1), "found length -1"),
        "pointer-odd": ("idx", put(pointers + 8, "<q", 3), "byte offset 3"),
        "pointer-negative": ("idx", put(pointers + 8, "<q", -2), "byte offset -2"),
        "documents-start": ("idx", put(documents, "<q", 1), "document boundaries"),
        "documents-order": ("idx", put(documents + 16, "<q", 1 << 30), "boundaries"),
        "bin-short": ("bin", lambda b: b[:-2], "expected"),
        "bin-odd": ("bin", lambda b: b[:-1], "multiple of 2"),
        "bin-long": ("bin", lambda b: b + b"xx", "expected"),
        "token": ("bin", lambda b: b"\xff\xff" + b[2:], "found id 65535"),
    }
    cases = []
    for name, (suffix, change, words) in damages.items():
        prefix = root / f"damaged-{name}"
        for part in ("idx", "bin"):
            shutil.copy(root / f"data.{part}", f"{prefix}.{part}")
        path = Path(f"{prefix}.{suffix}")
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        cases.append(_data(name, words, "--data-path", str(prefix)))
    sidecar = root / "sidecar"
    for part in ("idx", "bin"):
        shutil.copy(root / f"data.{part}", f"{sidecar}.{part}")
    Path(f"{sidecar}.json").write_text(json.dumps({"format_version": 9}))
    cases.append(_data("sidecar", "format_version: found 9", "--data-path", str(sidecar)))
    (root / "folder.bin").mkdir()
    cases.append(_data("folder", "folder.bin", "--data-path", str(root / "folder")))
    return cases


def _tokenizers(root: Path) -> list[Case]:
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(400)]
    model = train_sentencepiece(texts, 300)
    contents = {
        "tok-missing": (None, "cannot read"),
        "tok-empty": (b"", "empty file"),
        "tok-random": (bytes(range(256)) * 8, "no valid"),
        "tok-truncated": (model[: len(model) // 2], "no valid"),
    }
    cases = []
    for name, (content, words) in contents.items():
        path = root / f"{name}.model"
        if content is not None:
            path.write_bytes(content)
        cases.append(_data(name, words, "--tokenizer-model", str(path), "--vocab-size", "none"))
    (root / "good.model").write_bytes(model)
    cases.append(
        _data(
            "tok-vocab",
            "is smaller than the tokenizer's",
            "--tokenizer-model",
            str(root / "good.model"),
            code=CONFIG,
        )
    )
    (root / "bad.json").write_text('{"version": "1.0"}')
    cases.append(
        _data(
            "tok-json",
            "no valid",
            "--tokenizer-model",
            str(root / "bad.json"),
            "--vocab-size",
            "none",
        )
    )
    return cases


def _folders(root: Path) -> list[Case]:
    (root / "file").write_text("")
    (root / "loop").symlink_to(root / "loop")
    (root / "empty").mkdir()
    write_checkpoint(root / "taken" / "checkpoints", 1)
    return [
        Case("load-missing", ("--load", str(root / "nowhere")), CHECKPOINT, "is no folder"),
        Case("load-empty", ("--load", str(root / "empty")), CHECKPOINT, "holds no checkpoint"),
        Case("run-dir-is-file", ("--run-dir", str(root / "file")), STORAGE, "cannot be written"),
        Case("run-dir-below-file", ("--run-dir", str(root / "file" / "x")), STORAGE, "cannot be"),
        Case("run-dir-loop", ("--run-dir", str(root / "loop")), STORAGE, "cannot be written"),
        Case("run-dir-proc", ("--run-dir", "/proc/run"), STORAGE, "cannot be written"),
        Case("taken", ("--run-dir", str(root / "taken")), CONFIG, "already holds checkpoints"),
        Case(
            "load-is-save",
            ("--save", str(root / "empty"), "--load", str(root / "empty"))
            + ("--exit-on-missing-checkpoint",),
            CHECKPOINT,
            "holds no checkpoint",
        ),
    ]


def _environment() -> list[Case]:
    variable = "MEGASPARSE_FAULT"
    return [
        Case(
            f"fault-{text}",
            (),
            CONFIG,
            "expected kind@rank:step:point",
            environment=((variable, text),),
        )
        for text in ("nonsense", "kill@x:1:forward", "kill@0:1:nowhere")
    ]


def environment_of(case: Case, rank: int) -> dict[str, str]:
    """Variables of a rank's process."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
        "DS_ACCELERATOR": "cpu",
        **dict(case.environment),
    }
