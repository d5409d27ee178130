"""Pre-processing: the same bytes for any number of workers, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megasparse.data import inputs as inputs_module
from megasparse.data import preprocess as pre
from megasparse.data.indexed import validate
from megasparse.data.inputs import find_inputs, read_records
from megasparse.data.manifest import PreprocessOptions
from megasparse.data.preprocess import preprocess
from megasparse.data.sidecar import check_sidecar
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import load_tokenizer, token_rules
from megasparse.errors import DataError


def run(tmp_path: Path, model_file: Path, *inputs: Path | bytes, **options) -> list:
    """Preprocess files, or contents that are written to files first."""
    paths = []
    for number, item in enumerate(inputs):
        if isinstance(item, bytes):
            path = tmp_path / f"input{number}.jsonl"
            path.write_bytes(item)
        else:
            path = item
        paths.append(path)
    (tmp_path / "out").mkdir(exist_ok=True)
    prefix = str(tmp_path / "out" / options.pop("name", "d"))
    return preprocess(PreprocessOptions(tuple(paths), prefix, model_file, **options))


def documents(prefix: str) -> list[list[int]]:
    index = validate(prefix)
    tokens = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("append_eod", [True, False])
def test_tokens_decode_to_the_corpus(
    tmp_path: Path, model_file: Path, corpus: Path, texts: list[str], append_eod: bool
) -> None:
    (summary,) = run(tmp_path, model_file, corpus, append_eod=append_eod)
    assert summary.prefix == str(tmp_path / "out" / "d_text_document")
    tokenizer = load_tokenizer(model_file)
    found = documents(summary.prefix)
    assert len(found) == len(texts) == summary.sidecar.num_documents
    for ids, text in zip(found, texts):
        assert (ids[-1] == tokenizer.eod) == append_eod
        assert tokenizer.decode(ids[:-1] if append_eod else ids) == text
    sidecar = check_sidecar(summary.prefix, tokenizer.digest, verify="full")
    assert sidecar == summary.sidecar and sidecar.append_eod == append_eod
    assert (sidecar.source, sidecar.vocab_size) == ("corpus.jsonl", 600)


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, model_file: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pre, "BATCH_BYTES", 8000)
    outputs = []
    for workers in (1, 2, 3):
        run(tmp_path, model_file, corpus, corpus, workers=workers, name=f"w{workers}")
        outputs.append(
            [
                (tmp_path / "out" / f"w{workers}_text_document{suffix}").read_bytes()
                for suffix in (".bin", ".idx", ".json")
            ]
        )
    assert outputs[0] == outputs[1] == outputs[2]


def test_batches_hold_all_lines_in_order_and_few_bytes(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pre, "BATCH_BYTES", 5000)
    batches = list(pre._batches(find_inputs([corpus, corpus]), ["text"]))
    once = list(read_records(find_inputs([corpus])[0], ["text"]))
    assert [line for batch in batches for line in batch.lines] == once + once
    assert sum(batch.num_bytes for batch in batches) == 2 * corpus.stat().st_size
    assert all(sum(len(line) + 1 for _, line in batch.lines[:-1]) < 5000 for batch in batches)


def test_several_keys_make_several_datasets(tmp_path: Path, model_file: Path) -> None:
    content = lines({"a": "one", "b": "x", "c": 5}, {"a": "", "b": "y"}, {"a": "two", "b": "z"})
    first, second = run(tmp_path, model_file, content, json_keys=("a", "b"))
    tokenizer = load_tokenizer(model_file)
    assert [tokenizer.decode(ids[:-1]) for ids in documents(first.prefix)] == ["one", "two"]
    assert [tokenizer.decode(ids[:-1]) for ids in documents(second.prefix)] == ["x", "y", "z"]
    assert (first.num_empty, second.num_empty) == (1, 0)
    assert second.prefix.endswith("d_b_document")


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a\\tb"}\n{"text": "c"}\n',
        b'{"text": "a\\tb"}\r\n{"text": "c"}\r\n',
        b'{"text": "a\\tb"}\n{"text": "c"}',
        b'\xef\xbb\xbf{"text": "a\\tb"}\n\n  \n{"text": "c"}\n\n',
        b'{"text": "a\\tb", "more": [1, {"text": 2}]}\n{"text": ""}\n{"text": "c"}\n',
    ],
    ids=["plain", "CRLF", "no last newline", "BOM and blank lines", "empty text"],
)
def test_forms_of_jsonl(tmp_path: Path, model_file: Path, content: bytes) -> None:
    (summary,) = run(tmp_path, model_file, content)
    tokenizer = load_tokenizer(model_file)
    assert [tokenizer.decode(ids[:-1]) for ids in documents(summary.prefix)] == ["a\tb", "c"]
    assert summary.num_empty == content.count(b'""')


def test_escaped_nul_and_surrogate_pair_are_text(tmp_path: Path, model_file: Path) -> None:
    (summary,) = run(tmp_path, model_file, b'{"text": "a\\u0000b \\ud83c\\udf89"}\n')
    (ids,) = documents(summary.prefix)
    assert load_tokenizer(model_file).decode(ids[:-1]) == "a\x00b 🎉"


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "broken": (b'{"text": "x"', "broken JSON at column"),
    "two objects": (b'{"text": "x"} {"text": "y"}', "broken JSON at column"),
    "raw NUL": (b'{"text": "a\x00b"}', "broken JSON at column 12: Invalid control character"),
    "no UTF-8": (b'{"text": "a\xe9b"}', "found byte 0xe9 at column 12"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "found byte 0xff at column 1"),
    "gzip": (b"\x1f\x8b\x08\x00 abc", "found byte 0x8b"),
    "list": (b'["x"]', "found a JSON list, expected an object"),
    "string": (b'"text"', "found a JSON str, expected an object"),
    "missing key": (b'{"txt": "x"}', "key 'text' is missing, found 'txt'"),
    "empty object": (b"{}", "key 'text' is missing, found none"),
    "null": (b'{"text": null}', "key 'text': found null, expected a string"),
    "number": (b'{"text": 5}', "key 'text': found int, expected a string"),
    "list of texts": (b'{"text": ["x"]}', "key 'text': found list, expected a string"),
    "half a pair": (b'{"text": "ab\\ud800"}', "half of a surrogate pair at character 3"),
    "deep": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "long integer": (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_and_nothing_is_left(tmp_path: Path, model_file: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    with pytest.raises(DataError) as caught:
        run(tmp_path, model_file, GOOD, GOOD + b"\n" + line + b"\n" + GOOD)
    assert str(caught.value).startswith(f"{tmp_path / 'input1.jsonl'}:3: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_line_in_a_worker_process_is_the_first_of_the_input(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pre, "BATCH_BYTES", 50)
    content = GOOD * 500 + b"{\n" + GOOD * 500 + b'{"txt": 1}\n'
    with pytest.raises(DataError, match=r"input0.jsonl:501: broken JSON"):
        run(tmp_path, model_file, content, workers=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "input0.jsonl: found an empty file"),
        (b"\n \r\n", "input0.jsonl: found no documents with text under 'text' (0 empty)"),
        (lines({"text": ""}, {"text": ""}), "found no documents with text under 'text' (2 empty)"),
        (Path("missing.jsonl"), "missing.jsonl: cannot read: No such file"),
        (Path("/dev/null"), "/dev/null: found a device, expected a file, a folder or a pipe"),
        (Path(__file__).parent, "found no input in this folder, expected files that end with"),
    ],
)
def test_no_input(tmp_path: Path, model_file: Path, content: bytes | Path, message: str) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, model_file, content)
    assert message in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_line_above_the_bound(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match=r"input0.jsonl:2: found a line above 100 bytes"):
        run(tmp_path, model_file, GOOD + lines({"text": "x" * 100}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers: found 0"),
        ({"json_keys": ()}, "json_keys: found []"),
        ({"json_keys": ("text", "text")}, "json_keys: found ['text', 'text']"),
        ({"tokenizer_type": "NoTokenizer"}, "'NoTokenizer', expected one of"),
    ],
)
def test_wrong_options(tmp_path: Path, model_file: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, model_file, GOOD, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_existing_output_is_refused_and_replaced_on_request(
    tmp_path: Path, model_file: Path, suffix: str
) -> None:
    (tmp_path / "out").mkdir()
    existing = tmp_path / "out" / f"d_text_document{suffix}"
    existing.write_bytes(b"precious")
    with pytest.raises(DataError, match="exists already; --overwrite"):
        run(tmp_path, model_file, GOOD)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"precious"]
    (summary,) = run(tmp_path, model_file, GOOD, overwrite=True)
    check_sidecar(summary.prefix, verify="full")


def test_failing_overwrite_keeps_the_old_dataset(tmp_path: Path, model_file: Path) -> None:
    (summary,) = run(tmp_path, model_file, GOOD)
    with pytest.raises(DataError, match="broken JSON"):
        run(tmp_path, model_file, GOOD + b"{", overwrite=True)
    assert check_sidecar(summary.prefix, verify="full") == summary.sidecar
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_bad_tokenizer_is_found_before_any_output(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(DataError, match="bad.model: found a file that is no valid Sentence"):
        run(tmp_path, tmp_path / "bad.model", GOOD)
    assert list((tmp_path / "out").iterdir()) == []


def test_text_that_the_tokenizer_refuses_is_named(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, text: str) -> list[int]:
        raise RuntimeError("internal\nproblem")

    monkeypatch.setattr(
        "megasparse.data.tokenizers.tokenizer.SentencePieceTokenizer.encode", refuse
    )
    with pytest.raises(DataError, match="input0.jsonl:1: the tokenizer cannot.*internal problem"):
        run(tmp_path, model_file, GOOD)


def test_tokens_of_flags_are_in_documents_and_sidecar(tmp_path: Path, model_file: Path) -> None:
    tokens = TokenOptions(eod_token="</s>", bos_token="<s>", add_bos=True)
    tokenizer = load_tokenizer(model_file, options=tokens, probe=False)
    texts = ["one", "</s> <s>", "<eod>"]
    content = lines(*({"text": text} for text in texts), {"text": ""})
    for workers in (1, 2):
        (summary,) = run(
            tmp_path, model_file, content, tokens=tokens, workers=workers, overwrite=True
        )
        found = documents(summary.prefix)
        assert [(ids[0], ids[-1]) for ids in found] == [(tokenizer.bos, tokenizer.eod)] * 3
        assert [tokenizer.decode(ids[1:-1]) for ids in found] == texts
        assert all(not {tokenizer.bos, tokenizer.eod} & set(ids[1:-1]) for ids in found)
        check_sidecar(summary.prefix, tokenizer.digest, rules=token_rules(tokenizer))
    with pytest.raises(DataError, match="made with eod"):
        check_sidecar(summary.prefix, rules=token_rules(load_tokenizer(model_file, probe=False)))
    tokens = TokenOptions(parse_special=True)
    (summary,) = run(tmp_path, model_file, lines({"text": "a<eod>b"}), tokens=tokens, name="p")
    ids = documents(summary.prefix)[0]
    assert ids.count(load_tokenizer(model_file, probe=False).eod) == 2
