"""The smallest change that makes a job fit: it is one that does, and nothing smaller is."""

import json
import re
import shlex

import pytest
from config_files import write_config
from plans import LLAMA, MACHINES, SMALL, cluster_of, config_of, shapes_file

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.plan.architecture import Architecture
from dskd.plan.changes import Change, candidates, smallest_change
from dskd.plan.plan import make_plan
from dskd.plan.stored import loads_teacher
from dskd.shards import TEACHER_STATES


def test_a_job_that_does_not_fit_is_refused_with_a_change_that_makes_it_fit(tmp_path, dskd):
    # A vocabulary that makes the teacher the largest part: 2 · 200,000 · 256 elements in float32 and more.
    shapes = shapes_file(tmp_path, vocab_size=200_000, hidden_size=256, num_hidden_layers=4)
    config = tmp_path / "config.yaml"
    write_config(config, {"workdir": str(tmp_path), "teacher": {"path": "a/b", "mode": "resident"}})
    options = ["--config", config, "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 4, "--host-memory", 200]
    settings = ["student.layers=2", "corpus.sequence_length=256", "train.micro_batch_size=4"]
    code, printed, _ = dskd("plan", *options, "--gpu-memory", 80, *settings)
    assert code == 0 and printed.rstrip().endswith("fits")
    stages = re.findall(r"^(?:peak, in .*|gathering states|annotation) +([\d.]+) +[\d.]+$", printed, flags=re.MULTILINE)
    assert len(stages) == 3
    needed = max(map(float, stages))
    code, printed, _ = dskd("plan", *options, "--gpu-memory", needed - 0.05, *settings)
    assert code == 3
    change = re.search(r"The smallest change that fits: (.*)", printed).group(1)
    code, printed, _ = dskd("plan", *options, "--gpu-memory", needed - 0.05, *settings, *shlex.split(change))
    assert code == 0, printed


def test_a_stage_before_training_that_does_not_fit_is_refused_until_it_is_done(tmp_path, dskd):
    """Annotation reads more texts at once than training, and also holds the teacher's output matrix."""
    shapes = shapes_file(tmp_path, vocab_size=200_000, hidden_size=256)
    config = tmp_path / "config.yaml"
    write_config(config, {"workdir": str(tmp_path / "work"), "teacher": {"path": "a/b", "mode": "zero3"}})
    options = ["--config", config, "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 2, "--host-memory", 200]
    options += ["student.layers=2", "student.train_layers=1", "annotation.batch_size=64", "senses.batch_size=1"]
    options += ["train.global_batch_size=2"]
    code, printed, _ = dskd("plan", *options, "--gpu-memory", 80)
    training, annotation = (
        float(re.search(rf"^{name}.* +([\d.]+) +[\d.]+$", printed, flags=re.MULTILINE).group(1))
        for name in ("peak, in", "annotation")
    )
    assert code == 0 and training < annotation - 0.1
    options += ["--gpu-memory", annotation - 0.05]
    code, printed, _ = dskd("plan", *options)
    assert code == 3 and f"for annotation each GPU needs {annotation:g} GB" in printed
    change = re.search(r"The smallest change that fits: (.*)", printed).group(1)
    assert change.startswith("annotation.")
    assert dskd("plan", *options, change)[0] == 0
    with build_artifact(tmp_path / "work" / "shards" / "train", Recipe("shards", {}, {})) as building:
        building.facts["samples"] = 64
    code, printed, _ = dskd("plan", *options)
    assert code == 0 and "the shards exist" in printed


def test_the_speed_of_a_change_is_that_of_the_plan_with_it(tmp_path, dskd):
    """Several nodes communicate over another network than the GPUs of one."""
    shapes = shapes_file(tmp_path, vocab_size=100_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    config_of(tmp_path, mode="zero3")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 8]
    options += ["--host-memory", 500, "student.layers=3", "student.train_layers=3", "student.train_lm_head=true"]
    options += ["senses.memory_budget=0.01", "annotation.memory_budget=0.01", "senses.batch_size=1"]
    options += ["annotation.batch_size=1", "train.micro_batch_size=1", "train.loss_chunk_size=64"]
    options += ["train.activation_checkpointing=true", "train.global_batch_size=64", "teacher.offload=nvme"]
    options += ["teacher.nvme_path=/local", f"annotation.store=[{TEACHER_STATES}]", "teacher.mode=auto"]
    code, printed, _ = dskd("plan", *options, "--gpu-memory", 80)
    needed = float(re.search(r"peak, in .* +([\d.]+) +[\d.]+\n", printed).group(1))
    code, printed, _ = dskd("plan", *options, "--gpu-memory", needed - 0.02)
    assert code == 3
    nodes, speed = re.search(r"fits: --nodes (\d+)\n.* ([\d,]+) tokens/s are expected", printed).groups()
    options[options.index("--nodes") + 1] = nodes
    code, printed, _ = dskd("plan", *options, "--gpu-memory", needed - 0.02)
    assert code == 0
    assert re.search(rf"tokens/s of all ranks +{speed}$", printed, re.MULTILINE)


def _refused(tmp_path):
    """Returns a plan that does not fit, and one that does."""
    config = config_of(tmp_path, "train.global_batch_size=48")
    small, large = (
        make_plan(config, cluster_of(1, "cuda", memory), Architecture(json.dumps(LLAMA), "llama")) for memory in (1, 80)
    )
    assert (small.fits, large.fits) == (False, True)
    return small, large


@pytest.mark.parametrize("needed", [3, 4, 5, 65])
def test_the_smallest_number_of_nodes_that_fits_is_named(tmp_path, needed):
    small, large = _refused(tmp_path)

    def replan(change):
        if change.nodes is not None and change.nodes == 66:
            raise UserError("cannot be divided")
        return large if (change.nodes or 1) >= needed else small

    change, changed = smallest_change(small, replan)
    assert (change, changed) == (Change((), needed), large)


def test_only_settings_that_are_needed_are_named(tmp_path):
    small, large = _refused(tmp_path)
    needed = {"train.activation_checkpointing=true", "train.loss_chunk_size=64", "train.micro_batch_size=1"}
    change, _ = smallest_change(small, lambda change: large if needed <= set(change.overrides) else small)
    assert set(change.overrides) == needed
    assert smallest_change(small, lambda change: small) is None


def test_storing_the_teachers_states_is_proposed_with_its_bytes(tmp_path):
    config = config_of(tmp_path, "student.shared_trunk=on", "loss.hidden_weight=1", mode="resident")
    cluster = cluster_of(1, "cuda", 80)
    plan = make_plan(config, cluster, Architecture(json.dumps(LLAMA), "llama"), samples=2**20)
    (change,) = (change for change in candidates(plan) if "annotation.store" in change.text())
    assert change.text() == "teacher.mode=auto 'annotation.store=[teacher_states,trunk_states]'"
    changed = make_plan(
        load_config(tmp_path / "config.yaml", [*SMALL, "loss.hidden_weight=1", *change.overrides]),
        cluster,
        plan.architecture,
        samples=2**20,
    )
    assert not loads_teacher(changed.config)
    (cost,) = change.preparations(changed)
    assert (
        "annotated again" in cost and "2.00 GB of disk" in cost
    )  # 2**20 sequences · 16 tokens · 2 columns · 32 · 2 bytes


@pytest.mark.parametrize(
    ("override", "is_proposed"),
    [("loss.hidden_weight=0", True), ("loss.hidden_weight=1", False), ("loss.sense_form=distribution", False)],
)
def test_the_most_probable_tokens_are_proposed_only_if_no_term_reads_states(tmp_path, override, is_proposed):
    config = config_of(tmp_path, override, mode="resident")
    plan = make_plan(config, cluster_of(1, "cuda", 80), Architecture(json.dumps(LLAMA), "llama"))
    assert any("teacher.mode=cached" in change.overrides for change in candidates(plan)) == is_proposed


def test_a_host_that_is_too_small_is_not_a_reason_to_offload(tmp_path, dskd):
    config_of(tmp_path)
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", shapes_file(tmp_path), *MACHINES]
    code, printed, _ = dskd("plan", *options, "student.layers=2", "--host-memory", 1)
    assert code == 3 and "Offload: not needed" in printed
    assert "the processes of 2 ranks alone are assumed to need 4 GB" in printed
