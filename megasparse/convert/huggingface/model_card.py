"""The `README.md` of an export: what the model is, how it was trained, what is 2:4, how to load it.

`Facts` are what a run knows of itself; a model that was only converted has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import megasparse
from megasparse.config import CompleteModel

CARD = "README.md"


@dataclass
class Facts:
    """What a run says of the model.

    Attributes:
        recipe, step: how it was trained, and until when.
        data: names of the datasets.
        samples: sequences seen.
        seq_length: tokens of each.
        losses: by name, e.g. "validation loss".
        tokens: `token_rules` of its tokenizer.
        is_chat: it was fine-tuned on conversations.
    """

    recipe: str
    step: int
    data: list[str] = field(default_factory=list)
    samples: int = 0
    seq_length: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = False


def model_card(
    model: CompleteModel,
    origin: dict[str, Any],
    tensors: dict[str, Any],
    packing: str | None,
    facts: Facts | None,
    has_tokenizer: bool,
) -> str:
    """The text.

    Args:
        model: sizes and style.
        origin: of the source of the weights.
        tensors: what `write_huggingface` says of each.
        packing: of the 2:4 matrices; None: dense with zeros.
        facts: of the run that trained it.
        has_tokenizer: whether one that transformers loads goes with it.
    """
    lines = ["---", "library_name: transformers", "tags:", "- megasparse", "---", ""]
    lines += [f"# {model.num_layers} layers of {model.hidden_size}, {_parameters(tensors)}", ""]
    lines += _training(origin, facts)
    lines += _sparsity(tensors, packing)
    lines += _loading(packing, facts, has_tokenizer)
    lines += [f"Written by megasparse {megasparse.__version__}.", ""]
    return "\n".join(lines)


def _parameters(tensors: dict[str, Any]) -> str:
    count = 0
    for record in tensors.values():
        values = 1
        for size in record["shape"]:
            values *= size
        count += values
    return f"{count:,} parameters"


def _training(origin: dict[str, Any], facts: Facts | None) -> list[str]:
    lines = ["## Training", ""]
    if facts is None:
        return [*lines, f"Converted from weights in the format {origin['format']}.", ""]
    lines.append(f"- recipe: `{facts.recipe}`, step {facts.step:,}")
    if facts.samples:
        tokens = facts.samples * facts.seq_length
        lines.append(f"- {facts.samples:,} sequences of {facts.seq_length} tokens ({tokens:,})")
    if facts.data:
        lines.append(f"- data: {', '.join(f'`{name}`' for name in facts.data)}")
    lines += [f"- {name}: {value:.4f}" for name, value in facts.losses.items()]
    return [*lines, ""]


def _sparsity(tensors: dict[str, Any], packing: str | None) -> list[str]:
    sparse = {name: record for name, record in tensors.items() if record["2:4"]}
    lines = ["## What is 2:4", ""]
    if not sparse:
        return [*lines, "No matrix.", ""]
    transposable = sum(record["transposable"] for record in sparse.values())
    lines += [
        f"{len(sparse)} of {len(tensors)} tensors, {transposable} of them along both dimensions. "
        "Of four neighbours at most two are not zero. `sparsity.json`, where there is one, lists "
        "them.",
        "",
        "| tensor | shape | density |",
        "|---|---|---:|",
        *(
            f"| `{name}` | {' x '.join(map(str, record['shape']))} | {record['density']:.3f} |"
            for name, record in sparse.items()
        ),
        "",
    ]
    if packing:
        lines += [f"They are packed ({packing}); megasparse unpacks them.", ""]
    return lines


def _loading(packing: str | None, facts: Facts | None, has_tokenizer: bool) -> list[str]:
    if packing:
        return []
    lines = ["## Load it", "", "```python", "import transformers", ""]
    lines.append("model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)")
    if has_tokenizer:
        lines.append("tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)")
    lines += ["```", ""]
    if not has_tokenizer or facts is None or not facts.tokens:
        return lines
    begins = "begins with the BOS token" if facts.tokens["add_bos"] else "has no token before it"
    special = "become those tokens" if facts.tokens["parse_special"] else "are text"
    lines += [
        "The tokenizer gives the ids of the training. A text of the training "
        f"{begins}, which `add_special_tokens=True` (the default) gives too; "
        "`add_special_tokens=False` gives the text's ids alone. Control tokens that are written in "
        f"a text {special}.",
        "",
    ]
    if facts.is_chat:
        lines += [
            "The model was fine-tuned on conversations in its chat template: "
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` makes a prompt "
            "of messages.",
            "",
        ]
    return lines
