"""Makes the API's pages from ``docs/api.md``: one for each of its sections, and a table of all names in its place.

A hook of MkDocs. Nothing is imported: first sentences of docstrings are read by griffe, as mkdocstrings reads them.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SOURCE = "api.md"
NAME = re.compile(r"^::: lrkfac\.([\w.]+)$", re.MULTILINE)


def sections(text: str) -> dict[str, list[str]]:
    """The names under each heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {
        title: NAME.findall(body)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def address(title: str) -> str:
    return "api/" + re.sub(r"\W+", "-", title.lower()) + ".md"


@cache
def package() -> griffe.Object:
    found = griffe.load(
        "lrkfac", search_paths=[Path(__file__).parents[2]], resolve_aliases=True
    )
    assert isinstance(found, griffe.Object)
    return found


def first_sentence(name: str) -> str:
    """Of the docstring, as Markdown in a cell of a table."""
    docstring = package()[name].docstring
    text = " ".join(docstring.value.split("\n\n")[0].split()) if docstring else ""
    return re.sub(r"``", "`", text).replace("|", "\\|")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each section, and put them into the navigation."""
    titles = sections((Path(config.docs_dir) / SOURCE).read_text())
    for title, names in titles.items():
        text = (
            f"# {title}\n\n"
            + "\n".join(f"::: lrkfac.{name}" for name in names)
            + "\n"
        )
        files.append(File.generated(config, address(title), content=text))
    for entry in config.nav or []:
        if isinstance(entry, dict) and entry.get("API") == SOURCE:
            entry["API"] = [
                {"All names": SOURCE},
                *({title: address(title)} for title in titles),
            ]
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Show names and first sentences where the source lists what to document."""
    if page.file.src_uri != SOURCE:
        return markdown
    text = markdown.split("\n## ")[0]
    for title, names in sections(markdown).items():
        text += f"\n\n## [{title}]({address(title)})\n\n| name | |\n|---|---|\n"
        text += "\n".join(
            f"| [`{name}`]({address(title)}#lrkfac.{name}) | {first_sentence(name)} |"
            for name in names
        )
    return text
