"""A tokenizer's chat template: messages to the text that a model was made to continue.

Templates are Jinja, as Hugging Face stores them beside tokenizers; the only door to jinja2. They
come from files, so they run in its sandbox: no attribute that leads to Python's insides, no
changes of what they are given. What a template finds there (functions, filters, the handling of
white space) is what `apply_chat_template` of transformers gives it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megasparse.data.file_errors import read_error
from megasparse.data.tokenizers.special_tokens import TOKENIZER_CONFIG, read_json_object
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.errors import DataError
from megasparse.input_files import read_regular

CHAT_TEMPLATE = "chat_template.jinja"
Message = dict[str, Any]
# Around what `{% generation %}` encloses, while spans are looked for; no text has them.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_MAX_BYTES = 1 << 20


class ChatTemplate:
    """A template and the tokens that it names.

    Args:
        text: Jinja.
        tokens: `bos_token`, `eos_token` and the like, as the template calls them.
        where: of the template, for messages.

    Attributes:
        text: as given.
        digest: SHA-256 (hex) of the text.

    Raises:
        DataError: the text is no template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], where: str) -> None:
        self.text, self.where, self._tokens = text, where, dict(tokens)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: found no chat template ({error})") from None
        #: Whether it says by `{% generation %}` what answers are.
        self.marks_answers = "generation" in environment.compiled_blocks  # type: ignore[attr-defined]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what comes before an answer.

        Raises:
            DataError: the template refuses it, or fails.
        """
        return self._render(messages, tools, add_generation_prompt, marked=False)

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where what `{% generation %}` encloses is; as `render`."""
        parts = self._render(messages, tools, False, marked=True).split(_OPEN)
        text, spans = parts[0], []
        for part in parts[1:]:
            inside, _, rest = part.partition(_CLOSE)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + rest
        return text, spans

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        marked: bool,
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **{_Generation.ASKED: marked},
            )
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except Exception as error:  # of what the template does to its values
            reason = f"{type(error).__name__}: {error}"
        raise DataError(f"the chat template refuses the conversation: {' '.join(reason.split())}")


def find_template(tokenizer: Tokenizer, file: Path, given: Path | None = None) -> ChatTemplate:
    """The template of a tokenizer.

    Args:
        file: of the tokenizer; its template is beside it, in `chat_template.jinja` or
            `tokenizer_config.json`.
        given: another one, in a file.

    Raises:
        DataError: there is none, or it is none.
    """
    config = read_json_object(file.parent / TOKENIZER_CONFIG)
    beside = file.parent / CHAT_TEMPLATE
    if given is not None:
        where, text = given, _read(given)
    elif beside.is_file():
        where, text = beside, _read(beside)
    else:
        where, stored = file.parent / TOKENIZER_CONFIG, _stored(config)
        if stored is None:
            raise DataError(
                f"{file}: found no chat template beside it ({CHAT_TEMPLATE}, or chat_template in "
                f"{TOKENIZER_CONFIG}), expected one, or --chat-template FILE"
            )
        text = stored
    return ChatTemplate(text, named_tokens(tokenizer, config), str(where))


def named_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a template may name.

    Args:
        config: of `tokenizer_config.json`; what it names besides those of the run.
    """
    found = {}
    for name, value in config.items():
        piece = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(piece, str):
            found[name] = piece
    found["eos_token"] = tokenizer.eod_piece
    found["bos_token"] = tokenizer.bos_piece or ""
    found["pad_token"] = tokenizer.pad_piece or tokenizer.eod_piece
    return found


def _stored(config: Mapping[str, Any]) -> str | None:
    """Of tokenizer_config.json: a text, or a list of them by name."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    try:
        return read_regular(path, _MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise read_error(path, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found no UTF-8 ({error.reason}), expected a template") from None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, put between marks where spans are asked for."""

    tags = {"generation"}
    ASKED = "_spans_are_asked"

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(compiled_blocks=set())

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.environment.compiled_blocks.add("generation")  # type: ignore[attr-defined]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        asked = jinja2.nodes.Name(self.ASKED, "load")
        call = self.call_method("_enclosed", [asked])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _enclosed(asked: bool, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if asked else caller()
