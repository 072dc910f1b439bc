"""Requests to stop: ranks agree on a step, save and exit with 75; the run resumes as if it had not been stopped."""

import os
import signal
import time

import pytest
import torch
from rank_processes import finish, run_program, start_ranks, wait_for_checkpoint
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, TINY
from tracked_results import losses_of

from dskd.__main__ import main
from dskd.cli.program import run
from dskd.config.reading import load_config
from dskd.distributed import stopping
from dskd.errors import UserError
from dskd.tracking import read_runs
from dskd.training.checkpoints import checkpoint


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_request_stops_a_program_with_exit_code_75(handlers, number):
    def work():
        stopping.listen()
        os.kill(os.getpid(), number)
        time.sleep(30)

    assert run(work) == 75


def test_a_deferred_request_is_recorded_and_interrupts_nothing(handlers):
    stopping.listen()
    with stopping.deferred() as request:
        assert not request.is_pending
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_pending
    os.kill(os.getpid(), signal.SIGTERM)  # senders repeat requests: this one must not interrupt the code that follows


def test_without_a_request_the_handlers_are_restored(handlers):
    stopping.listen()
    with stopping.deferred():
        pass
    with pytest.raises(stopping.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("is_main", [True, False])
def test_a_launcher_that_ends_a_rank_does_not_cut_off_its_message(handlers, monkeypatch, capsys, is_main):
    """TERM and USR1 arrive at once, as from a batch script, while the rank prints its message or waits for rank 0."""

    def asked():
        for number in stopping.SIGNALS:
            os.kill(os.getpid(), number)
        return is_main

    def work():
        stopping.listen()
        raise UserError("bad input")

    monkeypatch.setattr("dskd.cli.program.is_main_process", asked)
    assert run(work) == 2
    assert capsys.readouterr().err.count("bad input") == is_main  # only rank 0 prints it


def test_requests_after_the_first_are_ignored(handlers):
    stopping.listen()
    with pytest.raises(stopping.Stopped, match="at a good place"), stopping.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        raise stopping.Stopped("at a good place")
    for number in stopping.SIGNALS:
        os.kill(os.getpid(), number)


def _status(monkeypatch, config):
    monkeypatch.setattr("sys.argv", ["dskd", "status", "--config", str(config)])
    return main()


@pytest.mark.slow
def test_ranks_that_get_the_request_at_different_times_stop_after_the_same_step_and_resume(
    tiny, copy_of_tiny, monkeypatch, capsys
):
    # `tiny`, which nothing disturbs, has one worker and a checkpoint every 3 steps.
    config = copy_of_tiny(*BEFORE_TRAINING, train={**TINY["train"], "checkpoint_every": 2, "num_workers": 2})
    loaded = load_config(config)
    assert _status(monkeypatch, config) == 3
    ranks = start_ranks("train.py", config, ranks=2)
    try:
        wait_for_checkpoint(loaded)
        # As with a scheduler, all processes of a rank get the signal, including its loader's workers.
        os.killpg(ranks[1].pid, signal.SIGUSR1)
        time.sleep(0.1)
        os.killpg(ranks[0].pid, signal.SIGTERM)
        assert finish(ranks, 60, check=False).exit_code == 75
        assert [rank.wait(1) for rank in ranks] == [75, 75]
    finally:
        for rank in ranks:
            rank.kill()
    stopped_at = checkpoint.latest(loaded).step
    assert 2 <= stopped_at < 6
    assert f"stopped at step {stopped_at} of 6" in ranks[0].output
    assert _status(monkeypatch, config) == 3
    assert f"step {stopped_at} of 6" in capsys.readouterr().out
    assert [one.status for one in read_runs(loaded) if one.name == loaded.run] == ["KILLED"]

    run_program("train.py", config, "--resume", ranks=2)
    assert _status(monkeypatch, config) == 0
    assert losses_of(config) == losses_of(tiny)
    resumed, undisturbed = (
        load_file(checkpoint.latest(load_config(path)).path / checkpoint.TRAINED_FILE) for path in (config, tiny)
    )
    assert resumed.keys() == undisturbed.keys()
    for name, tensor in resumed.items():
        assert torch.equal(tensor, undisturbed[name]), name
