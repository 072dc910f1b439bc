"""Pods with each manifest's own command and environment, on two hosts: to the end, and through disruptions."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_lab.hosts import SWITCH, Lab, why_not
from manifests import job_of, pods_of, render, verdict
from pods import PATH, Kubelet, give_to
from repository import REPOSITORY

from dskd.config.reading import load_config
from dskd.tracking import read_history, read_runs
from dskd.training.checkpoints import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOSTS = ("node1", "node2")
SMOKE = (REPOSITORY / "configs" / "smoke.yaml").read_text(encoding="utf-8")
STEPS = yaml.safe_load(SMOKE)["train"]["steps"]
STORED = "training reads the teacher's states from the shards"  # which the smoke test's config stores
USER = 10001
# The names that a cluster's DNS would have for the pods of each job and the services.
ALIASES = {
    HOSTS[0]: ["dskd-0.dskd", "dskd-node-0-0.dskd", "dskd-pipeline-0.dskd"],
    HOSTS[1]: ["dskd-1.dskd", "dskd-node-0-1.dskd"],
    SWITCH: ["dskd-mlflow", "store"],
}


@pytest.fixture(scope="module")
def cluster():
    """Hosts that know the names of pods and services."""
    if reason := why_not():
        pytest.skip(reason)
    lab = Lab(HOSTS, ALIASES)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def kubelet(cluster, tmp_path_factory):
    """A work volume with the artifacts of the smoke test's pipeline."""
    kubelet = Kubelet(cluster, tmp_path_factory.mktemp("volumes"))
    (pod,) = pods_of(render("overlays/cpu-smoke-test-pipeline"))
    running = kubelet.start(pod, HOSTS[0])
    assert running.wait(540) == 0, running.output
    made = {path.name for path in (kubelet.claim("dskd-work") / "work" / "smoke").iterdir()}
    assert {"shards", "student", "senses"} <= made
    assert "checkpoints" not in made
    return kubelet


@pytest.fixture(scope="module")
def undisturbed(kubelet):
    """(step, loss) of the smoke test's training on undisturbed pods."""
    pods = pods_of(render("overlays/cpu-smoke-test"))
    assert {pod.env["DSKD_PREFLIGHT"] for pod in pods} == {"1"}
    running = _start(kubelet, pods, preflight=True)
    assert _wait(running) == [0, 0], _output(running)
    assert "preflight: all checks passed" in running[0].output
    assert STORED in running[0].output
    for one in running:  # each pod checks the checkpoints
        assert f"run 'dskd': finished, step {STEPS} of {STEPS}" in one.output
    losses = _losses(kubelet, "dskd")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return losses


def _start(kubelet, pods, *arguments, preflight=False, **env):
    """Starts one pod per host, with arguments in addition to those of its manifest.

    The manifest's preflight is left out where it is not what the test is about: it starts all ranks once more.
    """
    env = env if preflight else {"DSKD_PREFLIGHT": "0", **env}
    return [kubelet.start(pod, host, *arguments, **env) for pod, host in zip(pods, HOSTS, strict=True)]


def _wait(running, timeout_s=240):
    return [one.wait(timeout_s) for one in running]


def _output(running):
    return "\n\n".join(one.output for one in running)


def _config(kubelet, run):
    config = load_config(REPOSITORY / "configs" / "smoke.yaml", [f"run={run}"])
    return config.model_copy(update={"workdir": str(kubelet.claim("dskd-work") / config.workdir)})


def _losses(kubelet, run):
    config = _config(kubelet, run)
    (tracked,) = [one for one in read_runs(config) if one.name == run]
    return read_history(config, tracked.run_id, "train/loss")


def _wait_for_step(kubelet, run, step, running):
    deadline = time.monotonic() + 240
    while (newest := checkpoint.latest(_config(kubelet, run))) is None or newest.step < step:
        assert all(one.poll() is None for one in running), _output(running)
        assert time.monotonic() < deadline, _output(running)
        time.sleep(0.05)


def _inner_launcher(pod):
    """Returns the process ID, on this machine, of the launcher that `deepspeed` has started in a pod."""
    namespace = Path(f"/proc/{pod.pid}/ns/pid").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"deepspeed.launcher.launch" in command and (process / "ns" / "pid").readlink() == namespace:
                return int(process.name)
        except OSError:  # it has just ended
            continue
    raise AssertionError(f"there is no launcher in the pod:\n{pod.output}")


def test_the_smoke_test_ends_well_and_belongs_to_the_pods_user(kubelet, undisturbed):
    work = kubelet.claim("dskd-work") / "work" / "smoke"
    assert {path.stat().st_uid for path in work.rglob("*")} == {USER}


def test_a_pod_that_starts_after_the_run_is_finished_ends_at_once(kubelet, undisturbed):
    pods = pods_of(render("overlays/cpu-smoke-test"))
    running = kubelet.start(pods[1], HOSTS[1])
    assert running.wait(60) == 0, running.output
    assert "deepspeed" not in running.output


