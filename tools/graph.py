"""A ComfyUI graph described once, written in both of ComfyUI's formats: for its canvas (UI) and for its server (API).

A `Graph` holds nodes in columns. What a node's sockets and widgets are, and in which order, is asked of a running
ComfyUI (`object_info`), so that a node's schema stays the only place for it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Pixels of ComfyUI's canvas.
TITLE, SLOT, WIDGET = 30, 20, 24
GAP, PADDING, GROUP_TITLE = 40, 20, 50
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# A seed's second widget: what happens to it after each run. "fixed" repeats the result, and lets ComfyUI reuse it.
AFTER_GENERATE = "fixed"
NOTE = "MarkdownNote"


@dataclass(frozen=True)
class Link:
    """The output called `name` of a node."""

    node: Node
    name: str


@dataclass
class Node:
    """One node. `inputs` are values and `Link`s by name; the rest take the defaults of the node's schema.

    `size` overrides what the schema would give: height for texts and previews. `files` are the model files it loads.
    """

    kind: str
    inputs: dict[str, Any]
    title: str | None = None
    size: tuple[int | None, int | None] = (None, None)
    color: tuple[str, str] | None = None
    files: Sequence[Mapping[str, str]] = ()

    def __getitem__(self, output: str) -> Link:
        return Link(self, output)


@dataclass
class Column:
    """Nodes one below the other, in a titled group; without a title there is no group."""

    title: str
    width: int
    nodes: list[Node] = field(default_factory=list)

    def add(self, kind: str, title: str | None = None, *, tall=None, color=None, files=(), **inputs: Any) -> Node:
        """A node at the end of the column; `tall` is its height where the schema's is not right."""
        node = Node(kind, inputs, title, (self.width, tall), color, files)
        self.nodes.append(node)
        return node

    def note(self, title: str, text: str) -> Node:
        """A text for the user, in Markdown, one line a paragraph."""
        return self.add(NOTE, title, tall=text_height(text, self.width), color=("#432", "#653"), text=text)


class Graph:
    """A graph to be written as `name.json`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.columns: list[Column] = []

    def column(self, title: str, width: int) -> Column:
        """A new column, right of the others."""
        self.columns.append(Column(title, width))
        return self.columns[-1]

    @property
    def nodes(self) -> list[Node]:
        return [node for column in self.columns for node in column.nodes]

    def api(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The graph as the server takes it: widget values and links by name."""
        schemas = self._schemas(info)
        ids = {id(node): number for number, node in enumerate(self.nodes, 1)}
        prompt = {}
        for node in self.nodes:
            if node.kind == NOTE:
                continue
            schema = schemas[id(node)]
            values: dict[str, Any] = {}
            for name in [*schema.widgets, *schema.sockets]:
                value = node.inputs[name] if name in node.inputs else schema.widgets.get(name)
                if isinstance(value, Link):
                    slot = schemas[id(value.node)].output(value.name)
                    value = [str(ids[id(value.node)]), slot]
                if value is not None:
                    values[name] = value
            prompt[str(ids[id(node)])] = {
                "inputs": values,
                "class_type": node.kind,
                "_meta": {"title": node.title or schema.title},
            }
        return prompt

    def ui(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The graph as the canvas opens it."""
        schemas = self._schemas(info)
        ids = {id(node): number for number, node in enumerate(self.nodes, 1)}
        places, groups = self._layout(schemas)
        links: list[list[Any]] = []
        entries = {id(node): _entry(node, ids[id(node)], schemas[id(node)], *places[id(node)]) for node in self.nodes}
        for node in self.nodes:
            for slot, entry in enumerate(entries[id(node)]["inputs"]):
                link = node.inputs.get(entry["name"])
                if not isinstance(link, Link):
                    continue
                source = schemas[id(link.node)].output(link.name)
                output = entries[id(link.node)]["outputs"][source]
                number = len(links) + 1
                entry["link"] = number
                output["links"] = [*(output["links"] or []), number]
                links.append([number, ids[id(link.node)], source, ids[id(node)], slot, output["type"]])
        return {
            # From the name, so that generating twice gives the same file.
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"https://arxiv.org/abs/2512.13492#{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": list(entries.values()),
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _schemas(self, info: Mapping[str, Any]) -> dict[int, Schema]:
        schemas = {id(node): Schema.of(node.kind, info) for node in self.nodes}
        for node in self.nodes:
            schema = schemas[id(node)]
            unknown = node.inputs.keys() - schema.widgets.keys() - schema.sockets.keys()
            if unknown:
                raise ValueError(f"{self.name}: {node.kind} has no input {', '.join(sorted(unknown))}")
        return schemas

    def _layout(self, schemas) -> tuple[dict[int, tuple[list[int], list[int]]], list[dict[str, Any]]]:
        """Position and size of every node, and the groups around the columns."""
        places, groups, x = {}, [], 0
        for column in self.columns:
            y = 0
            for node in column.nodes:
                width, height = node.size
                size = [width or 300, height or schemas[id(node)].height]
                places[id(node)] = ([x, y + TITLE], size)
                y += TITLE + size[1] + GAP
            if column.title:
                bounding = [
                    x - PADDING,
                    -GROUP_TITLE,
                    column.width + 2 * PADDING,
                    y - GAP + GROUP_TITLE + PADDING,
                ]
                groups.append(
                    {
                        "id": len(groups) + 1,
                        "title": column.title,
                        "bounding": bounding,
                        "color": "#3f789e",
                        "font_size": 24,
                        "flags": {},
                    }
                )
            x += column.width + 2 * PADDING + GAP
        return places, groups


@dataclass(frozen=True)
class Schema:
    """What the canvas makes of a node's schema: sockets with their types, widgets with their first values, outputs."""

    kind: str
    title: str
    sockets: dict[str, str]
    optional: frozenset[str]
    widgets: dict[str, Any]
    types: dict[str, str]
    # Widgets that bring a second one, which the server never sees; with its value.
    companions: dict[str, Any]
    outputs: list[tuple[str, str]]
    multiline: bool

    @classmethod
    def of(cls, kind: str, info: Mapping[str, Any]) -> Schema:
        if kind == NOTE:
            return cls(kind, "Note", {}, frozenset(), {"text": ""}, {"text": "STRING"}, {}, [], True)
        if kind not in info:
            raise ValueError(f"The running ComfyUI has no node {kind}")
        node = info[kind]
        sockets, optional, widgets, types, companions, multiline = {}, set(), {}, {}, {}, False
        for group in ("required", "optional"):
            for name in node["input_order"].get(group, ()):
                what, options = [*node["input"][group][name], {}][:2]
                type_ = "COMBO" if isinstance(what, list) else what
                if type_ not in WIDGET_TYPES or options.get("forceInput"):
                    sockets[name] = type_
                    if group == "optional":
                        optional.add(name)
                    continue
                widgets[name], types[name] = _first_value(what, options), type_
                multiline |= bool(options.get("multiline"))
                if options.get("control_after_generate"):
                    companions[name] = AFTER_GENERATE
                if options.get("image_upload"):
                    companions[name] = "image"
        outputs = list(zip(node["output_name"], node["output"], strict=True))
        title = node["display_name"] or kind
        return cls(kind, title, sockets, frozenset(optional), widgets, types, companions, outputs, multiline)

    def output(self, name: str) -> int:
        """The number of the output called `name`."""
        return [output for output, _ in self.outputs].index(name)

    @property
    def height(self) -> int:
        """Pixels below the title bar, as the canvas computes them."""
        rows, widgets = max(len(self.sockets), len(self.outputs)), len(self.widgets) + len(self.companions)
        return SLOT * rows + 6 + (WIDGET * widgets + 8 if widgets else 0)


def _first_value(what: Any, options: Mapping[str, Any]) -> Any:
    choices = what if isinstance(what, list) else options.get("options", [])
    if "default" in options:
        return options["default"]
    if choices:
        return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]
    return {"STRING": "", "BOOLEAN": False}.get(str(what), 0) if not isinstance(what, list) else None


