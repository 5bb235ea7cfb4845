"""Kubernetes manifests as they reach a cluster: what `kubectl kustomize` makes, as far as ours use it, and their schemas."""

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

Document = dict[str, Any]
KUBERNETES = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSIONS = (
    "1.29",
    "1.37",
)  # of Kubernetes: the oldest we mean to run on, and the newest whose schemas we have
CLUSTER_WIDE = {"Namespace"}
UNDERSTOOD = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
NEEDED = {"size", "version", "storageSpec"}  # without storage a member that restarts has lost what it knew
ETCD_FIELDS = {*NEEDED, "imageRegistry", "tls", "etcdOptions", "podTemplate"}  # of operator.etcd.io/v1alpha1
ETCD_STORAGE_FIELDS = {"accessModes", "storageClassName", "pvcName", "volumeSizeRequest", "volumeSizeLimit"}


def build(directory: Path) -> list[Document]:
    """What a directory with a kustomization.yaml comes to. Raises ValueError for what this does not know how to do."""
    plan = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := set(plan) - UNDERSTOOD:
        raise ValueError(f"{directory.name}: kustomization with {sorted(unknown)}")
    documents: list[Document] = []
    for name in plan["resources"]:
        path = directory / name
        # anchors become one object in several places: copies, so that a patch changes one of them
        documents += (
            build(path) if path.is_dir() else [copy.deepcopy(d) for d in yaml.safe_load_all(path.read_text())]
        )
    documents = [yaml.safe_load(_flat(document)) for document in documents]
    for patch in plan.get("patches", ()):
        _patch(documents, patch["target"], yaml.safe_load((directory / patch["path"]).read_text()))
    for document in documents:
        if document["kind"] not in CLUSTER_WIDE:
            document["metadata"]["namespace"] = plan["namespace"]
        for container in containers(document):
            container["image"] = _image(container["image"], plan.get("images", ()))
    return documents


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flat(document: Document) -> str:
    return yaml.dump(document, Dumper=_Plain)


def _image(image: str, changes: Any) -> str:
    name = image.partition(":")[0]
    for change in changes:
        if change["name"] == name:
            return f"{change.get('newName', name)}:{change['newTag']}"
    return image


def _patch(documents: list[Document], target: dict[str, str], operations: list[dict[str, Any]]) -> None:
    (document,) = [
        d for d in documents if d["kind"] == target["kind"] and d["metadata"]["name"] == target["name"]
    ]
    for operation in operations:
        *way, last = operation["path"].removeprefix("/").split("/")
        at: Any = document
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        if isinstance(at, list):
            if operation["op"] == "add" and last == "-":
                at.append(operation["value"])
            elif operation["op"] == "replace":
                at[int(last)] = operation["value"]
            else:
                raise ValueError(f"a patch with {operation['op']} {operation['path']}")
        elif operation["op"] == "add" or (operation["op"] == "replace" and last in at):
            at[last] = operation["value"]
        else:
            raise ValueError(f"a patch with {operation['op']} {operation['path']}")


def pod_template(document: Document) -> Document | None:
    return (
        document["spec"].get("template") if document["kind"] in ("StatefulSet", "Deployment", "Job") else None
    )


def containers(document: Document) -> list[Document]:
    template = pod_template(document)
    return template["spec"]["containers"] if template is not None else []


def schema_complaints(documents: list[Document]) -> list[str]:
    """Unknown fields count as wrong, as they do for `kubectl apply --validate=strict`."""
    found = []
    for document in documents:
        name = f"{document.get('kind')} {document.get('metadata', {}).get('name')}"
        if document.get("apiVersion") == "operator.etcd.io/v1alpha1":
            found += [f"{name}: {complaint}" for complaint in _etcd_complaints(document)]
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as e:
                found.append(f"{name}, Kubernetes {version}: {e.message}")
    return found


def _etcd_complaints(document: Document) -> list[str]:
    """The operator's own kind, whose schema comes with the operator: its fields by name."""
    spec = document["spec"]
    found = [f"no field {name}" for name in sorted(set(spec) - ETCD_FIELDS)]
    found += [
        f"no storage field {name}" for name in sorted(set(spec.get("storageSpec", ())) - ETCD_STORAGE_FIELDS)
    ]
    found += [f"{name} is missing" for name in sorted(NEEDED - set(spec))]
    if document["kind"] != "EtcdCluster":
        found.append("the operator has no such kind")
    return found