def test_a_pod_can_write_only_to_its_volumes_and_has_no_capabilities(kubelet):
    pod = pods_of(render("overlays/cpu-smoke-test"))[0]
    looks = (
        "touch /opt/dskd/x /usr/x /x /etc/dskd/x; touch /data/x /scratch/x /tmp/x /dev/shm/x && echo written; "
        "id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; cat /proc/1/comm; df -k /dev/shm | tail -1"
    )
    running = kubelet.start_command(pod, HOSTS[0], "sh", "-c", looks)
    assert running.wait(30) == 0
    assert running.output.count("Read-only file system") == 4, running.output
    for part in ("written", f"{USER}\n", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"):
        assert part in running.output
    assert f" {2**20} " in running.output  # 1Gi of shared memory, in kB
    (kubelet.claim("dskd-work") / "x").unlink()


def test_stopped_and_killed_pods_are_replaced_and_the_losses_stay_the_same(kubelet, undisturbed):
    objects = render("overlays/cpu-smoke-test")
    pods, (_, spec) = pods_of(objects), job_of(objects)

    # One pod is preempted: all save and stop, and neither counts.
    running = _start(kubelet, pods, "run=disturbed")
    _wait_for_step(kubelet, "disturbed", 10, running)
    running[1].send_signal(signal.SIGTERM)
    codes = _wait(running, 60)
    assert codes == [75, 75], _output(running)
    assert [verdict(spec, codes[0]), verdict(spec, codes[1], disrupted=True)] == ["Ignore", "Ignore"]
    assert "entrypoint: stop requested" in running[1].output
    assert "entrypoint: stop requested" not in running[0].output
    stopped_at = checkpoint.latest(_config(kubelet, "disturbed")).step
    assert f"stopped at step {stopped_at} of {STEPS}" in running[0].output

    # A launcher is killed, as for lack of memory. `deepspeed` then returns 0, and its ranks would live on.
    running = _start(kubelet, pods, "run=disturbed")
    _wait_for_step(kubelet, "disturbed", min(stopped_at + 1, STEPS - 10), running)
    os.kill(_inner_launcher(running[0]), signal.SIGKILL)
    codes = _wait(running)
    assert "the launcher returned 0, but the run is not finished" in running[0].output
    assert [verdict(spec, code) for code in codes] == ["Count", "Count"], (codes, _output(running))

    running = _start(kubelet, pods, "run=disturbed")
    assert _wait(running) == [0, 0], _output(running)
    assert _losses(kubelet, "disturbed") == undisturbed


def test_a_pod_stops_even_if_asked_before_its_ranks_handle_signals(kubelet):
    pods = pods_of(render("overlays/cpu-smoke-test"))
    running = _start(kubelet, pods, "run=early", "train.collective_timeout_s=30")
    deadline = time.monotonic() + 60
    while "spawned with command" not in running[0].output and time.monotonic() < deadline:
        time.sleep(0.02)
    running[0].send_signal(signal.SIGTERM)  # the ranks have only just begun to import
    codes = _wait(running, 120)
    assert codes[0] == 75, _output(running)
    assert codes[1] not in (0, 2), _output(running)


def test_a_pipeline_stops_on_request(cluster, tmp_path):
    kubelet = Kubelet(cluster, tmp_path)
    (pod,) = pods_of(render("overlays/cpu-smoke-test-pipeline"))
    running = kubelet.start(pod, HOSTS[0])
    made = kubelet.claim("dskd-work") / "work" / "smoke" / "lexicon" / "manifest.json"
    deadline = time.monotonic() + 120
    while not made.exists():
        assert running.poll() is None and time.monotonic() < deadline, running.output
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 75, running.output
    assert "stopped on request; completed files are kept" in running.output


def test_a_users_mistake_fails_the_job(kubelet):
    objects = render("overlays/cpu-smoke-test")
    running = _start(kubelet, pods_of(objects), "train.stepz=3")
    codes = _wait(running, 120)
    assert [verdict(job_of(objects)[1], code) for code in codes] == ["FailJob", "FailJob"], _output(running)
    assert "train.stepz: unknown key; did you mean train.steps?" in running[0].output
    assert "Traceback" not in _output(running)


def test_a_jobset_trains_and_logs_to_the_mlflow_server_of_its_manifest(cluster, kubelet, undisturbed):
    (server,) = pods_of(render("mlflow"))
    serving = kubelet.start(server, SWITCH)
    try:
        _wait_for_server(cluster, serving)
        # The GPUs' manifest has eight ranks a node and a model of the Hub: here two hosts have two cores.
        small = kubelet.with_config("llama3-8b-16layers.yaml", SMOKE)
        running = _start(small, pods_of(render("overlays/jobset")), "run=jobset", DSKD_RANKS_PER_NODE="1")
        assert _wait(running) == [0, 0], _output(running)
        refused = _status_code(cluster, "http://ctl:5000/api/2.0/mlflow/experiments/search?max_results=1")
        assert refused == "403"  # a name that is not among --allowed-hosts
        taken = _status_code(cluster, "http://dskd-mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1")
        assert taken == "200"
        serving.send_signal(signal.SIGTERM)
        serving.wait(30)  # well within a pod's time to end
    finally:
        serving.send_signal(signal.SIGKILL)
    database = kubelet.claim("dskd-mlflow") / "mlflow.db"
    config = _config(kubelet, "jobset")
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{database}"})})
    (tracked,) = read_runs(config)
    assert (tracked.name, tracked.status) == ("jobset", "FINISHED")
    assert tracked.tags["job.scheduler"] == "kubernetes"
    assert tracked.tags["job.id"]
    assert tracked.tags["job.pod"]
    assert read_history(config, tracked.run_id, "train/loss") == undisturbed
    assert any((kubelet.claim("dskd-mlflow") / "artifacts").rglob("config.yaml"))


def test_the_mlflow_server_takes_its_database_from_the_secret(cluster, kubelet):
    secret = {"dskd-mlflow-database": {"url": "sqlite:////mlflow/of-the-secret.db"}}
    (server,) = pods_of(render("mlflow-database"), secret)
    serving = kubelet.start(server, SWITCH)
    try:
        _wait_for_server(cluster, serving)
    finally:
        serving.send_signal(signal.SIGKILL)
    assert (kubelet.claim("dskd-mlflow") / "of-the-secret.db").stat().st_size > 0


def _wait_for_server(cluster, serving):
    """Probes the server as the kubelet does, by the pod's address."""
    deadline = time.monotonic() + 120
    while _status_code(cluster, "http://10.77.0.254:5000/health") != "200":
        assert serving.poll() is None and time.monotonic() < deadline, serving.output
        time.sleep(0.5)


def _status_code(cluster, url):
    program = (
        "import sys, urllib.error, urllib.request\n"
        "try: print(urllib.request.urlopen(sys.argv[1], timeout=10).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "except OSError: print(0)"
    )
    return cluster.run(HOSTS[0], sys.executable, "-c", program, url).strip()


@pytest.fixture
def store(cluster):
    """Starts an object store on a host of its own and yields its address."""
    command = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000"]
    serving = cluster.start(SWITCH, command, {**os.environ, "PATH": PATH})
    deadline = time.monotonic() + 60
    while _status_code(cluster, "http://store:9000/") != "200":
        assert serving.poll() is None and time.monotonic() < deadline, serving.output
        time.sleep(0.5)
    yield "http://store:9000"
    serving.send_signal(signal.SIGKILL)


def _upload(cluster, folder: Path, bucket: str, prefix: str) -> None:
    """Uploads a folder from a host, because this process is not on the hosts' network."""
    program = (
        "import boto3, pathlib, sys\n"
        "folder, bucket, prefix = sys.argv[1:]\n"
        "s3 = boto3.client('s3', endpoint_url='http://store:9000', region_name='us-east-1', "
        "aws_access_key_id='a', aws_secret_access_key='b')\n"
        "s3.create_bucket(Bucket=bucket)\n"
        "for path in sorted(pathlib.Path(folder).rglob('*')):\n"
        "    if path.is_file(): s3.upload_file(str(path), bucket, f'{prefix}/{path.relative_to(folder)}')\n"
    )
    cluster.run(SWITCH, sys.executable, "-c", program, str(folder), bucket, prefix)


def test_shards_in_a_bucket_give_the_same_run_and_other_shards_are_refused(
    cluster, kubelet, undisturbed, store, tmp_path
):
    keys = {"access-key-id": "a", "secret-access-key": "b", "region": "us-east-1", "endpoint": store}
    objects = render("overlays/object-storage")
    pods = pods_of(objects, {"dskd-object-storage": keys})
    shards = kubelet.claim("dskd-work") / "work" / "smoke" / "shards"
    _upload(cluster, shards, "example-bucket", "llama-3-8b/shards")
    # A work directory with the manifests of the shards, but without the shards.
    bare = Kubelet(cluster, tmp_path, {"llama3-8b-16layers.yaml": SMOKE})
    shutil.copytree(
        kubelet.claim("dskd-work"), bare.claim("dskd-work"), ignore=shutil.ignore_patterns("*.mds*", "index.json")
    )
    give_to(USER, bare.claim("dskd-work"))
    few = {"DSKD_RANKS_PER_NODE": "1"}
    arguments = ("run=bucket", "tracking.uri=null")
    running = _start(bare, pods, *arguments, **few)
    assert _wait(running) == [0, 0], _output(running)
    assert STORED in running[0].output
    assert _losses(bare, "bucket") == undisturbed

    other = tmp_path / "other"
    shutil.copytree(shards / "validation", other / "train")
    _upload(cluster, other, "example-bucket", "llama-3-8b/shards")
    running = _start(bare, pods, "run=other", "tracking.uri=null", **few)
    codes = _wait(running, 120)
    assert [verdict(job_of(objects)[1], code) for code in codes] == ["FailJob", "FailJob"], _output(running)
    assert "s3://example-bucket/llama-3-8b/shards/train: its index.json is not that of" in running[0].output
