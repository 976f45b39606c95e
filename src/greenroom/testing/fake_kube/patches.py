"""Ways to change a part of an object: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch, apply.

Lists are replaced as a whole by a merge patch. Strategic merge patches and apply know those of which each item has a
name (`KEYS`), as far as objects that are used here have them.
"""

from __future__ import annotations

import copy
from typing import Any

from greenroom.testing.fake_kube.errors import KubeError, bad_request

#: What tells the items of a list apart, by the list's name.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "conditions": "type",
    "ownerReferences": "uid",
    "imagePullSecrets": "name",
}
#: Lists that are sets of words.
SETS = {"finalizers"}


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def strategic(target: Any, patch: Any, name: str = "") -> Any:
    """Source: kubernetes/community, "Strategic Merge Patch"; of its directives ``$patch: delete`` and
    ``$deleteFromPrimitiveList``."""
    if isinstance(patch, dict):
        result = dict(target) if isinstance(target, dict) else {}
        for key, value in patch.items():
            if key.startswith("$deleteFromPrimitiveList/"):
                where = key.partition("/")[2]
                result[where] = [v for v in result.get(where) or () if v not in value]
            elif key.startswith("$"):
                continue
            elif value is None:
                result.pop(key, None)
            else:
                result[key] = strategic(result.get(key), value, key)
        return result
    if isinstance(patch, list) and name in SETS:
        return [*(target or ()), *(v for v in patch if v not in (target or ()))]
    if isinstance(patch, list) and name in KEYS:
        return _by_key(list(target or ()), patch, KEYS[name])
    return patch


def _by_key(items: list[Any], patch: list[Any], key: str) -> list[Any]:
    for wanted in patch:
        at = next((i for i, item in enumerate(items) if item.get(key) == wanted.get(key)), None)
        if wanted.get("$patch") == "delete":
            items = [item for i, item in enumerate(items) if i != at]
        elif at is None:
            items.append(wanted)
        else:
            items[at] = strategic(items[at], wanted)
    return items


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902. Raises `KubeError` (400 or 422) when it can't be applied."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    result = copy.deepcopy(target)
    for step in operations:
        try:
            result = _operate(result, step)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            message = f"the server rejected our request due to an error in our request: {step}: {error}"
            raise KubeError(422, "Invalid", message) from None
    return result


def _operate(root: Any, step: dict[str, Any]) -> Any:
    op, path = step["op"], _pointer(step["path"])
    if op in ("move", "copy"):
        source = _pointer(step["from"])
        value = copy.deepcopy(_get(root, source))
        if op == "move":
            root = _remove(root, source)
        return _add(root, path, value)
    if op == "test":
        if _get(root, path) != step["value"]:
            raise ValueError("testing value failed")
        return root
    if op == "remove":
        return _remove(root, path)
    if op == "replace":
        _get(root, path)
        return _add(_remove(root, path), path, step["value"]) if path else step["value"]
    if op == "add":
        return _add(root, path, step["value"])
    raise ValueError(f"unknown operation {op!r}")


def _pointer(path: str) -> list[str]:
    return [p.replace("~1", "/").replace("~0", "~") for p in path.split("/")[1:]]


def _get(root: Any, path: list[str]) -> Any:
    for part in path:
        root = root[int(part)] if isinstance(root, list) else root[part]
    return root


