"""What Triton reads is what the exported file is, and what production starts it with is what it knows.

The pytorch backend, GPUs, Docker and Kubernetes are not there: their files are checked against their schemas.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import torch
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from distseg.serving.repository import MODEL_NAME, PREFERRED_BATCHES
from tests.conftest import ROOT

TRITON = ROOT / "export" / "triton"
REPOSITORIES = ("model_repository", "model_repository_python")


def config_of(model: Path, repository: str) -> Any:
    text = (model / repository / MODEL_NAME / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_the_configuration_is_tritons_and_says_the_shapes_of_the_file(model: Path, repository: str) -> None:
    config, described = config_of(model, repository), json.loads((model / "model.json").read_text())
    assert config.name == MODEL_NAME and json.loads(config.parameters["distseg.json"].string_value) == described
    hu_BCHW = torch.zeros(2, described["input"]["shape"][1], 5, 7, dtype=torch.int16)
    answers = torch.jit.load(str(model / repository / MODEL_NAME / "1" / "model.pt"))(hu_BCHW)
    types = {torch.int16: "TYPE_INT16", torch.uint8: "TYPE_UINT8", torch.float32: "TYPE_FP32"}
    names = model_config_pb2.DataType.Name
    for said, tensor in zip((*config.input, *config.output), (hu_BCHW, *answers), strict=True):
        assert names(said.data_type) == types[tensor.dtype]
        assert list(said.dims) == [tensor.shape[1], -1, -1] and tensor.shape[2:] == (5, 7)
    assert [said.name for said in (*config.input, *config.output)] == ["HU", "MASK", "PROB"]


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_batches_are_within_the_largest_and_each_preferred_one_is_warmed_up_on_a_gpu(
    model: Path, repository: str
) -> None:
    config = config_of(model, repository)
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == list(PREFERRED_BATCHES) and max(preferred) == config.max_batch_size
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds < 10_000
    warmed = {warm_up.batch_size for warm_up in config.model_warmup}
    assert warmed == ({1, *preferred} if repository == "model_repository" else {1})
    for warm_up in config.model_warmup:
        hu = warm_up.inputs["HU"]
        assert warm_up.count == 3 and hu.data_type == config.input[0].data_type and -1 not in hu.dims


def test_the_pytorch_repository_is_for_gpus_and_its_names_leave_the_order_to_the_file(model: Path) -> None:
    config = config_of(model, "model_repository")
    assert (config.backend, config.platform) == ("pytorch", "pytorch_libtorch")
    assert [model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group] == [
        "KIND_GPU"
    ]
    # The backend's rule: an argument's name, else NAME__INDEX, else the order of the configuration.
    schema = torch.jit.load(str(model / "model.pt")).forward.schema
    assert [argument.name for argument in schema.arguments[1:]] == ["hu_BCHW"] and len(schema.returns) == 1
    assert not any("__" in said.name for said in (*config.input, *config.output))
    switches = {"INFERENCE_MODE", "DISABLE_OPTIMIZED_EXECUTION", "ENABLE_TENSOR_FUSER", "ENABLE_WEIGHT_SHARING"}
    assert {name for name in config.parameters if name.isupper()} == switches
    assert {config.parameters[name].string_value for name in switches} <= {"true", "false"}


def test_each_switch_has_its_reason_above_it(model: Path) -> None:
    lines = (model / "model_repository" / MODEL_NAME / "config.pbtxt").read_text().splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        if re.match("parameters|instance_group|dynamic_batching", line):
            assert above.startswith("# "), line


def test_the_python_repository_needs_torch_and_the_server_alone_and_no_second_copy(model: Path) -> None:
    config = config_of(model, "model_repository_python")
    assert config.backend == "python" and not config.platform
    version = model / "model_repository_python" / MODEL_NAME / "1"
    tree = ast.parse((version / "model.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"pathlib", "typing", "warnings", "torch", "triton_python_backend_utils"}
    assert (version / "model.pt").samefile(model / "model.pt")


class Strict(pydantic.BaseModel, extra="forbid"):
    """Of apps/v1 and v1: a field that the cluster does not know is a mistake."""


class HttpGet(Strict):
    path: Literal["/v2/health/live", "/v2/health/ready"]
    port: Literal["http"]


class Probe(Strict):
    httpGet: HttpGet
    periodSeconds: int
    failureThreshold: int


class Port(Strict):
    name: Literal["http", "grpc", "metrics"]
    containerPort: int


class Container(Strict):
    name: str
    image: str
    args: list[str]
    ports: list[Port]
    startupProbe: Probe
    readinessProbe: Probe
    livenessProbe: Probe
    resources: dict[Literal["limits"], dict[str, int | str]]
    securityContext: dict[str, Any]
    volumeMounts: list[dict[Literal["name", "mountPath", "readOnly"], Any]]


class PodSpec(Strict):
    terminationGracePeriodSeconds: int
    automountServiceAccountToken: bool
    containers: list[Container]
    volumes: list[dict[Literal["name", "persistentVolumeClaim"], Any]]


class PodMetadata(Strict):
    labels: dict[str, str]
    annotations: dict[str, str]


class Template(Strict):
    metadata: PodMetadata
    spec: PodSpec


class Strategy(Strict):
    type: Literal["RollingUpdate"]
    rollingUpdate: dict[Literal["maxSurge", "maxUnavailable"], int]


class DeploymentSpec(Strict):
    replicas: int
    strategy: Strategy
    selector: dict[Literal["matchLabels"], dict[str, str]]
    template: Template


class Deployment(Strict):
    apiVersion: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: dict[Literal["name"], str]
    spec: DeploymentSpec


class ServicePort(Strict):
    name: Literal["http", "grpc", "metrics"]
    port: int
    targetPort: Literal["http", "grpc", "metrics"]


class ServiceSpec(Strict):
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: dict[Literal["name"], str]
    spec: ServiceSpec


def test_the_kubernetes_manifest_has_the_clusters_fields_and_tritons_probes() -> None:
    deployment_text, service_text = yaml.safe_load_all((TRITON / "kubernetes.yaml").read_text())
    spec, service = Deployment.model_validate(deployment_text).spec, Service.model_validate(service_text)
    (container,) = spec.template.spec.containers
    assert container.startupProbe.httpGet.path == container.readinessProbe.httpGet.path == "/v2/health/ready"
    assert container.livenessProbe.httpGet.path == "/v2/health/live"
    assert spec.selector["matchLabels"] == spec.template.metadata.labels == service.spec.selector
    assert {port.name for port in container.ports} == {port.targetPort for port in service.spec.ports}
    assert {port.name: port.containerPort for port in container.ports} == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {mount["name"] for mount in container.volumeMounts} == {v["name"] for v in spec.template.spec.volumes}
    # A pod is given longer than the server, and a rollout never takes the last one away.
    exit_timeout = next(int(word.split("=")[1]) for word in container.args if "exit-timeout" in word)
    assert spec.template.spec.terminationGracePeriodSeconds > exit_timeout
    assert spec.strategy.rollingUpdate["maxUnavailable"] == 0
    (repository,) = (word for word in container.args if word.startswith("--model-repository="))
    assert repository == "--model-repository=/model/model_repository"


def test_container_and_cluster_start_the_same_image_with_the_same_words() -> None:
    compose = yaml.safe_load((TRITON / "compose.yaml").read_text())["services"]["triton"]
    deployment = next(yaml.safe_load_all((TRITON / "kubernetes.yaml").read_text()))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert compose["image"] == container["image"] and re.search(r":\d\d\.\d\d-\S+$", container["image"])
    assert compose["command"] == container["args"]
    (mount,) = compose["volumes"]
    # A path that is not absolute would be looked for beside the file, and made there where it is missing.
    assert mount["type"] == "bind" and mount["source"].startswith("${MODEL:?") and mount["target"] == "/model"
    assert mount["bind"] == {"create_host_path": False} and mount["read_only"]


def test_the_readme_names_every_file_beside_it() -> None:
    text = (TRITON / "README.md").read_text()
    assert [path.name for path in TRITON.iterdir() if path.name != "README.md" and path.name not in text] == []
