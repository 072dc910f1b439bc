"""The manifests of cluster/kubernetes/: what an API server refuses, and what it accepts although it cannot work."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions
from manifests import (
    JOBS,
    KUBERNETES,
    KUSTOMIZATIONS,
    SECRETS,
    job_of,
    one,
    pod_templates,
    pods_of,
    quantity,
    render,
    render_folder,
    verdict,
)
from repository import REPOSITORY

from dskd.config.reading import load_config
from dskd.errors import STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE

DOCKERFILE = REPOSITORY / "cluster" / "docker" / "Dockerfile"
# The oldest version that cluster/kubernetes/README.md names, and the newest of the package: Kubernetes removes fields,
# and adds them, but does not bring a removed one back.
_NEWEST = max(tuple(map(int, version.split(".")[:2])) for version in all_versions())
VERSIONS = ["1.32", "{}.{}".format(*_NEWEST)]
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def _as_core(item):
    """Returns a JobSet's Job as a Job, because Kubernetes' schemas do not include that of JobSets."""
    if item["kind"] != "JobSet":
        return item
    name, spec = job_of([item])
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_fits_the_schema_strictly(name, version):
    objects = render(name)
    assert objects
    for item in objects:
        kubernetes_validate.validate(_as_core(item), version, strict=True)


def _object(**properties):
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The keys of a JobSet (v1alpha2) except those of its Jobs, which Kubernetes' own schema checks.
_REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
_NAMES = {"type": "array", "items": {"type": "string"}}
_NUMBER, _SWITCH, _TEXT = {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "string"}
JOBSET = _object(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=_object(
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(name=_TEXT, replicas=_NUMBER, template=_object(metadata={}, spec={"type": "object"})),
        },
        network=_object(enableDNSHostnames=_SWITCH, subdomain=_TEXT, publishNotReadyAddresses=_SWITCH),
        successPolicy=_object(operator={"enum": ["All", "Any"]}, targetReplicatedJobs=_NAMES),
        failurePolicy=_object(
            maxRestarts=_NUMBER,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "type": "array",
                "items": _object(
                    name=_TEXT,
                    action={"enum": _ACTIONS},
                    targetReplicatedJobs=_NAMES,
                    onJobFailureReasons={"type": "array", "items": {"enum": _REASONS}},
                ),
            },
        ),
        suspend=_SWITCH,
        ttlSecondsAfterFinished=_NUMBER,
    ),
)


def test_a_jobset_has_only_keys_that_its_controller_knows():
    jobset = one(render("overlays/jobset"), "JobSet")
    jsonschema.validate(jobset, JOBSET)
    for wrong in ({"restarts": 3}, {"restartStrategy": "Recreated"}):
        changed = copy.deepcopy(jobset)
        changed["spec"]["failurePolicy"] |= wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, JOBSET)


def test_the_schema_refuses_a_misspelt_key():
    job = one(render("base"), "Job")
    job["spec"]["template"]["spec"]["terminationGraceSeconds"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def _kubectl(*arguments):
    environment = {**os.environ, "KUBECONFIG": "/dev/null"}
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, whose types would decode them")
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kubectls_own_types_decode_every_object(name, tmp_path):
    # Commands that decode without a server; neither knows JobSets.
    for item in map(_as_core, render(name)):
        file = tmp_path / "object.yaml"
        file.write_text(yaml.safe_dump(item))
        verb, change = (("set", "env"), "X=1") if "template" in item.get("spec", {}) else (("label",), "x=y")
        decoded = _kubectl(*verb, "--local", "-f", str(file), change, "-o", "json")
        assert decoded.returncode == 0, decoded.stderr
        assert json.loads(decoded.stdout)["kind"] == item["kind"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectls_own_types_refuse_a_wrong_quantity(tmp_path):
    job = one(render("base"), "Job")
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "16 GB"
    file = tmp_path / "object.yaml"
    file.write_text(yaml.safe_dump(job))
    decoded = _kubectl("set", "env", "--local", "-f", str(file), "X=1", "-o", "json")
    assert decoded.returncode != 0
    assert "quantities must match" in decoded.stderr


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_names_are_dns_labels_and_so_are_those_of_the_pods(name):
    for item in render(name):
        assert DNS_LABEL.fullmatch(item["metadata"]["name"])
        assert len(item["metadata"]["name"]) <= 63
        if item["kind"] in ("Job", "JobSet"):
            job, spec = job_of([item])
            # A pod is called JOB-INDEX-xxxxx, and JOB-INDEX is its host name; leave room for a thousand nodes.
            assert spec["completions"] <= 1000
            assert len(f"{job}-999-abcde") <= 63


# --------------------------------------------------------------------------------------------- what has to fit together


@pytest.mark.parametrize("name", JOBS)
def test_pods_find_each_other_by_the_service_that_selects_them(name):
    objects = render(name)
    _, job_spec = job_of(objects)
    template = job_spec["template"]
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for pod in pods_of(objects, SECRETS):
        assert pod.env["DSKD_SERVICE"] == template["spec"]["subdomain"]
        # The entry point computes the same names that the pods have.
        assert f"{pod.env['DSKD_JOB']}-{pod.env['JOB_COMPLETION_INDEX']}.{pod.env['DSKD_SERVICE']}" == pod.names[1]
        assert int(pod.env["DSKD_MASTER_PORT"]) == ports["rendezvous"]
    jobsets = [item for item in objects if item["kind"] == "JobSet"]
    if jobsets:  # its controller creates the Service
        network = jobsets[0]["spec"]["network"]
        assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"]
        assert network["subdomain"] == template["spec"]["subdomain"]
        return
    service = one(objects, "Service")
    assert service["metadata"]["name"] == template["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert [(p["port"], p["targetPort"]) for p in service["spec"]["ports"]] == [(ports["rendezvous"], "rendezvous")]


@pytest.mark.parametrize("name", ["mlflow", "mlflow-database"])
def test_the_mlflow_service_reaches_its_pod_by_a_name_that_the_server_accepts(name):
    objects = render(name)
    service, deployment = one(objects, "Service"), one(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert [(p["port"], p["targetPort"]) for p in service["spec"]["ports"]] == [(port["containerPort"], port["name"])]
    assert f"--port={port['containerPort']}" in container["args"]
    (hosts,) = [a.partition("=")[2].split(",") for a in container["args"] if a.startswith("--allowed-hosts=")]
    assert {service["metadata"]["name"], f"{service['metadata']['name']}:{port['containerPort']}"} <= set(hosts)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    # The MLflow server is not among the pods of the ranks' Service.
    ranks = one(render("base"), "Service")["spec"]["selector"]
    assert not ranks.items() <= labels.items()


def test_the_database_url_comes_only_from_a_secret():
    (plain,), (secret,) = pods_of(render("mlflow")), pods_of(render("mlflow-database"), SECRETS)
    assert plain.env["MLFLOW_BACKEND_STORE_URI"] == "sqlite:////mlflow/mlflow.db"
    assert secret.env == plain.env | {"MLFLOW_BACKEND_STORE_URI": SECRETS["dskd-mlflow-database"]["url"]}
    with pytest.raises(KeyError):
        pods_of(render("mlflow-database"))


@pytest.mark.parametrize("name", JOBS)
def test_the_number_of_nodes_is_consistent_and_retries_cover_an_incident_on_each(name):
    objects = render(name)
    _, spec = job_of(objects)
    nodes = spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == nodes
    assert len(pods_of(objects, SECRETS)) == nodes
    assert all(pod.env["DSKD_NODES"] == str(nodes) for pod in pods_of(objects, SECRETS))
    jobsets = [item for item in objects if item["kind"] == "JobSet"]
    if jobsets:  # the first failed pod fails the Job, and restarts of the group are counted
        assert spec["backoffLimit"] == 0
        assert jobsets[0]["spec"]["failurePolicy"]["maxRestarts"] >= 3
        return
    assert spec["backoffLimit"] % nodes == 0
    assert spec["backoffLimit"] // nodes >= 3


@pytest.mark.parametrize("name", JOBS)
def test_a_users_mistake_ends_the_job_and_a_stop_or_a_disruption_costs_no_retry(name):
    objects = render(name)
    _, spec = job_of(objects)
    (container,) = spec["template"]["spec"]["containers"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    assert verdict(spec, USER_ERROR_EXIT_CODE) == "FailJob"
    assert verdict(spec, STOPPED_EXIT_CODE) == "Ignore"
    assert verdict(spec, 137, disrupted=True) == "Ignore"
    assert [verdict(spec, code) for code in (1, 130, 137, 247)] == ["Count"] * 4
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    for item in objects:
        if item["kind"] == "JobSet":
            (rule,) = item["spec"]["failurePolicy"]["rules"]
            assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize("name", [n for n in KUSTOMIZATIONS if n != "storage"])
def test_pods_run_with_minimal_rights(name):
    (user,) = re.findall(r"^ARG USER_ID=(\d+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    for template in pod_templates(render(name)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == int(user)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", [n for n in KUSTOMIZATIONS if n != "storage"])
def test_volumes_exist_fit_into_memory_and_hold_everything_that_is_written(name):
    claims = {item["metadata"]["name"]: item for item in render("storage")}
    objects = render(name)
    configs = {item["metadata"]["name"] for item in objects if item["kind"] == "ConfigMap"}
    for template in pod_templates(objects):
        spec = template["spec"]
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        for volume in volumes.values():
            assert len(volume) == 2, volume  # its name and one source
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in configs
        memory = sum(
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in volumes.values()
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )
        assert memory <= quantity(container["resources"]["limits"]["memory"]) / 2
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"] or (
            container["name"] == "mlflow"
        )
        # The root is read-only, so folders in environment variables must be on a volume.
        writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
        places = [e["value"] for e in container["env"] if e.get("value", "").startswith("/")]
        places += [a.partition("=")[2] for a in container["args"] if a.partition("=")[2].startswith("/")]
        assert len(places) >= 2
        assert "/tmp" in writable
        for place in [*places, container["workingDir"]]:
            assert any(place == path or place.startswith(f"{path}/") for path in writable), place


@pytest.mark.parametrize("name", JOBS)
def test_ranks_have_shared_memory_time_to_save_and_no_probes(name):
    (template,) = pod_templates(render(name))
    (container,) = template["spec"]["containers"]
    (shared,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == shared]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert not {"livenessProbe", "startupProbe", "readinessProbe"} & container.keys()
    assert template["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", JOBS)
def test_dskd_accepts_the_config_that_the_job_names(name, tmp_path):
    objects = render(name)
    data = one(objects, "ConfigMap")["data"]
    for pod in pods_of(objects, SECRETS):
        program, *arguments = pod.container["args"]
        assert (REPOSITORY / "launcher" / program).is_file()
        assert arguments[0] == "--config"
        (mount,) = [m["mountPath"] for m in pod.container["volumeMounts"] if m["name"] == "configs"]
        path = Path(arguments[1])
        assert str(path.parent) == mount
        assert data[path.name] == (REPOSITORY / "configs" / path.name).read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(data[path.name], encoding="utf-8")
        config = load_config(tmp_path / path.name, [a for a in arguments[2:] if "=" in a])
        assert not Path(config.workdir).is_absolute()  # it is relative to workingDir, on the work volume
        if "object-storage" in name:
            assert config.train.shard_remote.startswith("s3://")
        if "mlflow" in (config.tracking.uri or ""):
            service = one(render("mlflow"), "Service")
            assert config.tracking.uri == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_every_config_is_in_the_config_map():
    data = one(render("base"), "ConfigMap")["data"]
    assert data.keys() == {path.name for path in (REPOSITORY / "configs").glob("*.yaml")}


def test_a_pod_requests_as_many_gpus_as_ranks():
    for name in ("overlays/two-nodes-of-eight-gpus", "overlays/object-storage", "overlays/jobset"):
        for pod in pods_of(render(name), SECRETS):
            resources = pod.container["resources"]
            assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "8"
            assert pod.env["DSKD_RANKS_PER_NODE"] == "8"


def test_a_jobset_has_the_same_pods_as_the_job():
    (job,) = pod_templates(render("overlays/two-nodes-of-eight-gpus"))
    (jobset,) = pod_templates(render("overlays/jobset"))
    assert jobset == job
    assert not any(item["kind"] in ("Job", "Service") for item in render("overlays/jobset"))


def test_no_manifest_contains_a_secret_or_a_token():
    for name in KUSTOMIZATIONS:
        for item in render(name):
            assert item["kind"] != "Secret"
    for name in JOBS:
        for template in pod_templates(render(name)):
            for entry in template["spec"]["containers"][0]["env"]:
                if re.search(r"KEY|TOKEN|SECRET|PASSWORD", entry["name"]):
                    assert list(entry["valueFrom"]) == ["secretKeyRef"]


def test_jobs_with_names_of_their_own_share_service_and_volumes(tmp_path):
    """The README's overlay for several runs at the same time."""
    folder = KUBERNETES / "overlays" / "cpu-smoke-test"
    readme = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "allowNameChange" in block]
    (tmp_path / "kustomization.yaml").write_text(
        re.sub(r"^- \.\./\S+$", f"- {os.path.relpath(folder, tmp_path)}", text, count=1, flags=re.MULTILINE)
    )
    objects = render_folder(tmp_path)
    original = render("overlays/cpu-smoke-test")
    job, spec = job_of(objects)
    assert job != job_of(original)[0]
    assert one(objects, "Service") == one(original, "Service")
    assert one(objects, "Service")["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert pods_of(objects)[1].env["DSKD_JOB"] == job
    assert pods_of(objects)[1].argv[-1].startswith("run=")
    assert spec["template"]["spec"]["volumes"] == job_of(original)[1]["template"]["spec"]["volumes"]
