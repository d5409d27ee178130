"""Tokenizers: exact round trips, control tokens out of reach of text, damaged files refused."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megasparse.data.tokenizers import tokenizer as tok
from megasparse.data.tokenizers.spm_json import tokenizer_json
from megasparse.errors import DataError

HARD_TEXTS = [
    "def f(x):\n\tif x:\n\t\treturn 1\n\n\n    y = 2\r\n",
    "  leading and trailing  ",
    "\n",
    "\t \t",
    "naïve café — 日本語 🎉\u200d🔥 \u0301 e\u0301 \ufb01 \u00a0 \u3000",
    "\ufeffbyte-order mark",
    "nul \x00 and \x01 and \x7f",
    "<eod> </s> <s> <unk> <0x41> <|endoftext|>",
]


@pytest.fixture(scope="session")
def json_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE `tokenizer.json` whose ids have a hole and which asks to cut and pad."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts[:5], trainer)
    model.enable_truncation(4)
    model.enable_padding(length=8)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    path.write_text(model.to_str())
    return path


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_sentencepiece_round_trip(model_file: Path, text: str) -> None:
    tokenizer = tok.load_tokenizer(model_file, probe=False)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids and all(0 <= index < tokenizer.vocab_size for index in ids)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hugging_face_round_trip_is_not_cut_padded_or_injected(json_file: Path, text: str) -> None:
    tokenizer = tok.load_tokenizer(json_file, probe=False)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids and all(0 <= index < tokenizer.vocab_size for index in ids)


def test_every_document_of_the_corpus_comes_back(model_file: Path, texts: list[str]) -> None:
    tokenizer = tok.load_tokenizer(model_file)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.fixture(scope="module")
def converted(model_file: Path) -> tokenizers.Tokenizer:
    content = tokenizer_json(model_file.read_bytes())
    assert content is not None
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.encode_special_tokens = True  # what `split_special_tokens` of transformers sets
    return made


def test_a_converted_model_gives_the_same_ids(
    converted: tokenizers.Tokenizer, model_file: Path, texts: list[str]
) -> None:
    original = tok.load_tokenizer(model_file, probe=False)
    for text in [*HARD_TEXTS, *texts]:
        ids = converted.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text)
        assert converted.decode(ids, skip_special_tokens=False) == text
    assert converted.token_to_id(tok.EOD_PIECE) == original.eod
    assert converted.decode([original.eod, *ids]) == converted.decode(ids)  # it is special


def test_a_model_that_cannot_be_converted_exactly_is_not(texts: list[str], tmp_path: Path) -> None:
    unigram, prefixed = tmp_path / "unigram.model", tmp_path / "prefixed.model"
    unigram.write_bytes(tok.train_sentencepiece(texts[:5], 400, "unigram"))
    with open(prefixed, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[:5]),
            model_writer=stream,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            minloglevel=2,
            hard_vocab_limit=False,
        )
    assert tokenizer_json(unigram.read_bytes()) is None
    assert tokenizer_json(prefixed.read_bytes()) is None


def test_empty_text_has_no_tokens(model_file: Path, json_file: Path) -> None:
    assert tok.load_tokenizer(model_file).encode("") == []
    assert tok.load_tokenizer(json_file).encode("") == []


def test_properties_and_inference(model_file: Path, json_file: Path, tmp_path: Path) -> None:
    piece, hugging = tok.load_tokenizer(model_file), tok.load_tokenizer(json_file)
    assert (piece.tokenizer_type, piece.vocab_size, piece.eod) == (tok.SENTENCEPIECE, 600, 3)
    assert (hugging.tokenizer_type, hugging.eod) == (tok.HUGGINGFACE, 0)
    assert hugging.vocab_size == 400
    for file, tokenizer in ((model_file, piece), (json_file, hugging)):
        assert tokenizer.digest == hashlib.sha256(file.read_bytes()).hexdigest()
        assert tok.load_tokenizer(file.parent).digest == tokenizer.digest
        nameless = tmp_path / "nameless"
        nameless.write_bytes(file.read_bytes())
        assert tok.load_tokenizer(nameless).tokenizer_type == tokenizer.tokenizer_type


def test_vocab_size_counts_over_holes_in_the_ids(json_file: Path, tmp_path: Path) -> None:
    content = json.loads(json_file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 5000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert tok.load_tokenizer(path).vocab_size == 5001


def test_training_is_deterministic_and_uses_all_arguments(texts: list[str]) -> None:
    pieces = [text[:2000] for text in texts]
    for model_type in ("bpe", "unigram"):
        assert tok.train_sentencepiece(pieces, 500, model_type) == tok.train_sentencepiece(
            pieces, 500, model_type
        )
    assert tok.train_sentencepiece(pieces, 500, "bpe") != tok.train_sentencepiece(
        pieces, 500, "unigram"
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"texts": [], "vocab_size": 500}, "500 tokens"),
        ({"texts": ["a"], "vocab_size": 299}, "299"),
        ({"texts": ["a"], "vocab_size": 500, "model_type": "word"}, "'word'"),
    ],
)
def test_training_refuses(arguments: dict, found: str) -> None:
    with pytest.raises(DataError, match=found):
        tok.train_sentencepiece(**arguments)


def test_null_tokenizer() -> None:
    tokenizer = tok.load_tokenizer(None, tok.NULL, vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (100, 99)
    assert tokenizer.decode(tokenizer.encode("5 7 0")) == "5 7 0"
    assert tokenizer.digest != tok.NullTokenizer(101).digest
    with pytest.raises(DataError, match="vocab_size 1"):
        tok.NullTokenizer(1)


def damaged_files(good: bytes) -> dict[str, bytes]:
    noise = random.Random(0).randbytes(5000)
    return {
        "empty": b"",
        "random": noise,
        "zeros": bytes(1000),
        "truncated": good[: len(good) // 2],
        "one byte less": good[:-1],
        "text": b"hello\n",
        "overwritten middle": good[:2000] + noise[:500] + good[2500:],
    }


@pytest.mark.parametrize("case", sorted(damaged_files(b"")))
@pytest.mark.parametrize("kind", ["model", "json"])
def test_damaged_model_is_one_clear_error(
    case: str, kind: str, model_file: Path, json_file: Path, tmp_path: Path
) -> None:
    good = (model_file if kind == "model" else json_file).read_bytes()
    path = tmp_path / f"tokenizer.{kind}"
    path.write_bytes(damaged_files(good)[case])
    with pytest.raises(DataError) as caught:
        tok.load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: found ") and "\n" not in str(caught.value)


def test_flipped_model_never_kills_this_process(model_file: Path, tmp_path: Path) -> None:
    good = model_file.read_bytes()
    digest = hashlib.sha256(good).hexdigest()
    source = random.Random(1)
    for case in range(12):
        flipped = bytearray(good)
        for _ in range(8):
            flipped[source.randrange(len(good))] ^= 1 << source.randrange(8)
        path = tmp_path / f"{case}.model"
        path.write_bytes(flipped)
        try:
            assert tok.load_tokenizer(path).digest != digest
        except DataError as error:
            assert str(path) in str(error)


def test_crash_of_the_library_is_an_error_here(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tok, "_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(DataError, match="signal 11"):
        tok.load_tokenizer(model_file)


def test_a_signal_during_the_probe_is_no_fault_of_the_file(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's group is signalled while rank 0 looks at the tokenizer: it looks again."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        struck = tmp_path / number.name
        once = f"import os, pathlib; p = pathlib.Path({str(struck)!r})\n"
        once += f"if not p.exists(): p.touch(); os.kill(os.getpid(), {int(number)})"
        # A handler in place of Python's for SIGINT, whose traceback is no death by a signal.
        monkeypatch.setattr(
            tok, "_PROBE", "import signal; signal.signal(2, signal.SIG_DFL)\n" + once
        )
        assert tok.load_tokenizer(model_file).vocab_size > 1
        assert struck.exists()


def test_hanging_library_is_an_error_here(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tok, "_PROBE", "import time; time.sleep(600)")
    monkeypatch.setattr(tok, "PROBE_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(DataError, match="no answer"):
        tok.load_tokenizer(model_file)


def test_current_directory_does_not_shadow_the_libraries(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sentencepiece.py", "resource.py"):
        (tmp_path / name).write_text("raise SystemExit('wrong module')")
    monkeypatch.chdir(tmp_path)
    assert tok.load_tokenizer(model_file).vocab_size == 600


def test_no_end_of_document_token(json_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json_file.read_text().replace("<|endoftext|>", "<other>"))
    with pytest.raises(DataError, match="no token that ends a document.*<eod>"):
        tok.load_tokenizer(path)


@pytest.mark.parametrize(
    ("path", "tokenizer_type", "message"),
    [
        ("missing.model", None, "missing.model: cannot read: No such file"),
        (".", None, "no tokenizer.json or tokenizer.model"),
        ("missing.model", "GPT2BPETokenizer", "'GPT2BPETokenizer', expected one of Sentence"),
        (None, tok.SENTENCEPIECE, "expected a tokenizer file"),
        (None, None, "expected a tokenizer file"),
    ],
)
def test_wrong_arguments(
    path: str | None, tokenizer_type: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        tok.load_tokenizer(None if path is None else tmp_path / path, tokenizer_type)


def test_insisting_on_the_wrong_type(model_file: Path, json_file: Path) -> None:
    with pytest.raises(DataError, match="no valid HuggingFaceTokenizer"):
        tok.load_tokenizer(model_file, tok.HUGGINGFACE)
    with pytest.raises(DataError, match="no valid SentencePieceTokenizer"):
        tok.load_tokenizer(json_file, tok.SENTENCEPIECE)
