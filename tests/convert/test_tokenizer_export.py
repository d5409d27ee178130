"""The exported tokenizer, loaded by transformers, gives the ids of the training for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from megasparse.atomic_files import write_json
from megasparse.convert.huggingface.tokenizer_export import exported_tokenizer, pad_id
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import (
    begin,
    load_tokenizer,
    tokenizer_file_of,
    train_sentencepiece,
)
from megasparse.errors import ConfigError, DataError

SAMPLE = ["the cat sat on the mat and the dog ran", "def f(x):\n    return x  # café", "aaaa abab"]
# What tokenizers treat in ways of their own: control tokens, added ones, spaces, joiners.
PARTS = [
    "<eod>",
    "</s>",
    "<s>",
    "<|endoftext|>",
    "<|begin|>",
    "[SEP]",
    "[CLS]",
    "<tool>",
    "<tool",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "the",
    "\u2581",
    "\u0301",
    "\ufb01",
    "<unk>",
    "<pad>",
    "<0x41>",
    "\x00",
    "\u200d",
    "T",
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(PARTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    ),
    max_size=8,
).map("".join)
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def byte_level(folder: Path, bos: bool = False, prefix: bool = False) -> None:
    """GPT-2's kind; with `bos` Llama 3's, whose post-processor puts a token before a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SAMPLE * 3, trainer)
    made.add_tokens([AddedToken("<tool>", rstrip=True), AddedToken("T", single_word=True)])
    made.enable_truncation(4)
    if bos:
        template = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    made.save(str(folder / "tokenizer.json"))


def llama_2(folder: Path) -> None:
    """Byte fallback, a space before each text, and a configuration that adds the token before."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "\u2581the"):
        vocabulary[piece] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    names |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**names, "chat_template": "{{ messages }}"})


def unigram(folder: Path) -> None:
    """T5's kind: the control tokens are pieces of the model itself."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("the", -2.5)]
    pieces += [(letter, -4.0 - 0.1 * n) for n, letter in enumerate("abcdefghijklmnopqrst</>")]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def word_level(folder: Path) -> None:
    """A vocabulary of words with the control token among them."""
    words = {"the": 0, "<eod>": 1, "a": 2, "<unk>": 3, "<": 4, "eod>": 5}
    made = tokenizers.Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


def bert(folder: Path) -> None:
    """Lower case, `[CLS] text [SEP]`."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "the": 4, "a": 5, "##a": 6, "[": 7}
    made = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    write_json(folder / "special_tokens_map.json", names)


def piece(folder: Path, **more: object) -> None:
    """A SentencePiece model; by default of `train_sentencepiece`."""
    if not more:
        (folder / "tokenizer.model").write_bytes(train_sentencepiece(SAMPLE * 3, 330))
        return
    fixed = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    fixed |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "vocab_size": 330}
    with open(folder / "tokenizer.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SAMPLE * 3),
            model_writer=stream,
            minloglevel=2,
            **{**fixed, **more},
        )


def t5(folder: Path) -> None:
    """SentencePiece's defaults, without byte fallback, with a token that begins a document."""
    defaults = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    piece(folder, **defaults, model_type="unigram", byte_fallback=False, vocab_size=60)
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", names)


KINDS = {
    "byte level": byte_level,
    "byte level, prefix space": lambda folder: byte_level(folder, prefix=True),
    "byte level, BOS": lambda folder: byte_level(folder, bos=True),
    "llama 2": llama_2,
    "unigram": unigram,
    "word level": word_level,
    "bert": bert,
    "sentencepiece": piece,
    "sentencepiece, prefix space": lambda folder: piece(folder, add_dummy_prefix=True),
    "sentencepiece, symbols": lambda folder: piece(
        folder, add_dummy_prefix=False, user_defined_symbols=["<eod>", "<tool>"]
    ),
    # No tokenizer.json is exactly one of these.
    "sentencepiece unigram": lambda folder: (folder / "tokenizer.model").write_bytes(
        train_sentencepiece(SAMPLE * 3, 330, "unigram")
    ),
    "sentencepiece unigram, T5": lambda folder: t5(folder),
    "sentencepiece, normalised": lambda folder: piece(
        folder, normalization_rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True
    ),
    "sentencepiece, symbols and prefix": lambda folder: piece(
        folder, add_dummy_prefix=True, user_defined_symbols=["<eod>", "<tool>"]
    ),
    "sentencepiece, suffix": lambda folder: piece(folder, treat_whitespace_as_suffix=True),
}
ADDS_BOS = {"byte level, BOS", "llama 2", "bert", "sentencepiece unigram, T5"}


def write(folder: Path, tokenizer, file: Path):
    import transformers

    folder.mkdir()
    files = exported_tokenizer(tokenizer, file, 512)
    for name, content in files.written.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_json(folder / name, content, indent=2)
    for name, path in files.copied.items():
        (folder / name).write_bytes(path.read_bytes())
    # As an export: transformers looks into it for the model's own class of tokenizers.
    write_json(
        folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """The tokenizer as a run uses it, its export as transformers loads it, and both folders."""
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param](folder)
    ours = load_tokenizer(folder, probe=False)
    engine = write(folder / "out", ours, tokenizer_file_of(folder))
    return request.param, ours, engine, folder


