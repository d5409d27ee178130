"""Continue prompts with a trained model.

    python launch/generate.py --load runs/first --prompt "def main(" --max-new-tokens 64
    deepspeed --num_gpus 2 launch/generate.py --load runs/first --tensor-model-parallel-size 2 ...

A model that was fine-tuned on conversations (--sft) is asked in its chat template; a prompt is what
the user says then, and the answer ends where the model ends it:

    python launch/generate.py --load runs/chat --chat --prompt "What is 2:4?"

Keys and values are cached. The same seed gives the same text, whatever the tensor-parallel size
(but for rounding).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

from megasparse import log
from megasparse.cli import guarded
from megasparse.data.chat.template import Message
from megasparse.distributed.environment import rank_for_log
from megasparse.errors import ConfigError
from megasparse.inference.chat import chat_encoder
from megasparse.inference.loading import add_model_flags, leave, open_model
from megasparse.inference.sampling import Sampling, generate_text, prompt_ids
from megasparse.megatron.inference import CachedDecoder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    text.add_argument("--prompt-file", help="a prompt as a file; '-' is standard input")
    text.add_argument(
        "--chat", action="store_true", help="prompts are a user's messages; print the answers"
    )
    text.add_argument("--system-prompt", metavar="TEXT", help="with --chat: a message before them")
    text.add_argument(
        "--chat-template",
        metavar="FILE",
        type=Path,
        help="with --chat: default: that of the fine-tuning, or beside the tokenizer",
    )
    text.add_argument("--max-new-tokens", type=int, default=64, metavar="INT")
    text.add_argument("--greedy", action="store_true", help="always the most likely token")
    text.add_argument("--temperature", type=float, default=1.0, metavar="FLOAT")
    text.add_argument("--top-k", type=int, default=0, metavar="INT", help="0: all (default)")
    text.add_argument("--top-p", type=float, default=1.0, metavar="FLOAT")
    text.add_argument("--seed", type=int, default=1234, metavar="INT")
    return parser.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the flags, of a file or of standard input; an empty one if there is none."""
    prompts = list(args.prompt)
    if args.prompt_file == "-":
        prompts.append(sys.stdin.read())
    elif args.prompt_file is not None:
        with open(args.prompt_file, encoding="utf-8") as stream:
            prompts.append(stream.read())
    return prompts or [""]


def messages_of(prompt: str, system: str | None) -> list[Message]:
    """A conversation that the model is to answer."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def context_for(length: int, wanted: int, context: int) -> int:
    """Tokens of prompt and continuation; says so where the model's context ends before.

    Args:
        length: of the prompt.
        wanted: new tokens.
        context: tokens that the model has positions for.
    """
    if length + wanted > context:
        log.warn_once(
            "%d of %d new tokens: the prompt has %d, the model a context of %d",
            context - length,
            wanted,
            length,
            context,
        )
    return min(length + wanted, context)


def generate(args: argparse.Namespace) -> None:
    """Continue every prompt; the first rank prints the texts."""
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    prompts = read_prompts(args)
    control_in_texts = bool(args.parse_special)
    if args.chat:  # templates are written in control tokens
        args.parse_special = True
    elif args.chat_template is not None or args.system_prompt is not None:
        raise ConfigError("chat_template and system_prompt need chat")
    loaded = open_model(args)
    tokenizer, encoder = loaded.require_tokenizer(), None
    if args.chat:
        assert loaded.tokenizer_file is not None
        file, given = loaded.tokenizer_file, args.chat_template
        encoder = chat_encoder(loaded.source, tokenizer, file, given, control_in_texts)
    ends = encoder.ends() if encoder is not None else ()
    for prompt in prompts:
        if encoder is None:
            ids = prompt_ids(tokenizer, prompt)
        else:
            ids = encoder.prompt(messages_of(prompt, args.system_prompt))
        length = len(ids)
        if length >= loaded.context_length:
            raise ConfigError(
                f"the prompt has {length} tokens, the model a context of {loaded.context_length}"
            )
        room = context_for(length, args.max_new_tokens, loaded.context_length)
        decoder = CachedDecoder(loaded.model, room)
        text = generate_text(
            decoder, loaded.grid, tokenizer, ids, room - length, sampling, args.seed, ends
        )
        if loaded.grid.rank == 0:
            print(text if args.chat else prompt + text, flush=True)


if __name__ == "__main__":
    arguments = parse_args()
    code = guarded("generate.py", lambda: generate(arguments), rank_for_log())
    leave(code)
    sys.exit(code)
