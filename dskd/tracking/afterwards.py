"""Messages to MLflow about a run after its training: its model, its measures, and what training left unsent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.lock import lock_if_free
from dskd.config import Config
from dskd.console import gigabytes, say, warn
from dskd.tracking.client import first_line_without_secrets
from dskd.tracking.delivery import Delivery
from dskd.tracking.outbox import Message, Outbox
from dskd.tracking.registered_model import size_bytes
from dskd.tracking.runs import load_run, run_folder
from dskd.tracking.system_metrics import collect_usage


def data_tag(kind: str) -> str:
    """Returns the tag for the digest of the data that results of a kind, such as `tasks/piqa`, were measured on."""
    return f"{kind.replace('/', '_')}_data"


def log_export(config: Config, run: str, run_id: str, folder: Path) -> None:
    """Records that the run was exported to `folder`; with `tracking.log_model`, uploads the model."""
    if not config.tracking.log_model:
        _send(config, run, run_id)
        return
    say(f"  uploading the model to MLflow's run {run_id}: {gigabytes(size_bytes(folder))}")
    _send(config, run, run_id, {"kind": "model", "folder": _inside(config, folder)})


def log_results(
    config: Config,
    run: str,
    run_id: str,
    kind: str,
    measures: Mapping[str, float],
    examples: Path,
    *,
    data: str,
    step: int,
    tables: Sequence[Path] = (),
    files: Sequence[Path] = (),
) -> None:
    """Logs results of the run's model after `step` steps, under the name `kind`, such as `evaluation` or `tasks/piqa`.

    Measures become metrics `KIND/NAME` (those of the evaluation on held-out text, `eval/NAME`), the scores of each
    example an artifact in the folder `KIND`, and the digest of the data a tag. `tables` and `files` are further files
    of the work directory.
    """
    prefix = "eval" if kind == kinds.EVALUATION.folder else kind
    _send(
        config,
        run,
        run_id,
        *({"kind": "table", "file": _inside(config, path), "folder": None} for path in tables),
        *({"kind": "file", "file": _inside(config, path), "folder": None} for path in files),
        {"kind": "file", "file": _inside(config, examples), "folder": kind},
        {"kind": "measures", "measures": {f"{prefix}/{name}": v for name, v in measures.items()}, "step": step},
        # The digest comes last: if a run has it, its measures are complete.
        {"kind": "tags", "tags": {data_tag(kind): data}},
    )


def _send(config: Config, run: str, run_id: str, *messages: Message) -> None:
    """Sends messages to MLflow.

    If the server cannot be reached, prints a warning and keeps the messages for the next process that exports,
    evaluates or trains the run.
    """
    named = [{"run_id": run_id, **message} for message in messages]
    delivery = Delivery(config, run)
    with lock_if_free(kinds.run_lock_path(config, run)) as is_free:
        if not is_free:  # a process is training the run and has taken over the earlier unsent messages
            _send_at_once(delivery, run, named)
            return
        folder = run_folder(config, run)
        outbox = Outbox(folder)
        collect_usage(folder, load_run(folder), outbox)
        outbox.put(*named)
        while batch := outbox.next_batch():
            try:
                delivery.deliver(batch)
            except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
                warn(
                    f"MLflow cannot be reached ({first_line_without_secrets(error)}); {len(outbox)} messages "
                    f"about run {run!r} are "
                    f"kept in {outbox.file}; training, exporting or evaluating the run again sends them"
                )
                break
            outbox.drop(len(batch))
        outbox.save()


def _send_at_once(delivery: Delivery, run: str, messages: Sequence[Message]) -> None:
    for message in messages:
        try:
            delivery.deliver([message])
        except Exception as error:
            warn(f"MLflow did not accept {message['kind']} of run {run!r} ({first_line_without_secrets(error)})")


def _inside(config: Config, path: Path) -> str:
    return str(path.relative_to(config.path()))
