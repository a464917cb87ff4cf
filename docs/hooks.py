"""What mkdocs runs while it builds the site: pages that are made from the code, so that they cannot differ from it.

The page of all configuration keys comes from the dataclasses, the list of messages from the `raise` statements.
`python docs/hooks.py` prints both.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from latentcodec.training.config import Config

INTRODUCTION = """# Configuration

Every key of a training run, with its default and its unit. In a YAML file sections are nested; on the command line a
key is `--section.key value`. An unknown key or a value of the wrong type ends the run with its name before anything
begins.

```yaml
output_dir: runs/photos
data:
  path: path/to/photos
train:
  max_steps: 20000
```
"""


PACKAGE = Path(__file__).parents[1] / "latentcodec"
CURES = Path(__file__).with_name("cures.md")
FOR_USERS = {
    "ValueError",
    "OSError",
    "StoreError",
    "UnreadableImage",
    "CheckpointError",
}  # what a user can mend


def on_files(files: Any, config: Any) -> Any:
    """Add the generated page to those that lie in docs/ (called by mkdocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the list of messages where a page asks for it (called by mkdocs)."""
    return markdown.replace("<!-- messages -->", messages())


def messages() -> str:
    """Markdown: a section for each room of the package with cause and cure, and the messages of its errors, sorted.

    Raises KeyError for a room whose messages have no cure in `cures.md`.
    """
    sections = CURES.read_text().split("\n## ")[1:]
    cures = {room: text.strip() for room, _, text in (section.partition("\n") for section in sections)}
    rooms: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        rooms.setdefault(room, set()).update(_messages(file))
    return "\n\n".join(
        "\n".join([f"### {room}", "", cures[room], "", *(f"- `{text}`" for text in sorted(texts))])
        for room, texts in rooms.items()
        if texts
    )


def _messages(file: Path) -> list[str]:
    """The texts of the errors that a file raises, with `...` for what is only known when it happens."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = getattr(node.exc.func, "id", "")
            text = _text(node.exc.args[-1]) if name in FOR_USERS else ""
            if len(text.replace("...", "").strip()) > 10:
                found.append(text.replace("`", "'"))
    return found


def _text(node: ast.expr) -> str:
    """A string or f-string as its reader sees it."""
    match node:
        case ast.Constant(value=str(text)):
            return " ".join(text.split(" "))
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) if isinstance(part, ast.Constant) else "..." for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
        case _:
            return "..."


def configuration_page() -> str:
    """Markdown: a table of keys for each section of `Config`."""
    sections = [INTRODUCTION, "## The run", _table(Config, "")]
    for field in dataclasses.fields(Config):
        kind = get_type_hints(Config)[field.name]
        if dataclasses.is_dataclass(kind):
            sections += [
                f"## {field.name}",
                inspect.cleandoc(kind.__doc__ or ""),
                _table(kind, f"{field.name}."),
            ]
    return "\n\n".join(sections) + "\n"


def _table(kind: Any, prefix: str) -> str:
    """Rows: key, default, meaning; the keys of a dataclass inside a section follow under their longer names."""
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *_rows(kind, prefix)])


def _rows(kind: Any, prefix: str) -> list[str]:
    rows: list[str] = []
    hints, meanings = get_type_hints(kind), _meanings(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if not dataclasses.is_dataclass(inner):
            meaning = " ".join(meanings[field.name].split()).replace("|", "\\|")
            rows.append(f"| `{prefix}{field.name}` | {_default(field)} | {meaning} |")
        elif prefix:  # the sections themselves have a heading each
            rows += _rows(inner, f"{prefix}{field.name}.")
    return rows


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meanings(kind: Any) -> dict[str, str]:
    """The string under each field of a dataclass. Raises KeyError later for a field without one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            found[statement.target.id] = str(following.value.value)
    return found


if __name__ == "__main__":
    print(configuration_page())
    print(messages())
