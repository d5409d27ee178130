"""A small chat model's surroundings: a tokenizer with control tokens, templates, conversations."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# In the forms that are in use; written here.
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' "
    "+ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKED = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{%- else %}{{ m['content'] + '<|im_end|>' }}{%- endif %}{{ '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Thinks in the last answer alone.
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{ m['content'] | trim + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# No generation prompt, roles must alternate.
INSTRUCT = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{ ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


def make_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level BPE tokenizer with `SPECIAL`; answers end with `<|im_end|>`. Its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([question + answer for question, answer in questions()], trainer)
    model.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def questions() -> list[tuple[str, str]]:
    """20 questions with answers of different lengths."""
    words = ["red", "green", "blue", "grey", "pink"]
    return [
        (f"Which colour has the {n}?", f"The {n} is {words[i % 5]}" + " indeed" * (i % 4) + ".")
        for i, n in enumerate(
            [
                "cat",
                "dog",
                "cow",
                "hen",
                "fox",
                "owl",
                "bee",
                "ant",
                "pig",
                "rat",
                "bat",
                "elk",
                "emu",
                "yak",
                "ape",
                "eel",
                "cod",
                "ray",
                "asp",
                "gnu",
            ]
        )
    ]


def message(role: str, content: str | None, **more: object) -> dict[str, object]:
    """One message."""
    return {"role": role, "content": content, **more}


def conversations() -> list[dict[str, object]]:
    """20 records: of one turn, and every third of two."""
    found = []
    for i, (question, answer) in enumerate(questions()):
        messages = [message("user", question), message("assistant", answer)]
        if i % 3 == 0:
            messages += [message("user", "Again?"), message("assistant", answer)]
        found.append({"messages": messages})
    return found


def write_conversations(path: Path) -> Path:
    """The records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in conversations()))
    return path
