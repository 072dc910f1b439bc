"""The batch scripts of `cluster/slurm/` on a real SLURM: two nodes with two ranks each.

Preemptions, warnings and killed launchers must not change the losses of a run.
"""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_lab.site import JOB_S, Site
from cluster_lab.slurm import PREEMPTOR_PARTITION
from repository import REPOSITORY
from tiny_work import BEFORE_TRAINING, TINY, copy_work

from dskd.config.reading import load_config
from dskd.shards.annotate import annotate

pytestmark = pytest.mark.cluster

STEPS = 60


@pytest.fixture(scope="module")
def site(slurm, tiny, world, tmp_path_factory):
    """Two nodes, and a work directory whose shards have the teacher's states."""
    folder = tmp_path_factory.mktemp("site")
    settings = {**TINY["train"], "steps": STEPS, "checkpoint_every": 10, "collective_timeout_s": 60}
    annotation = {**TINY["annotation"], "store": ["teacher_states", "trunk_states"]}
    config = copy_work(tiny, folder, *BEFORE_TRAINING, train=settings, annotation=annotation)
    annotate(load_config(config), world)
    yield Site(slurm, folder, config)
    slurm.cancel_all()


@pytest.fixture(scope="module")
def undisturbed(site):
    """The losses of an undisturbed run."""
    job = site.submit("run=undisturbed", env="DSKD_PREFLIGHT=1")
    shown = site.wait(job, "COMPLETED")
    assert "preflight: all checks passed" in site.log(job)
    assert shown["Restarts"] == "0", site.log(job)
    (run,) = site.runs("undisturbed")
    assert (run.status, run.tags["world_size"]) == ("FINISHED", "4")
    facts = {name: text for name, text in run.tags.items() if name.startswith("job.")}
    assert facts == {"job.scheduler": "slurm", "job.id": str(job), "job.name": "dskd-train"}
    assert "finished, step 60 of 60" in site.log(job)
    assert "training reads the teacher's states from the shards" in site.log(job)
    return site.losses("undisturbed")


def test_a_submitted_run_is_trained_on_all_ranks_of_both_nodes(undisturbed):
    assert [step for step, _ in undisturbed] == list(range(1, STEPS + 1))
    assert undisturbed[-1][1] < undisturbed[0][1]


def test_a_preempted_run_resumes_and_ends_like_an_undisturbed_one(site, undisturbed):
    job = site.submit("run=preempted")
    site.wait_for_checkpoint(job, "preempted")
    other = site.folder / "other.sbatch"
    other.write_text("#!/bin/sh\nsleep 1\n")
    options = [f"--partition={PREEMPTOR_PARTITION}", "--nodes=2", "--exclusive", f"--output={site.folder}/%j.log"]
    preemptor = site.slurm.submit(other, options=options)
    site.wait(preemptor, "COMPLETED")
    stopped_at = site.wait_for_checkpoint(job, "preempted")
    assert f"stopped at step {stopped_at} of {STEPS}" in site.log(job)
    assert "User defined signal" not in site.log(job)
    assert [run.status for run in site.runs("preempted")] == ["KILLED"]

    shown = site.wait(job, "COMPLETED")
    assert shown["Restarts"] == "1", site.log(job)
    assert f"from step {stopped_at}" in site.log(job)
    (run,) = site.runs("preempted")
    assert f"id {job}, name dskd-train, restart 1" in run.tags["restart.1"]
    assert site.losses("preempted") == undisturbed


def test_a_warning_and_a_killed_launcher_cost_steps_and_change_nothing(site, undisturbed):
    job = site.submit("run=disturbed", env="DSKD_RETRIES=1")
    site.wait_for_checkpoint(job, "disturbed")
    # SLURM's warning before a job's time is up: only the shell of the batch script gets it.
    site.slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    site.wait_for_attempt(job, 1)
    stopped_at = site.wait_for_checkpoint(job, "disturbed")
    assert f"stopped at step {stopped_at} of {STEPS}" in site.log(job)
    assert not (site.folder / f"job-{job}" / "faults").exists()

    site.wait_for_checkpoint(job, "disturbed", stopped_at + 10)
    lab = site.slurm.lab
    launcher = lab.run("node2", "pgrep", "-f", r"deepspeed\.launcher\.launch")
    lab.run("node2", "kill", "-KILL", *launcher.split())
    site.wait_for_attempt(job, 2)
    faults = (site.folder / f"job-{job}" / "faults").read_text().splitlines()
    assert len(faults) == 1
    site.wait(job, "COMPLETED")
    assert site.losses("disturbed") == undisturbed