@PROPERTY
@given(text=TEXTS)
def test_any_text_gives_the_ids_of_the_training(exported, text):
    kind, ours, engine, _ = exported
    ids = ours.encode(text)
    assert engine(text, add_special_tokens=False)["input_ids"] == ids
    assert engine(text)["input_ids"] == begin(ours) + ids
    assert not {ours.eod, ours.bos} & set(ids)  # text is text
    assert ours.add_bos == (kind in ADDS_BOS)


def test_the_special_tokens_go_along_and_the_export_is_a_tokenizer_again(exported):
    kind, ours, engine, folder = exported
    assert engine.eos_token_id == ours.eod and engine.pad_token_id == pad_id(ours)
    assert engine.bos_token_id == ours.bos and len(engine) <= ours.vocab_size
    written = json.loads((folder / "out" / "tokenizer_config.json").read_text())
    # A text is not a document: nothing ends it, and nothing is tidied up in it.
    assert written["add_eos_token"] is written["clean_up_tokenization_spaces"] is False
    assert written["add_bos_token"] == ours.add_bos and written["model_max_length"] == 512
    if kind == "llama 2":
        assert engine.chat_template == "{{ messages }}" and engine.unk_token == "<unk>"
    again = load_tokenizer(tokenizer_file_of(folder / "out"), probe=False)
    assert again.digest == ours.digest  # datasets of the original are datasets of this
    assert (again.eod, again.bos, again.add_bos) == (ours.eod, ours.bos, ours.add_bos)


@pytest.mark.parametrize(
    "kind", ["byte level", "sentencepiece", "unigram", "sentencepiece unigram"]
)
def test_flags_choose_other_tokens_and_the_export_has_them(tmp_path, kind):
    KINDS[kind](tmp_path)
    pieces = {"byte level": ("<|begin|>", "<tool>"), "sentencepiece": ("</s>", "<s>")}
    pieces["sentencepiece unigram"] = ("</s>", "<s>")
    eod, bos = pieces.get(kind, ("<pad>", "the"))
    options = TokenOptions(eod_token=eod, bos_token=bos, add_bos=True)
    ours = load_tokenizer(tmp_path, probe=False, options=options)
    assert (ours.eod_piece, ours.bos_piece, ours.add_bos) == (eod, bos, True)
    engine = write(tmp_path / "out", ours, tokenizer_file_of(tmp_path))
    for text in (f"a{eod} {bos}the", "", " the", f"{bos}{eod}"):
        ids = ours.encode(text)
        assert not {ours.eod, ours.bos} & set(ids)
        assert engine(text)["input_ids"] == [ours.bos, *ids]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flag_lets_text_become_control_tokens(tmp_path, kind):
    KINDS[kind](tmp_path)
    ours = load_tokenizer(tmp_path, probe=False, options=TokenOptions(parse_special=True))
    engine = write(tmp_path / "out", ours, tokenizer_file_of(tmp_path))
    text = f"the {ours.eod_piece} a"
    assert ours.encode(text).count(ours.eod) == 1
    assert engine(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_a_long_text_is_cut_as_in_the_training_and_comes_back(exported):
    """A unigram model adds up float32 scores: far into a text, sums of other cuts are equal."""
    kind, ours, engine, _ = exported
    if not kind.startswith("sentencepiece"):
        return
    text = "the cat sat on the mat and the dog ran aaaa abab" * 400
    ids = ours.encode(text)
    assert engine(text, add_special_tokens=False)["input_ids"] == ids
    if not engine.is_fast:
        assert engine.sp_model.decode(ids) == ours.decode(ids)


def test_a_text_that_transformers_would_take_for_a_control_token_is_refused(tmp_path):
    piece(tmp_path, byte_fallback=False, vocab_size=60, control_symbols=["\u65e5\u672c"])
    ours = load_tokenizer(tmp_path, probe=False)
    assert ours.decode(ours.encode("a \u65e5\u672c")).startswith("a")
    with pytest.raises(ConfigError, match="the text '\u65e5\u672c' for the control token"):
        exported_tokenizer(ours, tokenizer_file_of(tmp_path), 512)


def test_files_and_flags_name_the_tokens(tmp_path):
    byte_level(tmp_path)
    config = tmp_path / "tokenizer_config.json"

    def eod(**options: object) -> str:
        return load_tokenizer(tmp_path, probe=False, options=TokenOptions(**options)).eod_piece

    assert eod() == "<|endoftext|>"  # a usual name
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert eod() == "<|begin|>"
    config.write_text(json.dumps({"eos_token": "<tool>"}))
    assert eod() == "<tool>" and eod(eod_token="the") == "the"
    with pytest.raises(DataError, match="the text 'T' becomes the control token.*--parse-special"):
        eod(eod_token="T")  # one letter, which no cut keeps from the model
    assert eod(eod_token="T", parse_special=True) == "T"
    config.write_text(json.dumps({"eos_token": "not there"}))
    assert eod() == "<|endoftext|>"
    with pytest.raises(DataError, match="--eod-token '<x>': is no token of .*tokenizer.json"):
        eod(eod_token="<x>")
    with pytest.raises(DataError, match="begins a document.*--bos-token, or --no-add-bos"):
        eod(add_bos=True)
    for text in ("{", "[1]", "5"):
        config.write_text(text)
        with pytest.raises(DataError, match="tokenizer_config.json: found"):
            eod()