def _add(root: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent = _get(root, path[:-1])
    if isinstance(parent, list):
        parent.insert(len(parent) if path[-1] == "-" else int(path[-1]), value)
    else:
        parent[path[-1]] = value
    return root


def _remove(root: Any, path: list[str]) -> Any:
    parent = _get(root, path[:-1])
    del parent[int(path[-1]) if isinstance(parent, list) else path[-1]]
    return root


# --- server-side apply ------------------------------------------------------------------------------------

Field = tuple[str, ...]
#: Who an object is, which nobody owns.
_UNOWNED = {("apiVersion",), ("kind",), ("metadata",), ("metadata", "name"), ("metadata", "namespace")}


def apply(live: dict[str, Any], config: dict[str, Any], manager: str, *, force: bool) -> dict[str, Any]:
    """Server-side apply: the object as ``config`` says, without what this manager applied before and does not any more.

    Raises:
        KubeError: 409, another manager has set a field to another value and ``force`` is not given.
    """
    managed = [dict(m) for m in live.get("metadata", {}).get("managedFields", ())]
    mine = next((m for m in managed if m["manager"] == manager and m["operation"] == "Apply"), None)
    before = _decode(mine["fieldsV1"]) if mine else set()
    leaves = _leaves(config)
    conflicts = []
    for other in managed:
        theirs = _decode(other["fieldsV1"])
        for path, value in leaves.items():
            if other is not mine and path in theirs and _at(live, path) != value:
                conflicts.append((other["manager"], path))
                theirs.discard(path)
        if other is not mine:
            other["fieldsV1"] = _encode(theirs)
    if conflicts and not force:
        shown = "; ".join(f'conflict with "{who}": {_shown(path)}' for who, path in conflicts)
        causes = [
            {"reason": "FieldManagerConflict", "message": f'conflict with "{who}"', "field": _shown(path)}
            for who, path in conflicts
        ]
        raise KubeError(409, "Conflict", f"Apply failed with {len(conflicts)} conflict(s): {shown}", {"causes": causes})
    result = live
    elsewhere = set().union(*(_decode(m["fieldsV1"]) for m in managed if m is not mine))
    for path in sorted(before - set(leaves) - elsewhere, reverse=True):
        result = _without(result, path)
    for path, value in leaves.items():
        result = _with(result, path, value)
    entry = {"manager": manager, "operation": "Apply", "apiVersion": config["apiVersion"], "fieldsType": "FieldsV1"}
    kept = [m for m in managed if m is not mine and m["fieldsV1"]]
    managed = [*kept, {**entry, "fieldsV1": _encode(set(leaves))}]
    return {**result, "metadata": {**result["metadata"], "managedFields": managed}}


def own(before: dict[str, Any], after: dict[str, Any], manager: str) -> dict[str, Any]:
    """``after``, with the fields in which it differs as this manager's (operation Update)."""
    old, new = _leaves(before), _leaves(after)
    changed = {path for path, value in new.items() if old.get(path) != value}
    managed = []
    mine: set[Field] = set(changed)
    for entry in after["metadata"].get("managedFields", ()):
        fields = _decode(entry["fieldsV1"])
        if entry["manager"] == manager and entry["operation"] == "Update":
            mine |= fields & set(new)
            continue
        fields = (fields & set(new)) - changed
        if fields:
            managed.append({**entry, "fieldsV1": _encode(fields)})
    if mine:
        entry = {"manager": manager, "operation": "Update", "apiVersion": after["apiVersion"], "fieldsType": "FieldsV1"}
        managed.append({**entry, "fieldsV1": _encode(mine)})
    return {**after, "metadata": {**after["metadata"], "managedFields": managed}}


_SYSTEM = (
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "managedFields",
    "deletionTimestamp",
    "selfLink",
)


def _leaves(obj: dict[str, Any]) -> dict[Field, Any]:
    found: dict[Field, Any] = {}

    def walk(value: Any, path: Field) -> None:
        if isinstance(value, dict) and (value or not path):
            for name, child in value.items():
                walk(child, (*path, f"f:{name}"))
        elif isinstance(value, list) and path[-1][2:] in KEYS and all(KEYS[path[-1][2:]] in i for i in value):
            for item in value:
                key = KEYS[path[-1][2:]]
                walk(item, (*path, f"k:{key}={item[key]}"))
        elif isinstance(value, list) and path[-1][2:] in SETS:
            for item in value:
                found[(*path, f"v:{item}")] = item
        else:
            found[path] = value

    metadata = {k: v for k, v in obj.get("metadata", {}).items() if k not in _SYSTEM}
    walk({**obj, "metadata": metadata}, ())
    plain = {tuple(f"f:{p}" for p in path) for path in _UNOWNED}
    return {path: value for path, value in found.items() if path not in plain}


def _encode(fields: set[Field]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in sorted(fields):
        node = tree
        for part in path:
            node = node.setdefault(part, {})
    return tree


def _decode(tree: dict[str, Any]) -> set[Field]:
    found: set[Field] = set()

    def walk(node: dict[str, Any], path: Field) -> None:
        for part, child in node.items():
            walk(child, (*path, part))
        if not node and path:
            found.add(path)

    walk(tree, ())
    return found


def _at(obj: Any, path: Field) -> Any:
    for part in path:
        kind, _, name = part.partition(":")
        if kind == "f":
            obj = obj.get(name) if isinstance(obj, dict) else None
        elif kind == "k":
            key, _, value = name.partition("=")
            obj = next((i for i in obj or () if str(i.get(key)) == value), None)
        else:
            return name if name in (obj or ()) else None
    return obj


def _with(obj: Any, path: Field, value: Any) -> Any:
    if not path:
        return value
    kind, _, name = path[0].partition(":")
    if kind == "f":
        base = dict(obj) if isinstance(obj, dict) else {}
        return {**base, name: _with(base.get(name), path[1:], value)}
    items = list(obj) if isinstance(obj, list) else []
    if kind == "v":
        return items if value in items else [*items, value]
    key, _, wanted = name.partition("=")
    at = next((i for i, item in enumerate(items) if str(item.get(key)) == wanted), None)
    changed = _with({} if at is None else items[at], path[1:], value)
    return [*items, changed] if at is None else [*items[:at], changed, *items[at + 1 :]]


def _without(obj: Any, path: Field) -> Any:
    kind, _, name = path[0].partition(":")
    if kind == "f":
        if not isinstance(obj, dict) or name not in obj:
            return obj
        inner = _without(obj[name], path[1:]) if len(path) > 1 else None
        rest = {k: v for k, v in obj.items() if k != name}
        return rest if inner in (None, {}, []) else {**obj, name: inner}
    if kind == "v":
        return [v for v in obj or () if v != name]
    key, _, wanted = name.partition("=")
    kept = []
    for item in obj or ():
        if str(item.get(key)) == wanted:
            item = _without(item, path[1:]) if len(path) > 1 else {}
            if set(item) <= {key}:
                continue
        kept.append(item)
    return kept


def _shown(path: Field) -> str:
    return "".join(f".{p[2:]}" if p[0] == "f" else f"[{p[2:]}]" for p in path)
