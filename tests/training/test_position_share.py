"""Training at a share of the positions: the same positions whatever runs the step, and no work at the others.

That they are those of a plain loop: `test_training.py`.
"""

import shutil
from itertools import pairwise

import pytest
import torch
from rank_processes import run_program
from safetensors.torch import load_file
from stages import build_sequences_of
from tiny_work import BEFORE_TRAINING, RESIDENT, TINY, copy_work
from tracked_results import losses_of

from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.losses.head import DistillationHead
from dskd.shards.annotate import annotate
from dskd.tracking import read_runs
from dskd.training.checkpoints import checkpoint
from dskd.training.inputs import recipe
from dskd.training.train import train

pytestmark = pytest.mark.slow

SHARE = 0.35
LOSS = {**TINY["loss"], "position_share": SHARE, "hidden_weight": 2.0, "lexical_weight": 1.5}
TERMS = ("loss", "ce", "kl", "hidden", "sense", "grad_norm")
SETTINGS = {**TINY["train"], "micro_batch_size": 8, "steps": 4, "checkpoint_every": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def online(tiny, world, tmp_path_factory):
    """The config of a run with a loaded teacher, which one rank trained in one micro-batch a step.

    Its sequences are documents of different lengths. Its shards also have the teacher's states, and its probabilities
    of all tokens.
    """
    of_tiny, every_token = load_config(tiny), TINY["teacher"]["train_from_scratch"]["vocab_size"]
    path = copy_work(
        tiny,
        tmp_path_factory.mktemp("online"),
        *BEFORE_TRAINING,
        loss=LOSS,
        train=SETTINGS,
        teacher=RESIDENT,
        corpus={**of_tiny.corpus.as_dict(), "packing": "none", "max_sequences": 48, "max_validation_sequences": 4},
        annotation={**TINY["annotation"], "teacher_top_n": every_token, "store": ["teacher_states", "trunk_states"]},
    )
    config = load_config(path)
    build_sequences_of(config)
    annotate(config, world)
    train(config, world)
    return path


def _run(path, world, run, *overrides, resume=False):
    config = load_config(path, [f"run={run}", *overrides])
    train(config, world, resume=resume)
    return config


def _weights(config):
    return load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE)


def _require_close(path, one, other, terms=TERMS, rel=1e-5):
    """The losses and the trained tensors of two runs are the same up to rounding."""
    for term in terms:
        values, expected = (losses_of(path, f"train/{term}", f"run={run}") for run in (one, other))
        assert len(values) == 4, term
        assert [value for _, value in values] == pytest.approx([value for _, value in expected], rel=rel), term
    weights, expected = (_weights(load_config(path, [f"run={run}"])) for run in (one, other))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=100 * rel, atol=2e-5)


def test_two_ranks_in_other_micro_batches_draw_what_one_rank_draws(online):
    run_program("train.py", online, "run=two", "train.micro_batch_size=2", "train.num_workers=1", ranks=2)
    _require_close(online, "two", "dskd", rel=2e-4)


def test_stored_states_and_cached_distributions_of_all_tokens_give_the_run_with_the_teacher(online, world):
    _run(online, world, "states", "teacher.mode=auto")
    _require_close(online, "states", "dskd")
    _run(online, world, "without", "loss.hidden_weight=0")
    _run(online, world, "cached", "loss.hidden_weight=0", "teacher.mode=cached", "annotation.store=[]")
    (tags,) = (run.tags for run in read_runs(load_config(online)) if run.name == "cached")
    assert tags["teacher_source"] == "top_n"
    _require_close(online, "cached", "without", terms=("ce", "kl", "sense"), rel=1e-3)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(online, world):
    config = _run(online, world, "resumed", "teacher.mode=auto")
    undisturbed = _weights(config)
    shutil.rmtree(checkpoint.latest(config).path)  # as if the run had stopped after step 2
    _run(online, world, "resumed", "teacher.mode=auto", resume=True)
    for name, tensor in _weights(config).items():
        assert torch.equal(tensor, undisturbed[name]), name
    with pytest.raises(UserError, match=r"loss\.position_share: 0\.35 then, 1\.0 now"):
        _run(online, world, "resumed", "loss.position_share=1", resume=True)


def test_the_head_computes_at_the_drawn_positions_alone(online, world, monkeypatch):
    """Of all targets of a step, the share; each step draws others."""
    seen = []
    original = DistillationHead.positions

    def record(self, loss_mask):
        seen.append(original(self, loss_mask))
        return seen[-1]

    monkeypatch.setattr(DistillationHead, "positions", record)
    _run(online, world, "some", "teacher.mode=auto")
    some, seen[:] = [*seen], []
    _run(online, world, "all", "teacher.mode=auto", "loss.position_share=1")
    assert len(some) == len(seen) == 4
    for drawn, every in zip(some, seen, strict=True):
        assert set(drawn.tolist()) < set(every.tolist())
        assert abs(len(drawn) - SHARE * len(every)) <= 8  # one for each sequence
    assert all(set(one.tolist()) != set(other.tolist()) for one, other in pairwise(some))


def test_a_run_at_all_positions_has_the_recipe_that_it_had_before_there_was_the_key(online):
    assert "position_share" not in recipe(load_config(online, ["loss.position_share=1"])).config["loss"]
    assert recipe(load_config(online)).config["loss"]["position_share"] == SHARE
