"""The progress of a run, read from its checkpoints.

Without a checkpoint this imports neither torch nor transformers: scripts ask for the progress of a run again and again.
"""

from dskd.artifacts import kinds
from dskd.config import Config
from dskd.errors import listed
from dskd.training.checkpoints import checkpoint


def report_status(config: Config) -> bool:
    """Prints the progress of the run. Returns True if it was trained to its end with exactly this config."""
    newest = checkpoint.latest(config)
    if newest is not None and newest.is_final:  # read its files fully: nothing checks them again before they are used
        newest = checkpoint.latest(config, verify=True)
    if newest is None:
        print(f"run {config.run!r}: no checkpoint in {kinds.checkpoint_folder(config)}")
        return False
    from dskd.training.inputs import recipe  # here: it takes seconds to import
    from dskd.training.schedule import describe_learning_rate

    step, total = newest.step, newest.manifest.facts["total_steps"]
    if changes := checkpoint.changes_since(newest, recipe(config)):
        print(listed(f"run {config.run!r}: step {step} of {total}, of another config", changes))
        return False
    print(
        f"run {config.run!r}: {'finished, ' if newest.is_final else ''}step {step} of {total}; "
        f"{describe_learning_rate(config.train)}"
    )
    return newest.is_final
