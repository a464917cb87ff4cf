"""What is said of a setting that is refused: its key, what it may be, and what was given.

jsonargparse's accounts name Python types ("Expected a typing.Literal[...]"), which no user of a YAML file has written.
They are read by their fixed words here; one that is not known is given as it is, on one line.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
UNKNOWN = (
    r"Group '(?P<section>.+)' does not accept option '(?P<key>.+)'",
    r"unrecognized arguments: --(?P<key>[^\s=]+)",
)
VALUE = (
    r"Given value: (.*)",
    r"Got value: (.*)",
    r": (.*) does not conform",
    r": (.*) not an integer",
    r"could not convert string to float: '(.*)'",
    r"invalid literal for int\(\) with base 10: '(.*)'",
)


def refusal(error: str, kinds: Mapping[str, Any]) -> str:
    """The account of jsonargparse as one line for users.

    kinds: every setting with its type, such as {"train.lr": PositiveFloat}.
    """
    for pattern in UNKNOWN:
        if unknown := re.search(pattern, error):
            parts = unknown.groupdict()
            section = f"{parts['section']}." if parts.get("section") else ""
            return _no_such(section + parts["key"], kinds)
    if missing := re.search(r"the following arguments are required: (\S+)", error):
        return f"--{missing[1]} must be given; --help says what it is"
    keys = [key for key in re.findall(r'key "([^"]+)"', error) if key in kinds]
    if not keys:
        return " ".join(error.split())
    given = next((f", not {found[1]}" for p in VALUE if (found := re.search(p, error))), "")
    limits = re.search(r"does not conform to restriction (v.*)", error)
    allowed = _limits(limits[1]) if limits else wanted(kinds[keys[-1]])
    return f"{keys[-1]} must be {allowed}{given}"


def require_known(settings: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ValueError for the first key of a settings file that is neither a setting nor a section of them."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in kinds:
            continue
        if isinstance(value, Mapping) and value:
            require_known(value, kinds, f"{key}.")
        elif not any(known.startswith(f"{key}.") for known in kinds):
            raise ValueError(_no_such(key, kinds))


def _no_such(key: str, kinds: Mapping[str, Any]) -> str:
    """There is no such setting; those that are spelt nearly so, or have the same last word, are named."""
    last = key.rpartition(".")[2]
    near = get_close_matches(key, kinds, 2, 0.8) or [k for k in kinds if k.rpartition(".")[2] == last][:3]
    return f"there is no setting {key}" + (
        f"; did you mean {_either(near)}?" if near else "; --help lists them"
    )


def wanted(kind: Any) -> str:
    """What a value of this type is, in words: "a whole number > 0", "linear or default", "a text or null"."""
    return _either(_choices(kind))


def _choices(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return list(map(str, inner))
    if origin is list:
        return [f"a list, each value {wanted(inner[0])}"]
    if origin is tuple:
        return [f"a list of {len(inner)} values, each {wanted(inner[0])}"]
    if inner:  # a union
        return [choice for part in inner for choice in _choices(part)]
    if kind in NAMES:
        return [NAMES[kind]]
    number = next(name for base, name in NAMES.items() if issubclass(kind, base))
    return [f"{number} {_limits(getattr(kind, '_expression', ''))}".rstrip()]


def _limits(expression: str) -> str:
    """ "v>=0 and v<1" as ">= 0 and < 1"."""
    return re.sub(r"v([<>]=?)", r"\1 ", expression)


def _either(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