def test_a_users_mistake_fails_the_job_and_is_not_retried(site):
    job = site.submit("run=mistaken", "student.layers=99")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "2:0")
    log = site.log(job)
    assert log.count("the student cannot keep 99") == 1
    assert "Traceback" not in log


def test_a_node_has_one_rank_for_each_requested_gpu(site):
    """The job takes whole nodes, and its batch script sees both GPUs of a node; ranks see those of their step."""
    environment = site.stand_in("counting", 'sed "s/^/listed /" "$2"; echo "sees $CUDA_VISIBLE_DEVICES"; exit 2')
    for options, seen, slots in ((["--gpus-per-node=1"], "0", 1), (["--gres=gpu:2"], "0,1", 2), ([], "", 1)):
        job = site.submit("run=counting", env=f"DSKD_VENV={environment}", gpus=options)
        site.wait(job, "FAILED")
        assert set(re.findall(r"sees (.*)", site.log(job))) == {seen}
        listed = re.findall(r"listed (.*)", site.log(job))
        assert set(listed) == {f"{node} slots={slots}" for node in ("node1", "node2")}


def test_a_container_that_starts_in_another_folder_runs_the_clones_programs(site):
    """Like a container of Pyxis, whose image may have another version of the package."""
    environment = site.stand_in("elsewhere", 'echo "in $PWD, imports from ${PYTHONPATH%%:*}"; exit 2')
    job = site.submit("run=elsewhere", env=f"DSKD_VENV={environment} DSKD_CONTAINER=(env --chdir=/)")
    site.wait(job, "FAILED")
    assert site.log(job).count(f"in /, imports from {REPOSITORY}\n") == 2


def test_programs_get_the_facts_about_the_job(site):
    environment = site.stand_in("facts", 'env | grep ^DSKD_JOB_; [ -z "$DSKD_JOB_RESTART" ] || exit 2; exit 1')
    job = site.submit("run=facts", env=f"DSKD_RETRIES=1\nDSKD_VENV={environment}")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("1", "2:0"), site.log(job)
    for fact in ("SCHEDULER=slurm", f"ID={job}", "NAME=dskd-train"):
        assert site.log(job).count(f"DSKD_JOB_{fact}\n") == 4  # two nodes, two attempts
    assert site.log(job).count("DSKD_JOB_RESTART=\n") == site.log(job).count("DSKD_JOB_RESTART=1\n") == 2


def test_a_step_that_reaches_no_node_is_a_fault(site):
    job = site.submit("run=nowhere", env="DSKD_RETRIES=1\nDSKD_SRUN_OPTIONS=(--nodelist=node9)")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("1", "1:0")
    assert "fault 1 of at most 1" in site.log(job)
    assert "fault 2 without progress, no more retries" in site.log(job)


