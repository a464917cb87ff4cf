"""Configuration files: YAML whose words mean what they say.

In the YAML 1.1 that PyYAML reads, `no` and `off` are false, `12:30` is 750 and `2024-01-01` a date. Here, as in YAML
1.2, only `true` and `false` are booleans, and what is no number and no boolean is a text. Aliases, with which nine
lines unfold to a billion values, keys that come twice and nesting without end are refused with their line.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 20  # levels of nesting; a configuration has three
NUMBERS = {  # YAML 1.2, section 10.3.2, with the underscores of 1.1
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9][0-9_]*",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")} | {"!"}


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the words of YAML 1.2."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key must be a word")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} comes twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if text.endswith((".inf", ".nan")):
        return math.nan if text == ".nan" else float(text.replace(".", ""))
    return float(text) if "float" in node.tag else int(text)


for _tag, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
    if _tag.endswith(("int", "float")):
        _Loader.add_constructor(_tag, _number)


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a configuration file; it may be a pipe, and is read once.

    Raises `OSError` where it cannot be read, and `ValueError` with the line of what is wrong.
    """
    text = path.read_text(encoding="utf-8")
    try:
        settings = _load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_in_one_line(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character #x{error.character:04x}, which YAML forbids") from error
    if not isinstance(settings, dict):  # of a text, errors would quote parts
        raise ValueError("it holds no keys, such as output_dir: runs/a")
    return settings


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    """Lines and faults; PyYAML's own words take several lines and name the file "<unicode string>"."""
    parts = [(error.context_mark, error.context), (error.problem_mark, error.problem)]
    said = "; ".join(f"line {mark.line + 1}: {what}" for mark, what in parts if mark and what)
    return said.replace("found character '\\t' that cannot start any token", "a tab; indent with spaces")


def _load(text: str) -> Any:
    """What the text holds, without aliases, tags that are not YAML's own, and nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        assert event.start_mark is not None  # of a text it is known
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: an alias (*{event.anchor}); write its value out")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in TAGS:
            raise ValueError(f"line {line}: the tag {tag}; write the value without it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {line}: more than {DEEPEST} levels of nesting")
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: no code runs
