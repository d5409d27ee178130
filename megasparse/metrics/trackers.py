"""Where curves are shown: TensorBoard always, Weights & Biases and MLflow by a flag.

`TRACKERS` is the list: the setting that asks for a tracker, the package that it needs, and its
class. All get the same tags, the settings of the run, and its texts. Imports happen when a tracker
is opened, on rank 0.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megasparse.atomic_files import write_text
from megasparse.config import ResolvedLogging
from megasparse.errors import ConfigError, one_line
from megasparse.extras import missing
from megasparse.input_files import read_regular
from megasparse.log import logger

try:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams
except ImportError:
    raise missing("tensorboard", "megasparse.metrics.trackers") from None

Settings = dict[str, Any]


class Tracker(Protocol):
    """One of them, for a run.

    Args of the classes: the run's folder, the settings of logging, the step that the run continues
    from (0: it starts), and all settings of the run by group.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, by tag."""
        ...

    def text(self, step: int, tag: str, text: str) -> None:
        """A text of a step."""
        ...

    def flush(self) -> None:
        """Hand everything to the system."""
        ...

    def close(self) -> None:
        """The end of the run."""
        ...


class TensorBoard:
    """Event files in `--tensorboard-dir`."""

    def __init__(
        self, run_dir: Path, logging: ResolvedLogging, resume_step: int, settings: Settings
    ) -> None:
        _leave_disk_errors_to_the_run()
        self._board = SummaryWriter(logging.tensorboard_dir, purge_step=resume_step + 1)
        flat = _flat(settings)
        if flat and not resume_step:
            # The tab of hyper-parameters, beside the curves of the same run.
            for part in hparams(flat, {"curves/loss": 0.0, "curves/validation_loss": 0.0}):
                self._board._get_file_writer().add_summary(part)
            rows = [f"| {name} | {value} |" for name, value in flat.items()]
            table = "\n".join(["| setting | value |", "|---|---|", *rows])
            self._board.add_text("settings", table, resume_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._board.add_text(tag, f"```\n{text}\n```", step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases; one that is continued there when this one is.

    WANDB_MODE=offline keeps it on the disk, for `wandb sync`.
    """

    def __init__(
        self, run_dir: Path, logging: ResolvedLogging, resume_step: int, settings: Settings
    ) -> None:
        import wandb

        folder = Path(logging.wandb_save_dir or run_dir / "wandb")
        self._wandb = wandb
        self._run = wandb.init(
            id=_run_id(folder, resume_step > 0, lambda: secrets.token_hex(8)),
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.wandb_exp_name or run_dir.name,
            dir=str(folder),
            config=settings,
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{_escaped(text)}</pre>")}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment, on a server or in a folder."""

    def __init__(
        self, run_dir: Path, logging: ResolvedLogging, resume_step: int, settings: Settings
    ) -> None:
        import mlflow

        self._entities = mlflow.entities
        uri = logging.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # Files without a database: a run alone needs no more.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run_dir / "mlflow").absolute().as_uri()
        assert logging.mlflow_experiment is not None
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(logging.mlflow_experiment)
        experiment = known.experiment_id if known else None
        if experiment is None:
            experiment = self._client.create_experiment(logging.mlflow_experiment)
        name = logging.mlflow_run_name or run_dir.name

        def begin() -> str:
            return str(self._client.create_run(experiment, run_name=name).info.run_id)

        self._id = _run_id(run_dir / "mlflow", resume_step > 0, begin)
        if not resume_step:
            flat = _flat(settings)
            params = [self._entities.Param(k, str(v)[:500]) for k, v in flat.items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[first : first + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        rows = [metric(tag, float(value), now, step) for tag, value in values.items()]
        for first in range(0, len(rows), 1000):
            self._client.log_batch(self._id, metrics=rows[first : first + 1000])

    def text(self, step: int, tag: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{tag.replace('/', '-')}-{step}.txt")

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Service:
    """A tracker that may fail, as a network or its server does: the run goes on without it."""

    def __init__(self, package: str, tracker: Tracker) -> None:
        self._package, self._tracker = package, tracker
        self._failed = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.scalars(step, values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._try(lambda: self._tracker.text(step, tag, text))

    def flush(self) -> None:
        self._try(self._tracker.flush)

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:
            self._failed = True
            logger.warning(
                "%s failed, and gets no more of this run (metrics.jsonl has all): %s",
                self._package,
                one_line(error),
            )


# The setting that asks for it (None: always), the package, the class.
TRACKERS: tuple[tuple[str | None, str, Any], ...] = (
    (None, "tensorboard", TensorBoard),
    ("wandb_project", "wandb", WeightsAndBiases),
    ("mlflow_experiment", "mlflow", MLflow),
)


def open_trackers(
    run_dir: Path, logging: ResolvedLogging, resume_step: int, settings: Settings | None
) -> list[Tracker]:
    """Those that the settings ask for.

    Raises:
        ConfigError: a service does not take the run.
    """
    opened: list[Tracker] = []
    for setting, package, kind in TRACKERS:
        if setting is None:
            opened.append(kind(run_dir, logging, resume_step, settings or {}))
        elif value := getattr(logging, setting):
            try:
                service = kind(run_dir, logging, resume_step, settings or {})
            except Exception as error:
                message = f"{setting} {value!r}: {package} does not begin a run: {one_line(error)}"
                raise ConfigError(message) from None
            opened.append(_Service(package, service))
    return opened


def _leave_disk_errors_to_the_run() -> None:
    """TensorBoard's thread must not print a traceback when the disk is full.

    The error is raised by the next `add_scalar` as well, and is one line of the run's there.
    """
    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        board = type(what.thread).__name__ == "_AsyncWriterThread"
        if not (board and isinstance(what.exc_value, OSError)):
            before(what)

    threading.excepthook = hook


def _run_id(folder: Path, resumed: bool, make: Any) -> str:
    """The id that a tracker knows the run by, kept in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "run_id"
    if not (resumed and known.exists()):
        write_text(known, make())
    return read_regular(known).decode("utf-8")


def _flat(settings: Settings) -> dict[str, Any]:
    """The settings that are one value, by name (names are unique over the groups)."""
    flat: dict[str, Any] = {}
    for group in settings.values():
        for name, value in group.items():
            if isinstance(value, (bool, int, float, str)):
                flat[name] = value
            elif isinstance(value, list):
                flat[name] = " ".join(map(str, value))
    return flat


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
