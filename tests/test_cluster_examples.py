"""The examples of docs/cluster.md: valid by their schemas, with a token, and with commands that we understand."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tune_amp.cli.search_arguments import search_parser

KUBERNETES = "1.31"
EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object that has no other fields: as the API server prunes what it does not know, a typing error is silent."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# The part of KubeRay's RayJob (ray.io/v1) that the example uses: names, types and requirements of fields as KubeRay's
# sources declare them (RayJobSpec, RayClusterSpec, AuthOptions, HeadGroupSpec and WorkerGroupSpec in
# ray-operator/apis/ray/v1). What pods may hold is Kubernetes' own schema: see the test of pods.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD: dict[str, Any] = {"type": "object"}
RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=fields(
            ("headGroupSpec",),
            rayVersion=TEXT,
            authOptions=fields(mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(("rayStartParams", "template"), rayStartParams=TEXTS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=POD,
                ),
            },
        ),
    ),
)


def read(name: str) -> dict[str, Any]:
    example: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return example


def test_ray_job_has_only_fields_that_kuberay_knows() -> None:
    jsonschema.validate(read("rayjob.yaml"), RAY_JOB)


@pytest.mark.parametrize("change", ["shutdownAfterJobFinish", "workerGroupSpec"])
def test_schema_refuses_a_field_that_kuberay_would_drop_without_a_word(change: str) -> None:
    job = read("rayjob.yaml")
    (job["spec"] if change.startswith("shut") else job["spec"]["rayClusterSpec"])[change] = True
    with pytest.raises(jsonschema.ValidationError, match=change):
        jsonschema.validate(job, RAY_JOB)


def list_pods() -> list[dict[str, Any]]:
    """The pods that KubeRay would make of the example."""
    cluster = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    return [
        {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


def test_pods_are_valid_by_kubernetes_own_schema() -> None:
    pods = list_pods()
    assert len(pods) == 2
    for pod in pods:
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kubernetes_schema_refuses_a_field_that_is_misspelt() -> None:
    pod = list_pods()[0]
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_ray_job_asks_for_a_token_and_its_ray_is_ours() -> None:
    cluster = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__


def test_ray_job_runs_a_command_that_we_understand_and_keeps_its_results() -> None:
    spec = read("rayjob.yaml")["spec"]
    program, command, *arguments = shlex.split(spec["entrypoint"])
    assert (program, command) == ("tune-amp", "search")
    known = search_parser("tune-amp search").parse_args(arguments)
    assert known.address == "auto"
    for pod in (pod["spec"] for pod in list_pods()):
        [mount] = pod["containers"][0]["volumeMounts"]
        assert mount["name"] in [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        for place in (known.results_dir, known.storage_path):
            assert Path(place).is_relative_to(mount["mountPath"])


def test_cluster_is_valid_by_rays_own_schema_and_complete() -> None:
    cluster = read("cluster.yaml")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    complete = prepare_config(cluster)
    validate_config(complete)
    [node] = complete["available_node_types"].values()
    assert node["min_workers"] == len(cluster["provider"]["worker_ips"])
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_cluster_asks_for_a_token_wherever_it_starts_ray() -> None:
    cluster = read("cluster.yaml")
    started = [
        command
        for kind in ("head", "worker")
        for command in cluster[f"{kind}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(started) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in started)
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_page_and_readme_name_the_examples() -> None:
    page = (EXAMPLES.parent / "cluster.md").read_text()
    assert all(f"(examples/{path.name})" in page for path in EXAMPLES.iterdir())
    assert "docs/cluster.md" in (EXAMPLES.parents[1] / "README.md").read_text()
