"""The command `megasparse`: doors to the scripts of `launch/` and `tools/`, installed or not.

megasparse pretrain --config quickstart        on this machine, one process
torchrun --nproc-per-node 8 -m megasparse pretrain ...
deepspeed --module megasparse pretrain ...
megasparse COMMAND --help                      the flags of a command
megasparse completion bash                     completion for a shell (bash or zsh)
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from megasparse.config.command_line import completion_words
from megasparse.config.packaged import commands_folder
from megasparse.extras import MissingExtraError

# Of each command its script, and what it does.
COMMANDS = {
    "pretrain": ("launch/pretrain.py", "pre-train a model"),
    "generate": ("launch/generate.py", "continue prompts with a trained model"),
    "evaluate": ("launch/evaluate.py", "perplexity of a trained model"),
    "preflight": ("-m megasparse.preflight", "check hosts before a run"),
    "estimate": ("tools/estimate.py", "memory and time of a run before it starts"),
    "corpus": ("tools/make_corpus.py", "a text corpus from the Python library's sources"),
    "tokenizer": ("tools/train_tokenizer.py", "train a SentencePiece tokenizer"),
    "preprocess": ("tools/preprocess_data.py", "tokenize text into Megatron's .bin and .idx"),
    "convert": ("tools/convert_checkpoint.py", "convert checkpoints and models"),
    "export": ("tools/export_sparse.py", "write packed 2:4 weights"),
    "quantize": ("tools/quantize.py", "quantize a trained model"),
    "prune": ("tools/prune_oneshot.py", "prune a trained model without training"),
    "inspect": ("tools/inspect_sparsity.py", "patterns and masks of a checkpoint"),
    "plot": ("tools/plot_runs.py", "a page with the curves of runs"),
    "search-decay": ("tools/search_decay.py", "find the masked decay of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as if its script had been called; the exit code if there is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher puts the rank before the command.
    ranks = [word for word in words[:1] if word.startswith(("--local_rank", "--local-rank"))]
    words = words[len(ranks) :]
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0 if words else 64
    if words[0] == "--version":
        words = ["pretrain", *words]
    if words[0] == "completion":
        sys.stdout.write(_completion(words[1] if len(words) > 1 else "bash"))
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"megasparse: no command {words[0]!r}, expected {', '.join(COMMANDS)}\n")
        return 64
    try:
        _run(COMMANDS[words[0]][0], [*ranks, *words[1:]])
    except MissingExtraError as error:
        sys.stderr.write(f"megasparse {words[0]}: error: {error}\n")
        return error.exit_code
    return 0


def _run(script: str, arguments: list[str]) -> None:
    if script.startswith("-m "):
        sys.argv = [script, *arguments]
        runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
        return
    path = commands_folder() / script
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    runpy.run_path(str(path), run_name="__main__")


def _usage() -> str:
    rows = [f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*(__doc__ or "").splitlines(), "commands:", *rows, ""])


def _completion(shell: str) -> str:
    """Lines for a shell's start file: `eval "$(megasparse completion bash)"`."""
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    words, commands = " ".join(completion_words()), " ".join([*COMMANDS, "completion"])
    return f"""{head}_megasparse() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [[ "$word" == -* && "${{COMP_WORDS[1]}}" == pretrain ]]; then
        COMPREPLY=($(compgen -W "{words}" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -F _megasparse megasparse
"""


if __name__ == "__main__":
    sys.exit(main())