def test_faults_without_progress_are_retried_a_limited_number_of_times(site, tiny):
    """The first step fails on one node each time, in the first two attempts with a newer checkpoint than before."""
    work = Path(yaml.safe_load(tiny.read_text())["workdir"])
    kept = sorted((work / "checkpoints" / TINY["run"]).glob("step-*"))
    assert len(kept) >= 2
    runs = site.folder / "work" / "checkpoints"
    environment = site.stand_in(
        "faulty",
        f"""[ "$SLURM_NODEID-$SLURM_RESTART_COUNT" = 0-2 ] && exec sleep 600  # it is ended with the other one
        [ "$SLURM_NODEID" = 0 ] && exit 0
        mkdir -p {runs}/faulty
        case ${{SLURM_RESTART_COUNT:-0}} in
            0) cp -r {kept[-2]} {runs}/faulty/ ;;
            1) cp -r {kept[-1]} {runs}/faulty/ ;;
        esac
        exit 1""",
    )
    job = site.submit("run=faulty", env=f"DSKD_RETRIES=1 DSKD_VENV={environment}")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("2", "1:0"), site.log(job)
    attempts = re.findall(r"attempt (\d): .*; (fault \d [^;]*)", site.log(job))
    assert attempts[:2] == [("0", "fault 1 of at most 1"), ("1", "fault 1 of at most 1")]
    assert attempts[2:] == [("2", "fault 2 without progress, no more retries (DSKD_RETRIES=1)")]
    assert len((site.folder / f"job-{job}" / "faults").read_text().splitlines()) == 2


def test_a_node_that_ends_without_an_exit_code_is_a_fault(site):
    """Like a node whose memory is full. srun then stops the other node, although nobody requested a stop."""
    ready = site.folder / "ready"
    environment = site.stand_in(
        "killed",
        f"""[ "$SLURM_NODEID" = 0 ] && {_stops_when_asked(f'open("{ready}", "w")')}
        until [ -e {ready} ]; do sleep 0.1; done
        kill -KILL $PPID $$""",
    )
    job = site.submit("run=killed", env=f"DSKD_RETRIES=0 DSKD_VENV={environment}")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "1:0"), site.log(job)
    assert "step 1 ended with 137 (codes of the nodes: 75); fault 1" in site.log(job)


def test_a_mistake_is_recognized_even_if_nodes_cannot_report_it(site):
    environment = site.stand_in("mute", 'rm -r "${2%/*}"/exits-*; exit 2')
    job = site.submit("run=mute", env=f"DSKD_VENV={environment}")
    shown = site.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "2:0"), site.log(job)


def test_a_warning_before_the_ranks_are_started_is_not_lost(site):
    """The request comes from the user's prolog, which srun runs before its tasks."""
    environment = site.stand_in("warned", _stops_when_asked())
    prolog = environment / "prolog"
    prolog.write_text("#!/bin/bash\nscancel --batch --signal=USR1 $SLURM_JOB_ID\nsleep 3\n")
    prolog.chmod(0o755)
    job = site.submit("run=warned", env=f"DSKD_SRUN_OPTIONS=(--prolog={prolog}) DSKD_VENV={environment}")
    site.wait_for_line(job, "stopped, and saved")
    site.slurm.cancel_all()


def _stops_when_asked(first: str = "") -> str:
    """Returns a shell line: a program that runs `first` and then waits for a request to stop."""
    lines = f"import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n{first}\nsignal.pause()"
    return f"exec {sys.executable} -c '{lines}'"


def test_a_dead_node_is_not_a_fault(site):
    """The other node's ranks fail because of it.

    The first time its part is done, and it only stops responding to SLURM. The second time it dies in the middle,
    and SLURM itself ends and requeues the job.
    """
    slurm = site.slurm
    fails = site.folder / "fails"
    environment = site.stand_in(
        "orphaned",
        f"""echo "begun ${{SLURM_RESTART_COUNT:-0}}"
        [ "${{SLURM_RESTART_COUNT:-0}}$SLURM_NODEID" != 01 ] || exit 0
        until [ -e {fails} ]; do sleep 0.2; done
        exit 1""",
    )
    job = site.submit("run=orphaned", env=f"DSKD_RETRIES=0 DSKD_VENV={environment}")
    site.until(lambda: (site.folder / f"job-{job}" / "exits-0-1" / "1").exists(), job)
    with site.dead("node2"):
        # Tell SLURM what it would find out after SlurmdTimeout.
        slurm.run("scontrol", "update", "nodename=node2", "state=noresp")
        fails.touch()
        # Either the script or SLURM is the first to notice that the node is gone.
        seen = ("not counted as a fault, because SLURM has lost node2", "DUE TO NODE FAILURE")
        site.until(lambda: any(text in site.log(job) for text in seen), job)
        fails.unlink()
    site.wait_for_line(job, "begun 1", 2)
    with site.dead("node2"):
        failures = site.log(job).count("DUE TO NODE FAILURE")
        slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=dead")
        site.wait_for_line(job, "DUE TO NODE FAILURE", failures + 1)
    site.wait_for_line(job, "begun 2", 2)
    assert not (site.folder / f"job-{job}" / "faults").exists()
    slurm.cancel_all()