def _entry(node: Node, number: int, schema: Schema, position: list[int], size: list[int]) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = []
    for name, type_ in schema.sockets.items():
        # Shape 7 is the hollow socket of an optional input.
        inputs.append({"name": name, "type": type_, "link": None, **({"shape": 7} if name in schema.optional else {})})
    if node.kind != NOTE:
        inputs += [
            {"name": name, "type": schema.types[name], "widget": {"name": name}, "link": None}
            for name in schema.widgets
        ]
    values: list[Any] = []
    for name, first in schema.widgets.items():
        value = node.inputs.get(name, first)
        values.append(first if isinstance(value, Link) else value)
        values += [schema.companions[name]] if name in schema.companions else []
    properties: dict[str, Any] = {} if node.kind == NOTE else {"Node name for S&R": node.kind}
    if node.files:
        properties["models"] = [dict(file) for file in node.files]
    return {
        "id": number,
        "type": node.kind,
        "pos": position,
        "size": size,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": name, "type": type_, "links": None} for name, type_ in schema.outputs],
        **({"title": node.title} if node.title else {}),
        "properties": properties,
        "widgets_values": values,
        **({"color": node.color[0], "bgcolor": node.color[1]} if node.color else {}),
    }


def boxes(ui: Mapping[str, Any]) -> dict[int, list[float]]:
    """Where each node of a UI file lies, title bar included: left, top, right, bottom."""
    found = {}
    for node in ui["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        found[node["id"]] = [x, y - TITLE, x + width, y + height]
    return found


def overlaps(boxes: Mapping[int, Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of nodes, by number, that cover each other."""
    return [
        (a, b)
        for a, p in boxes.items()
        for b, q in boxes.items()
        if a < b and max(p[0], q[0]) < min(p[2], q[2]) and max(p[1], q[1]) < min(p[3], q[3])
    ]


def text_height(text: str, width: int) -> int:
    """A height, in pixels, in which a note of this width shows a Markdown text; rather too much than too little."""
    height = 30.0
    for line in filter(None, text.splitlines()):
        if line.startswith("#"):
            height += 30
        else:
            height += 14 * math.ceil(len(line) * 5.3 / (width - 40)) + (0 if line.startswith(("-", " ")) else 9)
    return int(height)
