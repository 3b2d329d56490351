#!/usr/bin/env python3
"""Writes wire.txt from the published modules: wire.py MODULES_FOLDER > wire.txt, MODULES_FOLDER = the Go module cache's k8s.io folder."""

import pathlib
import re
import sys

LEVEL = "v0.36.3"
API = [
    "admissionregistration/v1", "apps/v1", "authentication/v1", "authorization/v1", "autoscaling/v1", "autoscaling/v2",
    "batch/v1", "certificates/v1", "coordination/v1", "core/v1", "discovery/v1", "events/v1", "flowcontrol/v1",
    "networking/v1", "node/v1", "policy/v1", "rbac/v1", "resource/v1", "scheduling/v1", "storage/v1",
]
GROUPS = {
    "core": "", "apps": "apps", "autoscaling": "autoscaling", "batch": "batch", "policy": "policy",
    "rbac": "rbac.authorization.k8s.io", "flowcontrol": "flowcontrol.apiserver.k8s.io",
}
OTHERS = [
    ("apimachinery@%s/pkg/apis/meta/v1" % LEVEL, "meta.k8s.io/v1"),
    ("apiextensions-apiserver@%s/pkg/apis/apiextensions/v1" % LEVEL, "apiextensions.k8s.io/v1"),
    ("kube-aggregator@%s/pkg/apis/apiregistration/v1" % LEVEL, "apiregistration.k8s.io/v1"),
]
META = "k8s.io.apimachinery.pkg.apis.meta.v1."
EXTENSIONS = "k8s.io.apiextensions_apiserver.pkg.apis.apiextensions.v1."
SPECIAL = {
    "k8s.io.apimachinery.pkg.api.resource.Quantity": "quantity",
    "k8s.io.apimachinery.pkg.util.intstr.IntOrString": "intstr",
    "k8s.io.apimachinery.pkg.runtime.RawExtension": "raw",
    META + "Time": "time", META + "MicroTime": "microtime", META + "FieldsV1": "raw",
    EXTENSIONS + "JSON": "raw",
    EXTENSIONS + "JSONSchemaPropsOrArray": "schemaOrList",
    EXTENSIONS + "JSONSchemaPropsOrBool": "schemaOrBool",
    EXTENSIONS + "JSONSchemaPropsOrStringArray": "schemaOrStrings",
}
SCALARS = {"string", "bool", "int32", "int64", "double", "bytes"}
# Not sent as objects: they are read from queries, or have no JSON form of their own.
SKIP = {META + n for n in ("Time", "MicroTime", "Timestamp", "FieldsV1", "TypeMeta", "GroupKind", "GroupVersion",
                           "WatchEvent", "Duration", "ListOptions", "TableOptions", "Patch", "RootPaths")} | {"k8s.io.api.core.v1.List"}


def go_fields(folder):
    """Struct name -> field number -> (JSON name or "" when inlined, omitted when empty, pointer); names of types that are no structs."""
    structs, lists = {}, set()
    for file in folder.glob("*.go"):
        if file.name.startswith(("zz_", "generated")) or file.name.endswith("_test.go"):
            continue
        current = None
        for line in file.read_text().splitlines():
            if m := re.match(r"type (\w+) struct", line):
                current = structs.setdefault(m[1], {})
            elif m := re.match(r"type (\w+) \[\]string", line):
                lists.add(m[1])
            elif line.startswith("}"):
                current = None
            elif current is not None and (m := re.match(r"\s+(\S.*?)\s*`(.*)`", line)):
                json, proto = re.search(r'json:"([^"]*)"', m[2]), re.search(r'protobuf:"\w+,(\d+)', m[2])
                if json and proto:
                    name, _, options = json[1].partition(",")
                    name = "" if "inline" in options else name
                    go = m[1].split()[-1]
                    current[int(proto[1])] = (name, "omit" in options, go.startswith("*"))
    return structs, lists


def main(root):
    sources = [(root / f"api@{LEVEL}" / p, (GROUPS.get(p.split("/")[0], p.split("/")[0] + ".k8s.io") + "/" + p.split("/")[1]).lstrip("/")) for p in API]
    sources += [(root / p, gv) for p, gv in OTHERS]
    print("# Protobuf numbers of the API types of Kubernetes 1.36, by wire.py. See src/protobuf/table.rs for the form.")
    for folder, version in sources:
        text = (folder / "generated.proto").read_text()
        package = re.search(r"^package ([\w.]+);", text, re.M)[1]
        structs, lists = go_fields(folder)
        print(f"@{package} {version}")
        for name, body in re.findall(r"^message (\w+) \{\n(.*?)^\}", text, re.M | re.S):
            if f"{package}.{name}" in SPECIAL or f"{package}.{name}" in SKIP:
                continue
            if name in lists:
                print(f"{name} list")
                continue
            print(name)
            for label, kind, number in re.findall(r"^  (optional|repeated|map)(?: |(?=<))(.*?) \w+ = (\d+);", body, re.M):
                if label == "map":
                    kind = re.fullmatch(r"<string, (.*)>", kind)[1]
                kind = kind.removeprefix(".")
                if kind not in SCALARS:
                    kind = kind if "." in kind else f"{package}.{kind}"
                    kind = SPECIAL.get(kind, kind).removeprefix(package + ".")
                prefix = {"optional": "", "repeated": "[]", "map": "{}"}[label]
                if int(number) not in structs.get(name, {}):
                    sys.exit(f"{package}.{name} {number}: no tag")
                json, omit, pointer = structs[name][int(number)]
                flag = "*" if pointer else "" if omit else "!"
                print(f" {number} {json or '-'}{flag if label == 'optional' and json else ''} {prefix}{kind}")


main(pathlib.Path(sys.argv[1]))
