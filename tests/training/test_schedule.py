"""The learning rate of a run, against values computed by hand."""

import pytest
from pydantic import ValidationError

from dskd.config import TrainConfig
from dskd.training.schedule import Schedule, describe_learning_rate

SCHEDULE = Schedule(global_batch_size=8, micro_batch_size=2, accumulation_steps=1, steps_per_epoch=50, total_steps=100)


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero():
    rates = [SCHEDULE.learning_rate(step, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)  # half of the cosine's 90 steps
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize(
    ("rule", "batch", "peak"),
    [
        ("linear", 3, 1.5e-4),
        ("linear", 8, 4e-4),
        ("linear", 1, 5e-5),
        ("square_root", 12, 3e-4),
        ("square_root", 3, 1.5e-4),
    ],
)
def test_a_rate_meant_for_one_batch_size_is_scaled_to_another(rule, batch, peak):
    train = TrainConfig(
        learning_rate=1.5e-4, learning_rate_batch_size=3, learning_rate_rule=rule, global_batch_size=batch
    )
    assert train.peak_learning_rate == pytest.approx(peak)
    assert describe_learning_rate(train).startswith(f"peak learning rate {peak:.4g}, from 0.00015 at a batch of 3 (")


def test_the_rate_does_not_depend_on_the_batch_by_default():
    assert {TrainConfig(global_batch_size=batch).peak_learning_rate for batch in (1, 16, 4096)} == {5e-5}
    assert describe_learning_rate(TrainConfig()) == "peak learning rate 5e-05"


def test_a_rule_without_a_batch_is_refused():
    with pytest.raises(ValidationError, match=r"learning_rate_rule: square_root needs train.learning_rate_batch_size"):
        TrainConfig(learning_rate_rule="square_root")
