"""What must hold between manifests beyond their schemas. Each rule yields a sentence for everything that is wrong."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.deploy.commands import parse
from tests.deploy.manifests import Document, containers, pod_template
from xllm.core.errors import ConfigError
from xllm.server.middleware import OPEN_PATHS

FLUSH_AND_END_S = 10  # last bytes of answers, then the engine's end
OLDEST_ETCD = (3, 5, 9)
SECRETS = {"cluster-token", "api-key", "instance-api-key"}  # of the Secret `xllm`
PROBES = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


def workloads(documents: list[Document]) -> list[Document]:
    """With their pods; the Jobs are not served by anything."""
    return [d for d in documents if d["kind"] in ("StatefulSet", "Deployment")]


def labels(workload: Document) -> dict[str, str]:
    return dict(_template(workload)["metadata"]["labels"])


def covers(selector: dict[str, Any], workload: Document) -> bool:
    """Whether a label selector with matchLabels takes a workload's pods; an empty one takes all."""
    return selector.get("matchLabels", {}).items() <= labels(workload).items()


def arguments(container: Document) -> list[str]:
    """With `$(NAME)` as it will be: an address where the pod's is meant."""
    stands_for = {"POD_IP": "10.0.0.11", "POD_NAME": "xllm-instance-0"}
    return [
        re.sub(r"\$\((\w+)\)", lambda m: stands_for.get(m[1], m[0]), word)
        for word in container.get("args", [])
    ]


