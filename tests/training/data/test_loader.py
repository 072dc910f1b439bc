"""The loader of training on real shards: any number of workers, any first step, packing, and copying ahead."""

import contextlib
import os
import select
import signal
import time

import numpy as np
import pytest
import torch
from artifact_folders import open_dataset
from loaded_steps import ROWS, SAMPLES, SCHEDULE, config_of, steps_of, write_shards

from dskd import shards
from dskd.artifacts.tensor_file import map_tensor
from dskd.errors import UserError
from dskd.shards import require_teacher_cache
from dskd.training.data.collator import Collator
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.loader import _steps_in
from dskd.training.data.packed_step import Buffers, Counts, CudaCopier, PackedStep, copy_ahead, count_positions
from dskd.training.data.positions import SensePositions
from dskd.training.data.sense_bank import copy_in_pieces, load_bank, require_room


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a work directory with shards of samples of many lengths, and the vectors of a sense dictionary."""
    folder = tmp_path_factory.mktemp("loader")
    write_shards(folder)
    return folder


def _sample_ids(step):
    return [batch["sample_ids"].tolist() for batch in step.micro_batches]


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """Returns the samples of each step, read without worker processes."""
    return [_sample_ids(step) for step in steps_of(folder, tmp_path_factory.mktemp("whole"))]


def test_an_epoch_has_each_sample_at_most_once(whole_run):
    assert len(whole_run) == SCHEDULE.total_steps
    flat = [[i for batch in step for i in batch] for step in whole_run]
    assert all(len(step) == SCHEDULE.global_batch_size for step in flat)
    for epoch in (flat[:5], flat[5:10], flat[10:]):
        seen = [i for step in epoch for i in step]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(SAMPLES))
    assert flat[:5] != flat[5:10]


# 5, 4 and 3 steps of an epoch do not divide evenly among the workers, and the 13th step is within an epoch.
@pytest.mark.parametrize(("workers", "start"), [(1, 0), (2, 0), (3, 1), (2, 5), (2, 12), (0, 7)])
def test_any_number_of_workers_and_any_start_give_the_same_steps(folder, tmp_path, whole_run, workers, start):
    steps = steps_of(folder, tmp_path, workers, start)
    assert [_sample_ids(step) for step in steps] == whole_run[start:]


def test_sense_positions_follow_the_epoch_in_workers_that_live_through_several(folder, tmp_path):
    rule = SensePositions(1, 0.3, 0)
    collate = Collator(None, rule, micro_batch_size=8)
    drawn = {}
    for number, step in enumerate(steps_of(folder, tmp_path, 2, collate=collate)):
        (batch,) = step.micro_batches
        for name in ("relation_positions", "own_positions"):
            row, place = np.divmod(batch["senses"][name].numpy(), batch["input_ids"].shape[1])
            for index, sample_id in enumerate(batch["sample_ids"].tolist()):
                key = (number // SCHEDULE.steps_per_epoch, sample_id)
                drawn.setdefault(key, {})[name] = place[row == index].tolist()
    samples = _samples(folder, tmp_path / "again")
    assert len({epoch for epoch, _ in drawn}) == 3
    for (epoch, sample_id), positions in drawn.items():
        relation, own = rule.draw(samples[sample_id], sample_id, epoch)
        assert positions == {"relation_positions": relation.tolist(), "own_positions": own.tolist()}


@pytest.mark.parametrize(("workers", "start"), [(2, 0), (3, 7)])
def test_random_candidates_depend_on_the_step_and_not_on_the_worker(folder, tmp_path, workers, start):
    candidates = CandidateRows(seed=5, kinds=("own", "random"), num_random=6, num_rows=ROWS)
    collate = Collator(None, SensePositions(1, 0.3, 0), micro_batch_size=2, candidates=candidates, lexical=True)
    steps = list(steps_of(folder, tmp_path, workers, start, collate=collate))
    assert len(steps) == SCHEDULE.total_steps - start
    for number, step in enumerate(steps, start):
        for batch in step.micro_batches:
            assert batch["senses"]["random_rows"].tolist() == candidates.draw(number).tolist()
        positions = sum(len(batch["senses"]["positions"]) for batch in step.micro_batches)
        targets = sum(int(batch["loss_mask"].sum()) for batch in step.micro_batches)
        assert step.counts == (targets, positions, 0, targets, targets)  # all of these targets have synonyms


def _samples(folder, cache):
    dataset = open_dataset(folder / "shards" / "train", cache)
    return [dataset[index] for index in range(SAMPLES)]


def test_a_bank_gives_the_batches_the_rows_that_they_would_bring(folder, tmp_path):
    rule, path = SensePositions(1, 0.3, 0), folder / "senses.safetensors"
    bank = load_bank(path, torch.device("cpu"))
    on_host = steps_of(folder, tmp_path / "host", 1, collate=Collator(path, rule, micro_batch_size=2))
    on_device = steps_of(folder, tmp_path / "bank", collate=Collator(None, rule, micro_batch_size=2), sense_bank=bank)
    for host, device in zip(on_host, on_device, strict=True):
        assert host.counts == device.counts
        for brought, banked in zip(host.micro_batches, device.micro_batches, strict=True):
            one, other = brought["senses"], banked["senses"]
            assert other["sense_rows"].data_ptr() == bank.data_ptr()
            for index in ("synonym_rows", "antonym_rows", "own_rows"):
                assert one["sense_rows"][one[index]].equal(other["sense_rows"][other[index]])


def test_a_bank_holds_all_vectors_for_any_size_of_pieces(folder):
    path = folder / "senses.safetensors"
    vectors = map_tensor(path, "vectors", "BF16")
    mapped = load_bank(path, torch.device("cpu"))
    assert mapped.dtype == torch.bfloat16
    assert np.array_equal(mapped.view(torch.int16).numpy().view(np.uint16), vectors)
    for piece_bytes in (1, 8 * 7, 2**20):  # a row has 8 bytes, and 7 rows leave 2 at the end
        bank = copy_in_pieces(vectors, torch.zeros(ROWS, 4, dtype=torch.bfloat16), piece_bytes)
        assert bank.equal(mapped)


def test_a_bank_that_does_not_fit_is_refused_with_both_sizes(folder):
    require_room(folder, 10, 10)
    with pytest.raises(
        UserError, match=r"need 10\.00 GB, but the device has only 4\.50 GB free; set train\.sense_bank to host"
    ):
        require_room(folder, 10 * 2**30, 9 * 2**29)


def test_a_packed_step_unpacks_to_the_same_step(folder):
    batches = [
        {
            "input_ids": torch.randint(0, 9, (2, 5)).t(),  # not contiguous
            "loss_mask": torch.rand(2, 5) < 0.5,
            "sample_ids": torch.tensor([7, 8]),
            "senses": {"sense_rows": torch.randn(3, 5).bfloat16(), "none": torch.empty(0, 2, dtype=torch.int64)},
            "teacher_cache": {"logprobs": torch.randn(2, 5, 3).half(), "rest_logprob": torch.randn(2, 5)},
        },
        {"loss_mask": torch.ones(1, 3, dtype=torch.bool), "sample_ids": torch.tensor([2])},
    ]
    batches[0]["senses"] |= {"relation_positions": torch.arange(3), "own_positions": torch.arange(2)}
    step = PackedStep.of(batches).unpack()
    targets = int(batches[0]["loss_mask"].sum()) + 3
    assert step.counts == (targets, 5, 3, 0, targets)

    def same(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return one.dtype == other.dtype and one.equal(other)

    assert all(same(batch, unpacked) for batch, unpacked in zip(batches, step.micro_batches, strict=True))


def test_a_buffer_is_used_again_only_when_no_tensor_refers_to_it():
    buffers = Buffers(pinned=False)
    first = buffers.take(1000)
    place, part = first.data_ptr(), first[100:200].view(torch.float32)
    del first
    second = buffers.take(500)
    part.fill_(1)
    second.fill_(0)
    assert part.sum() == 25
    del part
    third = buffers.take(900)
    assert third.data_ptr() == place
    assert len(third) == 900


def test_padding_is_never_counted(folder, tmp_path):
    samples = _samples(folder, tmp_path / "again")
    for step in steps_of(folder, tmp_path / "steps", 2, start_step=9):
        ids = [i for batch in step.micro_batches for i in batch["sample_ids"].tolist()]
        targets = sum(int(samples[i]["loss_mask"].sum()) for i in ids)
        assert step.counts == (targets, 0, 0, 0, targets)
        assert count_positions(step.micro_batches) == step.counts


def test_a_worker_that_is_killed_ends_the_run_with_an_error(folder, tmp_path):
    collate = Collator(None, None, micro_batch_size=2)
    steps_read = []

    def die_in_the_third_step(samples):
        steps_read.append(len(samples))
        if len(steps_read) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(samples)

    with pytest.raises(RuntimeError, match=r"worker.* (exited unexpectedly|is killed by signal)"):
        list(steps_of(folder, tmp_path, 1, collate=die_in_the_third_step))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_step_is_reported_as_any_other(error, tmp_path):
    class Loader:
        def __iter__(self):
            yield from ()
            raise error

    with pytest.raises(RuntimeError, match="worker exited unexpectedly"):
        list(_steps_in(Loader(), None, tmp_path))


def test_the_next_step_is_copied_while_one_runs():
    calls = []

    class Recorded:
        def start(self, step):
            calls.append(f"start {step}")
            return step

        def finish(self, started):
            calls.append(f"finish {started}")
            return started

    for step in copy_ahead(iter("abc"), Recorded()):
        calls.append(f"run {step}")
    expected = "start a, start b, finish a, run a, start c, finish b, run b, finish c, run c"
    assert calls == expected.split(", ")
    assert list(copy_ahead(iter(""), Recorded())) == []


def test_the_stream_that_uses_a_copy_waits_for_it_and_keeps_its_memory(monkeypatch):
    """Checks the order of calls only, because there may be no GPU."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            calls.append(f"event on {self.name}")
            return f"event of {self.name}"

        def wait_event(self, event):
            calls.append(f"{self.name} waits for {event}")

    class Buffer:
        def to(self, device, non_blocking):
            assert non_blocking
            calls.append("copy")
            return self

        def record_stream(self, stream):
            calls.append(f"memory is used on {stream.name}")

    @contextlib.contextmanager
    def on(stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    copier = CudaCopier(torch.device("cuda", 0))
    started = copier.start(PackedStep(Buffer(), [], [], Counts(0, 0, 0, 0, 0), [], 0))
    assert calls == ["on side", "copy", "off side", "event on side"]
    calls.clear()
    copier.finish(started)
    assert calls == ["main waits for event of side", "memory is used on main"]


def test_shards_without_the_teachers_distributions_are_refused(folder):
    class Shards:
        config = {"kappa": 5, "teacher_top_n": 0}
        facts = {}

    config = config_of(folder, annotation={"teacher_top_n": 4})
    with pytest.raises(
        UserError,
        match=r"hold nothing of the teacher; .* the most probable tokens for loss.kd_weight 0.7; make.*annotate.py",
    ):
        require_teacher_cache(config, "train", Shards())
    Shards.config = {"teacher_top_n": 4}
    require_teacher_cache(config, "train", Shards())


def test_workers_end_with_a_rank_that_is_killed_wherever_they_wait(folder, tmp_path, monkeypatch):
    """At the start of an epoch mosaicml-streaming waits for other ranks' workers, whatever else happens."""
    read, write = os.pipe()

    class Waiting:
        shuffle_seed = 0
        folder = None

        def load_state_dict(self, state):
            pass

        def __iter__(self):
            os.write(write, b".")
            time.sleep(60)
            yield {}

    monkeypatch.setattr(shards, "open_shards", lambda *arguments, **options: Waiting())
    rank = os.fork()
    if rank == 0:
        try:
            next(steps_of(folder, tmp_path, 1))
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"."  # the worker waits
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    end = select.poll()  # unlike select, it takes any number of open files
    end.register(read)
    assert end.poll(20_000)  # the last process that inherited the pipe's other end has closed it
    assert os.read(read, 1) == b""
    os.close(read)
