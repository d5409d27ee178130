"""Tasks of lm-evaluation-harness on a model as it stands in memory; the only door to `lm_eval`.

Rank 0 loads the tasks and computes their metrics. The model answers through `RequestScorer`, so
that every layout of a run can be evaluated.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megasparse.data.tokenizers.tokenizer import Tokenizer, begin
from megasparse.errors import ConfigError, one_line
from megasparse.inference.request_scoring import Continuation, Interrupted, RequestScorer
from megasparse.log import logger

DEFAULT_NEW_TOKENS = 256  # of a text, where a task says nothing: lm-eval's own


class HarnessTasks:
    """Tasks with their data, loaded once; on rank 0.

    Args:
        names: of tasks or groups of them.
        include_path: folder of tasks in YAML files beside lm-eval's own.
        num_fewshot: examples before each question; None: what the task says.
        limit: questions of each task; None: all.

    Raises:
        ConfigError: lm-eval does not know a task, or cannot load its data.
    """

    def __init__(
        self,
        names: list[str],
        include_path: Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._limit = limit
        manager = _manager(names, include_path)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise ConfigError(
                f"eval_harness_tasks: lm-eval knows no {', '.join(unknown)}; `lm_eval ls tasks` "
                "lists what it has, eval_harness_include_path adds a folder"
            )
        try:
            with _quiet():
                self._tasks = manager.load(names)
        except Exception as error:  # of the task's code, or of its data
            raise ConfigError(
                f"eval_harness_tasks: cannot load {', '.join(names)}: {one_line(error)}"
            ) from error
        for task in self._tasks["tasks"].values():
            own = task.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)

    def evaluate(self, scorer: RequestScorer, tokenizer: Tokenizer) -> dict[str, float]:
        """The metrics of all tasks, as `task/metric`; on rank 0, while the others serve.

        Raises:
            Interrupted: the run is to stop.
        """
        from lm_eval.api.model import TemplateLM
        from lm_eval.evaluator import evaluate

        model = type("_Model", (_Requests, TemplateLM), {})(scorer, tokenizer)
        with _quiet(), _own_draws():
            found = evaluate(
                model, self._tasks, limit=self._limit, bootstrap_iters=0, log_samples=False
            )
        return dict(_metrics(found["results"]))


class _Requests:
    """What lm-eval asks of a model; mixed into its base class."""

    def __init__(self, scorer: RequestScorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._scorer, self._tokenizer = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context, as before a document of the training."""
        return (begin(self._tokenizer) or [self._tokenizer.eod])[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else begin(self._tokenizer) + ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self._scorer.log_likelihoods([(list(c), list(t)) for _, c, t in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows that follow each other."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append((list(window[0]), list(window[1])))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scorer.log_likelihoods(pairs), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        wanted = []
        for request in requests:
            context, settings = request.args
            stops = settings.get("until") or []
            sampled = settings.get("do_sample") and settings.get("temperature", 1.0)
            wanted.append(
                Continuation(
                    self.tok_encode(context) or [self.prefix_token_id],
                    [stops] if isinstance(stops, str) else list(stops),
                    int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)),
                    float(sampled or 0.0),
                )
            )
        return self._scorer.continuations(wanted)


def run_tasks(
    tasks: HarnessTasks | None, scorer: RequestScorer, tokenizer: Tokenizer
) -> dict[str, float]:
    """The metrics on every rank; a collective call. None where a task failed, which is told.

    Args:
        tasks: on rank 0, None elsewhere.

    Raises:
        Interrupted: the run is to stop; on all ranks.
    """
    if tasks is None:
        result = scorer.serve()
    else:
        try:
            result = tasks.evaluate(scorer, tokenizer)
        except Interrupted:
            raise
        except Exception as error:
            if scorer.in_pass:
                raise
            # The run is worth more than a figure about it.
            logger.warning("eval_harness_tasks: no result, %s", one_line(error))
            result = {}
        scorer.done(result)
    return dict(result)


def _manager(names: list[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        # lm-eval's own 14,000 take seconds to be listed.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager(include_path=folder)


def _metrics(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, chosen_by = name.partition(",")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and chosen_by and math.isfinite(value) and "_stderr" not in metric:
                which = "" if chosen_by == "none" else f"_{chosen_by}"
                yield f"{task}/{metric}{which}", float(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars, which a log file cannot show; its messages still come."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _own_draws() -> Iterator[None]:
    """Tasks that draw leave the run's generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