def commands(documents: list[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        for container in containers(workload):
            given = {e["name"] for e in container.get("env", ())}
            for name in re.findall(r"\$\((\w+)\)", " ".join(container["args"])):
                if name not in given:
                    yield f"{container['name']}: $({name}) is not in its environment"
            try:
                asked = parse(arguments(container))
            except ConfigError as e:
                yield f"{container['name']}: {e.message}"
                continue
            ports = _ports(container)
            if asked.port != ports.get("http"):
                yield f"{container['name']}: --port {asked.port} is not its http port"
            if "wire" in ports and not asked.listen.endswith(f":{ports['wire']}"):
                yield f"{container['name']}: --listen {asked.listen} is not its wire port"
            if asked.host != "0.0.0.0":
                yield f"{container['name']}: nobody outside the pod reaches --host {asked.host}"


def one_cluster(documents: list[Document]) -> Iterator[str]:
    asked = [parse(arguments(c)) for w in workloads(documents) for c in containers(w)]
    for name in ("model", "etcd", "cluster"):
        values = {str(getattr(one, name)) for one in asked}
        if len(values) != 1:
            yield f"router and instances differ in {name}: {sorted(values)}"


def probes(documents: list[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        for container in containers(workload):
            for probe, path in PROBES.items():
                get = container.get(probe, {}).get("httpGet")
                where = f"{container['name']}: {probe}"
                if get is None:
                    yield f"{where} is missing"
                elif get["path"] != path or path not in OPEN_PATHS:
                    yield f"{where} asks {get['path']}, not {path}"
                elif not _is_port(get["port"], container):
                    yield f"{where} asks a port that the container does not have"


def endings(documents: list[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        for container in containers(workload):
            sleep = (
                container.get("lifecycle", {})
                .get("preStop", {})
                .get("exec", {})
                .get("command", ["sleep", "0"])
            )
            needed = parse(arguments(container)).shutdown_timeout + float(sleep[-1]) + FLUSH_AND_END_S
            grace = _template(workload)["spec"].get("terminationGracePeriodSeconds", 30)
            if grace < needed:
                yield f"{container['name']}: killed after {grace} s, and may need {needed:g}"
            if sleep[-1] == "0" and container["name"] == "router":
                yield "router: ends while the Service still sends to it"


def selectors(documents: list[Document]) -> Iterator[str]:
    found = workloads(documents)
    services = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Service"}
    for workload in found:
        name = workload["metadata"]["name"]
        if not covers(workload["spec"]["selector"], workload):
            yield f"{name}: selector and labels differ"
        for other in found:
            if other is not workload and covers(workload["spec"]["selector"], other):
                yield f"{name}: selects the pods of {other['metadata']['name']} too"
        if workload["kind"] == "StatefulSet":
            service = services.get(workload["spec"]["serviceName"])
            if service is None or service["spec"].get("clusterIP") != "None":
                yield f"{name}: its serviceName is no headless Service"
        for spread in _template(workload)["spec"].get("topologySpreadConstraints", ()):
            if not covers(spread["labelSelector"], workload):
                yield f"{name}: spreads other pods than its own"
    for name, service in services.items():
        taken = [w for w in found if service["spec"]["selector"].items() <= labels(w).items()]
        if len(taken) != 1:
            yield f"Service {name}: selects the pods of {len(taken)} workloads"
        for port in service["spec"]["ports"]:
            if not all(_is_port(port["targetPort"], c) for w in taken for c in containers(w)):
                yield f"Service {name}: no container has port {port['targetPort']}"


def disruptions(documents: list[Document]) -> Iterator[str]:
    budgets = [d for d in documents if d["kind"] == "PodDisruptionBudget"]
    for workload in workloads(documents):
        name, replicas = workload["metadata"]["name"], workload["spec"]["replicas"]
        mine = [b["spec"] for b in budgets if covers(b["spec"]["selector"], workload)]
        if len(mine) != 1:
            yield f"{name}: {len(mine)} disruption budgets"
            continue
        may_go = (
            mine[0]["maxUnavailable"] if "maxUnavailable" in mine[0] else replicas - mine[0]["minAvailable"]
        )
        if not 1 <= may_go < replicas:
            yield f"{name}: {may_go} of {replicas} pods may be taken away at a time"


def security(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        if (template := pod_template(document)) is None:
            continue
        spec, name = template["spec"], document["metadata"]["name"]
        pod = spec.get("securityContext", {})
        if not (pod.get("runAsNonRoot") and pod.get("runAsUser")):
            yield f"{name}: may run as root"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: gets a token for Kubernetes' API, which it does not use"
        for container in spec["containers"]:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or not own.get("readOnlyRootFilesystem"):
                yield f"{name}: may gain privileges or write to its image"
            if own.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{name}: keeps capabilities"
            if not {"cpu", "memory"} <= container.get("resources", {}).get("requests", {}).keys():
                yield f"{name}: asks for no CPU or memory"
            if container["image"].rpartition(":")[2] in ("", "latest", container["image"]):
                yield f"{name}: its image has no tag of its own"


def secrets(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        for container in containers(document):
            for variable in container.get("env", ()):
                if variable["name"] in ("XLLM_CLUSTER_TOKEN", "XLLM_API_KEY"):
                    found = variable.get("valueFrom", {}).get("secretKeyRef", {})
                    if (
                        found.get("name") != "xllm"
                        or found.get("key") not in SECRETS
                        or found.get("optional")
                    ):
                        yield f"{container['name']}: {variable['name']} does not come from the Secret"
    for workload in workloads(documents):
        for container in containers(workload):
            if not {"XLLM_CLUSTER_TOKEN", "XLLM_API_KEY"} <= {e["name"] for e in container.get("env", ())}:
                yield f"{container['name']}: runs without token or API key"


def volumes(documents: list[Document]) -> Iterator[str]:
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for document in documents:
        spec = (pod_template(document) or {"spec": {}})["spec"]
        names = {v["name"] for v in spec.get("volumes", ())}
        for container in containers(document):
            mounts = container.get("volumeMounts", [])
            for mount in mounts:
                if mount["name"] not in names:
                    yield f"{container['name']}: there is no volume {mount['name']}"
            if not {"/tmp", "/cache"} <= {m["mountPath"] for m in mounts}:
                yield f"{container['name']}: nothing to write to at /tmp and /cache"
        for volume in spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{document['metadata']['name']}: there is no claim {claim}"


def network(documents: list[Document]) -> Iterator[str]:
    policies = [d for d in documents if d["kind"] == "NetworkPolicy"]
    if not any(p["spec"]["podSelector"] == {} and "ingress" not in p["spec"] for p in policies):
        yield "nothing is closed by default"
    for workload in workloads(documents):
        for container in containers(workload):
            for port in _ports(container):
                yield from _openings(port, workload, policies, workloads(documents))


def _openings(
    port: str, workload: Document, policies: list[Document], everybody: list[Document]
) -> Iterator[str]:
    name = workload["metadata"]["name"]
    lets_in = [
        rule.get("from")
        for policy in policies
        if covers(policy["spec"]["podSelector"], workload)
        for rule in policy["spec"].get("ingress", ())
        if "ports" not in rule or any(p["port"] == port for p in rule["ports"])
    ]
    if not lets_in:
        yield f"{name}: nobody may connect to its port {port}"
    if port == "wire":
        for sources in lets_in:
            taken = [w for s in sources or [{}] for w in everybody if covers(s.get("podSelector", {}), w)]
            if len(taken) != 1 or any("namespaceSelector" in s for s in sources or ()):
                yield f"{name}: others than routers may connect to its port wire"
            elif any(containers(one)[0]["name"] not in ("router", "instance") for one in taken):
                yield f"{name}: not routers and instances, but others may connect to its port wire"


def etcd(documents: list[Document]) -> Iterator[str]:
    """Only where a set of documents has an etcd: its members are those that everybody asks."""
    for document in documents:
        if document["kind"] == "EtcdCluster":
            name, spec = document["metadata"]["name"], document["spec"]
            if tuple(int(n) for n in spec["version"].lstrip("v").split(".")) < OLDEST_ETCD:
                yield f"etcd {spec['version']} is too old"
            if spec["size"] < 3 or spec["size"] % 2 == 0:
                yield f"{spec['size']} etcd members: of three, or five, one or two may fail"
            if not any("auto-compaction-retention" in o for o in spec["etcdOptions"]):
                yield "etcd keeps every old revision"
            members = {f"http://{name}-{i}.{name}:2379" for i in range(spec["size"])}
            for workload in workloads(documents):
                for container in containers(workload):
                    if set(parse(arguments(container)).etcd) != members:
                        yield f"{container['name']}: asks another etcd than there is"


RULES: tuple[Callable[[list[Document]], Iterator[str]], ...] = (
    commands, one_cluster, probes, endings, selectors, disruptions, security, secrets, volumes, network, etcd,
)  # fmt: skip


def complaints(documents: list[Document]) -> list[str]:
    found = []
    for rule in RULES:
        try:
            found += list(rule(documents))
        except ConfigError as e:  # a command line that `commands` has refused
            found.append(f"{rule.__name__}: {e.message}")
    return found


def _template(workload: Document) -> Document:
    template = pod_template(workload)
    assert template is not None
    return template


def _ports(container: Document) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for p in container.get("ports", ())}


def _is_port(port: str | int, container: Document) -> bool:
    ports = _ports(container)
    return port in ports or port in ports.values()
