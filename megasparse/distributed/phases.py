"""The phases of a run as the watchdog tells them, and how long each may take."""

from __future__ import annotations

STARTING = 20.0  # allowance of phases that compile, build or read everything
WRITING = 5.0  # allowance of a save's parts, and of what follows one

# What begins at a point of the run: its words in messages, and the time that it may take, as a
# multiple of the hang timeout; the help of `hang_timeout` states these limits.
PHASES = {
    "build": ("build", STARTING),
    "index": ("index of the samples", STARTING),
    "load": ("load of a checkpoint", STARTING),
    "model": ("build of the model", STARTING),
    "first_step": ("the first step", STARTING),
    "micro_batch": ("step {next}, micro-batch {micro_batch}", 1.0),
    "backward": ("step {next}, backward of micro-batch {micro_batch}", 1.0),
    "evaluate": ("evaluation, micro-batch {micro_batch}", 1.0),
    "tasks": ("evaluation on tasks", STARTING),
    "evaluated": ("after an evaluation", WRITING),
    "save": ("save of step {step}", WRITING),
    "saved": ("after a save", WRITING),
    "report": ("final report", STARTING),
    "end": ("end of the run", STARTING),
}