def test_a_job_is_requeued_when_its_time_is_over_but_not_when_it_is_cancelled(site):
    """First its ranks are killed before they have saved; when it is cancelled, they end on request."""
    on_usr1 = "lambda *_: sys.exit(75) if attempt == '1' else None"
    program = f"""import os, signal, sys, time
attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
signal.signal(signal.SIGUSR1, {on_usr1})
print("begun", attempt, flush=True)
time.sleep(600)
"""
    environment = site.stand_in("quick", f"exec python -c '{program}'".replace("'1'", '"1"'))
    job = site.submit("run=cancelled", env=f"DSKD_VENV={environment}")
    site.wait_for_line(job, "begun 0", 2)
    site.slurm.run("scontrol", "update", f"jobid={job}", "timelimit=5", "endtime=now+1seconds")
    site.wait_for_line(job, "begun 1", 2)  # SLURM checks the time every 30 s
    assert "DUE TO TIME LIMIT" in site.log(job)
    site.slurm.run("scancel", str(job))
    site.wait(job, "CANCELLED")
    time.sleep(8)  # a requeued job would be back after 6 s
    shown = site.slurm.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "1"), site.log(job)
    assert "SLURM ends this job or requeues it itself" in site.log(job)


def test_the_pipeline_is_a_chain_of_jobs(site):
    work = site.folder / "pipeline"
    for artifact in ("corpus", "lexicon", "teacher"):
        shutil.copytree(site.folder / "work" / artifact, work / artifact)
    file = site.write_env(f"DSKD_OVERRIDES=(workdir={work} train.steps=2)")
    text = site.config.read_text().replace("run: dskd", "")
    site.config.write_text(f"{text}\nruns: {{one: {{loss: {{sense_weight: 0.5, min_relations: 3}}}}, two: {{}}}}\n")
    script = str(REPOSITORY / "cluster" / "slurm" / "submit.sh")
    printed = site.slurm.run("env", f"DSKD_ENV={file}", f"PYTHONPATH={REPOSITORY}", script, "pipeline")
    jobs = dict(reversed(line.split()) for line in printed.splitlines())
    assert list(jobs) == ["prepare", "senses", "annotate", "train-one", "train-two", "evaluate"]
    for name, job in jobs.items():
        shown = site.slurm.wait(int(job), JOB_S)
        log = (site.folder / f"dskd-{name}-{job}.log").read_text(errors="replace")
        assert shown["JobState"] == "COMPLETED", log
    for run in ("one", "two"):
        assert re.search(rf"^{run}  +[\d,.]+  +0\.\d+", log, re.MULTILINE), log
    assert "tasks.evaluate is empty" in log
    shards = yaml.safe_load((work / "shards" / "train" / "manifest.json").read_text())
    assert shards["kind"] == "shards"


def test_a_stage_whose_predecessor_fails_is_cancelled(site):
    # A mistake that only the first stage finds: submit.sh has checked the config itself.
    file = site.write_env(
        f"DSKD_OVERRIDES=(workdir={site.folder}/elsewhere 'corpus.train=[{site.folder}/nowhere.txt]')"
    )
    script = str(REPOSITORY / "cluster" / "slurm" / "submit.sh")
    printed = site.slurm.run("env", f"DSKD_ENV={file}", f"PYTHONPATH={REPOSITORY}", script, "pipeline")
    prepare, *others = (int(line.split()[0]) for line in printed.splitlines())
    assert site.slurm.wait(prepare, JOB_S)["ExitCode"] == "2:0"
    for job in others:
        assert site.slurm.wait(job, JOB_S)["JobState"] == "CANCELLED"
