"""The Kubernetes manifests: valid by Kubernetes' own schemas, and right with each other. What is broken is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.manifests import KUBERNETES, Document, build, containers, pod_template, schema_complaints
from tests.deploy.rules import complaints

WHERE = ("base", "nvidia")


@pytest.fixture(scope="module")
def etcd_documents() -> list[Document]:
    return build(KUBERNETES / "etcd")


@pytest.mark.parametrize("where", [*WHERE, "etcd"])
def test_manifests_fit_their_schemas(where):
    assert schema_complaints(build(KUBERNETES / where)) == []


@pytest.mark.parametrize("where", WHERE)
def test_manifests_fit_each_other(where, etcd_documents):
    assert complaints(build(KUBERNETES / where) + etcd_documents) == []


def test_every_manifest_is_part_of_something():
    for directory in KUBERNETES.iterdir():
        listed = (directory / "kustomization.yaml").read_text()
        for path in directory.glob("*.yaml"):
            assert path.name == "kustomization.yaml" or path.name in listed


def test_the_overlay_changes_what_it_says_and_only_that(etcd_documents):
    base, nvidia = (
        {(d["kind"], d["metadata"]["name"]): d for d in build(KUBERNETES / where)} for where in WHERE
    )
    added = {("PersistentVolumeClaim", "xllm-models"), ("Job", "xllm-models")}
    assert nvidia.keys() - base.keys() == added
    changed = {("StatefulSet", "xllm-instance"), ("Deployment", "xllm-router")}
    assert {key for key in base if base[key] != nvidia[key]} == changed
    card = containers(nvidia["StatefulSet", "xllm-instance"])[0]
    assert (
        card["resources"]["limits"]["nvidia.com/gpu"]
        == card["resources"]["requests"]["nvidia.com/gpu"]
        == "1"
    )
    assert "--device=cuda" in card["args"]
    assert card["image"].endswith(":cuda")


# ---- a check that cannot fail checks nothing

Mutation = Callable[[dict[str, Any]], None]


def _container(workload: Document) -> Document:
    return containers(workload)[0]


def _pod(workload: Document) -> Document:
    template = pod_template(workload)
    assert template is not None
    return template["spec"]


def _replace(words: list[str], old: str, new: str) -> None:
    words[words.index(old)] = new


SET, ROUTER = "StatefulSet xllm-instance", "Deployment xllm-router"
WIRE = "NetworkPolicy xllm-instance"
BROKEN: list[tuple[str, Mutation]] = [
    ("unrecognized arguments: --max-seqs", lambda d: _container(d[SET])["args"].append("--max-seqs=3")),
    ("routing", lambda d: _replace(_container(d[ROUTER])["args"], "--routing-policy=prefix_aware", "--routing-policy=best")),
    ("--listen is tcp://", lambda d: _replace(_container(d[SET])["args"], "--listen=tcp://0.0.0.0:5557", "--listen=0.0.0.0:5557")),
    ("is not its wire port", lambda d: _replace(_container(d[SET])["args"], "--listen=tcp://0.0.0.0:5557", "--listen=tcp://0.0.0.0:5558")),
    ("is not its http port", lambda d: _replace(_container(d[ROUTER])["args"], "--port=8000", "--port=8001")),
    ("nobody outside the pod", lambda d: _replace(_container(d[ROUTER])["args"], "--host=0.0.0.0", "--host=127.0.0.1")),
    ("not in its environment", lambda d: _container(d[SET])["env"].pop(0)),
    ("differ in cluster", lambda d: _replace(_container(d[SET])["args"], "--cluster=default", "--cluster=other")),
    ("differ in model", lambda d: _replace(_container(d[ROUTER])["args"], "demo", "demo-draft")),
    ("asks another etcd", lambda d: d["EtcdCluster xllm-etcd"]["spec"].update(size=5)),
    ("is too old", lambda d: d["EtcdCluster xllm-etcd"]["spec"].update(version="v3.5.2")),
    ("livenessProbe asks /ready", lambda d: _container(d[SET])["livenessProbe"]["httpGet"].update(path="/ready")),
    ("readinessProbe asks /health", lambda d: _container(d[ROUTER])["readinessProbe"]["httpGet"].update(path="/health")),
    ("asks a port", lambda d: _container(d[ROUTER])["readinessProbe"]["httpGet"].update(port="https")),
    ("startupProbe is missing", lambda d: _container(d[SET]).pop("startupProbe")),
    ("killed after 60 s", lambda d: _pod(d[SET]).update(terminationGracePeriodSeconds=60)),
    ("killed after 310 s", lambda d: _pod(d[ROUTER]).update(terminationGracePeriodSeconds=310)),
    ("killed after 30 s", lambda d: _pod(d[SET]).pop("terminationGracePeriodSeconds")),
    ("Service still sends", lambda d: _container(d[ROUTER]).pop("lifecycle")),
    ("selector and labels differ", lambda d: d[SET]["spec"]["selector"]["matchLabels"].update(tier="x")),
    ("pods of xllm-instance too", lambda d: d[ROUTER]["spec"]["selector"]["matchLabels"].pop("app.kubernetes.io/component")),
    ("no headless Service", lambda d: d[SET]["spec"].update(serviceName="xllm-router")),
    ("spreads other pods", lambda d: _pod(d[SET])["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].update(a="b")),
    ("pods of 2 workloads", lambda d: d["Service xllm-router"]["spec"]["selector"].pop("app.kubernetes.io/component")),
    ("pods of 0 workloads", lambda d: d["Service xllm-router"]["spec"]["selector"].update(a="b")),
    ("no container has port", lambda d: d["Service xllm-router"]["spec"]["ports"][0].update(targetPort=8001)),
    ("0 disruption budgets", lambda d: d["PodDisruptionBudget xllm-router"]["spec"]["selector"]["matchLabels"].update(a="b")),
    ("0 of 2 pods", lambda d: d["PodDisruptionBudget xllm-router"]["spec"].update(minAvailable=2)),
    ("may run as root", lambda d: _pod(d[SET])["securityContext"].pop("runAsNonRoot")),
    ("write to its image", lambda d: _container(d[ROUTER])["securityContext"].update(readOnlyRootFilesystem=False)),
    ("keeps capabilities", lambda d: _container(d[SET])["securityContext"].pop("capabilities")),
    ("asks for no CPU", lambda d: _container(d[SET])["resources"]["requests"].pop("cpu")),
    ("no tag of its own", lambda d: _container(d[SET]).update(image="xllm")),
    ("does not come from the Secret", lambda d: _container(d[SET])["env"].append({"name": "XLLM_API_KEY", "value": "abc"})),
    ("without token or API key", lambda d: _container(d[ROUTER]).update(env=[])),
    ("there is no volume", lambda d: _pod(d[SET])["volumes"].pop(0)),
    ("nothing to write to", lambda d: _container(d[ROUTER])["volumeMounts"].pop()),
    ("closed by default", lambda d: d.pop("NetworkPolicy default-deny-ingress")),
    ("others than routers", lambda d: d[WIRE]["spec"]["ingress"][0].pop("from")),
    ("others than routers", lambda d: d[WIRE]["spec"]["ingress"][2].pop("ports")),
    ("others than routers", lambda d: d[WIRE]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].update({"app.kubernetes.io/component": "router2"})),
    ("nobody may connect", lambda d: d["NetworkPolicy xllm-router"]["spec"].pop("ingress")),
]  # fmt: skip


@pytest.mark.parametrize(("words", "breaks"), BROKEN, ids=[f"{i}-{w}" for i, (w, _) in enumerate(BROKEN)])
def test_what_does_not_fit_is_refused(words, breaks, etcd_documents):
    documents = copy.deepcopy(build(KUBERNETES / "base") + etcd_documents)
    by_name = {f"{d['kind']} {d['metadata']['name']}": d for d in documents}
    breaks(by_name)
    found = complaints(list(by_name.values()))
    assert any(words in complaint for complaint in found), found


@pytest.mark.parametrize(
    ("words", "breaks"),
    [
        ("replica", lambda d: d[ROUTER]["spec"].update(replica=2)),
        ("'two' is not of type", lambda d: d[ROUTER]["spec"].update(replicas="two")),
        ("selector", lambda d: d[SET]["spec"].pop("selector")),
        ("path", lambda d: _container(d[SET])["livenessProbe"]["httpGet"].update(paths="/health")),
        ("schema", lambda d: d["Service xllm-router"].update(apiVersion="v2")),
        ("no field sizes", lambda d: d["EtcdCluster xllm-etcd"]["spec"].update(sizes=3)),
        ("storageSpec is missing", lambda d: d["EtcdCluster xllm-etcd"]["spec"].pop("storageSpec")),
    ],
)
def test_what_is_no_manifest_is_refused(words, breaks, etcd_documents):
    by_name = {f"{d['kind']} {d['metadata']['name']}": d for d in build(KUBERNETES / "base") + etcd_documents}
    breaks(by_name)
    found = schema_complaints(list(by_name.values()))
    assert any(words in complaint for complaint in found), found
