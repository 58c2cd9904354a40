"""What the site has beside the pages of docs/: the reference of the recipe, made of its schema; links to it from every
field that a page names; and files of the repository, which are no part of it, by their names."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qft.arrive.explain import explain, field_names
from qft.recipe import json_schema

ROOT = Path(__file__).parents[1]
REFERENCE = "reference.md"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")
CODE = re.compile(r"(?<![`\[])`([a-z_]+(?:\.[a-z_]+)?)`(?![`\]])")


def on_files(files: Any, config: Any) -> Any:
    """The reference as one more page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, REFERENCE, content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ as the names of files, and fields as links. Warns of a file that is not there, which ends the
    build."""
    for link in OUTSIDE.finditer(markdown):
        if not (ROOT / link[2]).exists():
            logging.getLogger("mkdocs.hooks").warning("%s: no file %s in the repository", page.file.src_uri, link[2])
    markdown = OUTSIDE.sub(lambda link: f"`{link[2]}`", markdown)
    return markdown if page.file.src_uri == REFERENCE else linked(markdown)


def linked(markdown: str) -> str:
    """`train.max_steps` as a link to what the reference says of it, but in headings."""
    known = field_names()

    def link(code: re.Match[str]) -> str:
        field = code[1]
        return f"[{code[0]}]({REFERENCE}#{anchor(field)})" if field in known and "." in field else code[0]

    return "\n".join(line if line.startswith("#") else CODE.sub(link, line) for line in markdown.splitlines())


def anchor(field: str) -> str:
    return field.replace(".", "-")


def reference() -> str:
    """Markdown: a section of the recipe, a heading; a field, a row; then the parts that fields are made of."""
    schema, names = json_schema(), list(field_names())
    lines = [
        "# Recipe reference",
        "",
        "Made of the schema, that of `qft schema`. `qft explain FIELD` says the same.",
    ]
    for section in (name for name in names if "." not in name):
        found = explain(section)
        lines += ["", f"## {section} {{ #{section} }}", "", found.meaning]
        lines += list(table(found.inner)) if found.inner else ["", f"Takes {found.takes}."]
    used = {each.meaning for each in map(explain, names)}
    for name, part in sorted(schema["$defs"].items()):
        if "properties" in part and one_line(part.get("description", "")) not in used:
            lines += ["", f"## Of {name} {{ #of-{name.lower()} }}", "", one_line(part.get("description", ""))]
            lines += ["", "| key | meaning |", "| --- | --- |"]
            lines += [f"| `{key}` | {cell(each.get('description', ''))} |" for key, each in part["properties"].items()]
    return "\n".join([*lines, ""])


def table(fields: tuple[str, ...]) -> Iterator[str]:
    yield from (
        "",
        "| field | meaning | takes | default | read by | elsewhere |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    for field in fields:
        found = explain(field)
        peers = "; ".join(f"{tool}: {', '.join(f'`{key}`' for key in keys)}" for tool, keys in found.peers.items())
        mark = f'<a id="{anchor(field)}"></a>`{field.partition(".")[2]}`'
        yield f"| {mark} | {' | '.join(map(cell, (found.meaning, found.takes, found.default, found.reader, peers)))} |"


def cell(text: str) -> str:
    """Of a table: braces and angles are no markup."""
    return one_line(text).replace("|", r"\|").replace("<", "&lt;").replace("{", "&#123;")


def one_line(text: str) -> str:
    return " ".join(text.split())
