"""The dataset of shards; in its own module because mosaicml-streaming takes seconds to import."""

from concurrent.futures import Future
from typing import Any

from streaming import StreamingDataset


class ShardDataset(StreamingDataset):
    """A dataset of mosaicml-streaming whose samples also hold their id, the epoch and the step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # The code that iterates the dataset sets these, in its own process.
        self.current_epoch = 0
        self.current_step = 0
        self.failure: BaseException | None = None  # the error that ended the iteration early

    def on_exception(self, future: Future) -> None:
        """Stores the error of a fetch that failed, and ends the iteration.

        The library raises the error in a thread, where nothing catches it, and the iteration would just end.
        """
        if error := future.exception():
            self.failure = error
            self._event.set()

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Returns the columns of a sample, and its `sample_id`, `epoch` and `step`."""
        sample = super().get_item(sample_id, retry)
        return {**sample, "sample_id": sample_id, "epoch": self.current_epoch, "step": self.current_step}
