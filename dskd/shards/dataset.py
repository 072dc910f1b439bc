"""The dataset of shards; a module of its own, for mosaicml-streaming takes seconds to import."""

from concurrent.futures import Future
from typing import Any

from streaming import StreamingDataset


class ShardDataset(StreamingDataset):
    """mosaicml-streaming's dataset, whose samples also say which they are, and in which epoch and step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Set by whoever iterates it, in the process that does.
        self.current_epoch = 0
        self.current_step = 0
        self.failure: BaseException | None = None  # why iterating it ended early

    def on_exception(self, future: Future) -> None:
        """Keeps why shards could not be fetched. The library raises it in a thread of its own, where nobody hears it,
        and the iteration just ends.
        """
        if error := future.exception():
            self.failure = error
            self._event.set()

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The columns of a sample, with `sample_id`, `epoch` and `step`."""
        sample = super().get_item(sample_id, retry)
        return {**sample, "sample_id": sample_id, "epoch": self.current_epoch, "step": self.current_step}
