"""The examples of docs/cluster.md: valid by their schemas, with a token, and with commands that we understand."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tune_amp.search_arguments import search_parser

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object that has no other fields: as the API server prunes what it does not know, a typing error is silent."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# The part of KubeRay's RayJob (ray.io/v1) that the example uses: names and types of fields, written down by us from the
# API references of KubeRay 1.5 and Kubernetes 1.31. It is no copy of the CRD, which was not at hand.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"},
}
CONTAINER = fields(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={"type": "array", "items": fields(("name", "mountPath"), name=TEXT, mountPath=TEXT)},
)
VOLUME = fields(("name",), name=TEXT, persistentVolumeClaim=fields(("claimName",), claimName=TEXT))
POD = fields(
    ("spec",),
    spec=fields(
        ("containers",),
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={"type": "array", "items": VOLUME},
    ),
)
RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=fields(
            ("headGroupSpec",),
            rayVersion=TEXT,
            authOptions=fields(mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(("template",), rayStartParams=TEXTS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    ("groupName", "maxReplicas", "minReplicas", "template"),
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
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (pod["template"]["spec"] for pod in pods):
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
