"""Plain training, with which tests compare training: single documents, autograd, torch's AdamW and clipping.

It has no DeepSpeed, packing, chunks or sums. Only the order of the sequences comes from the code that is tested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_reading import run_apart, steps_of_run
from torch.nn import functional as F

from dskd.config import Config


@dataclass(frozen=True)
class PlainStep:
    """The outputs of both models at all positions B·T of a step, and the labels at those that have a target [N]."""

    number: int  # from 0
    micro_batches: Sequence[dict[str, Any]]
    has_target: torch.Tensor  # [B·T] bool
    labels: torch.Tensor  # [N]
    logits: torch.Tensor  # [B·T, V]
    states: torch.Tensor  # [B·T, D]
    teacher_logits: torch.Tensor
    teacher_states: torch.Tensor

    def ce(self) -> torch.Tensor:
        """Returns the cross-entropy [N] of each target."""
        return F.cross_entropy(self.logits[self.has_target], self.labels, reduction="none")

    def kl(self, temperature: float) -> torch.Tensor:
        """Returns the divergence [N] from the teacher's distribution, over the tokens that both models have."""
        both = min(self.logits.shape[-1], self.teacher_logits.shape[-1])
        softened, target = (
            (each[self.has_target, :both] / temperature).log_softmax(-1) for each in (self.logits, self.teacher_logits)
        )
        return F.kl_div(softened, target, reduction="none", log_target=True).sum(-1)

    def hidden(self) -> torch.Tensor:
        """Returns the mean squared distance of the states from the teacher's."""
        return F.mse_loss(self.states[self.has_target], self.teacher_states[self.has_target])


class PlainTraining:
    """A loop over the steps of a run. The caller computes the loss of each step and passes it to :meth:`minimise`."""

    def __init__(
        self,
        config: Config,
        cache: Path,
        *,
        student: Any,
        teacher: Any,
        end: int,
        parameters: Sequence[torch.nn.Parameter] | None = None,
    ) -> None:
        """Takes models of transformers, the end-of-text token, and what is trained if it is not all of the student."""
        schedule, self._steps = steps_of_run(config, cache)
        self._total_steps, self._clipping = schedule.total_steps, config.train.gradient_clipping
        self._student, self._teacher, self._end = student, teacher, end
        self._parameters = list(student.parameters()) if parameters is None else list(parameters)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay
        )
        self._decay = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self._total_steps)

    def steps(self) -> Iterator[PlainStep]:
        """Yields what both models compute in each step, with the weights that the steps before have left."""
        for number in range(self._total_steps):
            batches = next(self._steps).micro_batches
            ids = torch.cat([batch["input_ids"] for batch in batches])
            logits, states, has_target = run_apart(self._student, ids, self._end)
            with torch.no_grad():
                teacher_logits, teacher_states, _ = run_apart(self._teacher, ids, self._end)
            labels = ids.roll(-1, dims=1).flatten()[has_target]
            yield PlainStep(number, batches, has_target, labels, logits, states, teacher_logits, teacher_states)

    def minimise(self, loss: torch.Tensor) -> None:
        """Takes one step of the optimizer."""
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clipping)
        self._optimizer.step()
        self._decay.step()
