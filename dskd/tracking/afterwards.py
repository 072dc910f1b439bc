"""What MLflow is told of a run that nobody trains now: its model, its measures, and what its training left unsent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.lock import lock_if_free
from dskd.config import Config
from dskd.console import say, warn
from dskd.tracking.client import first_line
from dskd.tracking.delivery import Delivery
from dskd.tracking.outbox import Message, Outbox
from dskd.tracking.registered_model import size_bytes
from dskd.tracking.runs import load_run, run_folder
from dskd.tracking.system_metrics import take_samples

EVALUATION_FOLDER = "evaluation"  # among a run's artifacts


def data_tag(kind: str) -> str:
    """The tag with the digest of what results of a kind, such as `evaluation` or `tasks/piqa`, are of."""
    return f"{kind.replace('/', '_')}_data"


EVALUATION_DATA_TAG = data_tag(EVALUATION_FOLDER)


def log_export(config: Config, run: str, run_id: str, folder: Path) -> None:
    """The run was exported to `folder`; with `tracking.log_model` the model is uploaded."""
    if not config.tracking.log_model:
        _tell(config, run, run_id)
        return
    say(f"  uploading the model to MLflow's run {run_id}: {size_bytes(folder) / 1e9:.3g} GB")
    _tell(config, run, run_id, {"kind": "model", "folder": _inside(config, folder)})


def log_evaluation(
    config: Config,
    run: str,
    run_id: str,
    measures: Mapping[str, float],
    examples: Path,
    *,
    data: str,
    step: int,
    tables: Sequence[Path] = (),
    files: Sequence[Path] = (),
) -> None:
    """An evaluation of the run's model after `step` steps: its measures, what each example scored, the digest of the
    data, and tables and other files of the work directory.
    """
    shown: list[Message] = []
    for kind, paths in (("table", tables), ("file", files)):
        shown += [{"kind": kind, "file": _inside(config, path), "folder": None} for path in paths]
    named = {f"eval/{name}": value for name, value in measures.items()}
    _tell(config, run, run_id, *shown, *_results(config, EVALUATION_FOLDER, named, examples, data, step))


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
) -> None:
    """Other results of the run's model after `step` steps, under the name `kind`, such as `tasks/piqa`: measures as
    metrics `KIND/NAME`, what each example scored as an artifact in that folder, and the digest of the data as a tag.
    """
    named = {f"{kind}/{name}": value for name, value in measures.items()}
    _tell(config, run, run_id, *_results(config, kind, named, examples, data, step))


def _results(
    config: Config, kind: str, measures: Mapping[str, float], examples: Path, data: str, step: int
) -> list[Message]:
    return [
        {"kind": "file", "file": _inside(config, examples), "folder": kind},
        {"kind": "measures", "measures": dict(measures), "step": step},
        # The digest comes last: measures under a digest are whole.
        {"kind": "tags", "tags": {data_tag(kind): data}},
    ]


def _tell(config: Config, run: str, run_id: str, *messages: Message) -> None:
    """Delivers; a server that is away costs a warning, and is told by the next process that comes here or trains."""
    named = [{"run_id": run_id, **message} for message in messages]
    delivery = Delivery(config, run)
    with lock_if_free(kinds.lock_path(config, run)) as is_free:
        if not is_free:  # the process that trains the run now has what was unsent before
            _tell_at_once(delivery, run, named)
            return
        folder = run_folder(config, run)
        outbox = Outbox(folder)
        take_samples(folder, load_run(folder), outbox)
        outbox.put(*named)
        while batch := outbox.next_batch():
            try:
                delivery.deliver(batch)
            except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
                warn(
                    f"MLflow is away ({first_line(error)}); {len(outbox)} messages about run {run!r} are kept in "
                    f"{outbox.file}, and sent when it is trained, exported or evaluated again"
                )
                break
            outbox.drop(len(batch))
        outbox.save()


def _tell_at_once(delivery: Delivery, run: str, messages: Sequence[Message]) -> None:
    for message in messages:
        try:
            delivery.deliver([message])
        except Exception as error:
            warn(f"MLflow did not take {message['kind']} of run {run!r} ({first_line(error)})")


def _inside(config: Config, path: Path) -> str:
    return str(path.relative_to(config.path()))
