"""Objects as tables, which is how kubectl asks for them (``as=Table``). Source: meta.k8s.io/v1, Table."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from greenroom.testing.fake_kube.objects import Object
from greenroom.testing.fake_kube.resources import Column, Resource
from greenroom.testing.fake_kube.selectors import json_path


def wanted(headers: Mapping[str, str]) -> bool:
    return "as=Table" in headers.get("accept", "").partition(",")[0]


def table(resource: Resource, found: list[Object], metadata: dict[str, Any], now: float) -> dict[str, Any]:
    columns = [Column("Name", "string", ".metadata.name"), *resource.columns]
    if not any(c.path == ".metadata.creationTimestamp" for c in columns):
        columns.append(Column("Age", "date", ".metadata.creationTimestamp"))
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata or ({"resourceVersion": found[0]["metadata"]["resourceVersion"]} if found else {}),
        "columnDefinitions": [
            {
                "name": c.name,
                "type": "string" if c.type == "date" else c.type,
                "format": "name" if c.name == "Name" else "",
                "description": c.description,
                "priority": c.priority,
            }
            for c in columns
        ],
        "rows": [
            {
                "cells": [_cell(obj, column, now) for column in columns],
                "object": {
                    "kind": "PartialObjectMetadata",
                    "apiVersion": "meta.k8s.io/v1",
                    "metadata": obj["metadata"],
                },
            }
            for obj in found
        ],
    }


def _cell(obj: Object, column: Column, now: float) -> Any:
    value = json_path(obj, column.path)
    if column.type == "date":
        if not value:
            return "<unknown>"
        return _age(now - datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
    if column.type == "string" and value is not None and not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value


def _age(seconds: float) -> str:
    for size, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{letter}"
    return f"{max(0, int(seconds))}s"
