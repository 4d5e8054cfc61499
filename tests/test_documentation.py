"""The code of README and documentation runs as it stands; the README's two commands are those that CI and the examples
know; every public name has its place, and every message that is explained exists.
"""

import ast
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.public import public_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def with_code():
    return [page for page in PAGES if CODE.search(page.read_text())]


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.name)
def test_code_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    """In one namespace and an empty folder. Compiled functions are traced whole, but run without the compiler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    for found in CODE.finditer(text):
        # Empty lines in front, so that the numbers of lines in a traceback are those of the page.
        lines = text.count("\n", 0, found.start(1))
        exec(compile("\n" * lines + found.group(1), str(page), "exec"), names)


def test_there_is_code_on_the_pages_that_show_how():
    assert {"README", "index", "tutorial", "modules", "structures", "recipes", "diagnostics", "reproducibility"} <= {
        page.stem for page in with_code()
    }


def test_code_is_marked_as_python_or_not_at_all():
    """A block in another spelling would not be run."""
    for page in PAGES:
        assert set(re.findall(r"^```(\S+)$", page.read_text(), re.MULTILINE)) <= {"python"}, page.name


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = "\n".join(PAGES[0].read_text().splitlines()[:20])
    for extra, command in {"examples": "python -m examples.digits_autoencoder", "test": "python -m pytest"}.items():
        assert f"python -m pip install -c constraints.txt -e '.[{extra}]' && {command}\n" in first_screen


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r"^::: lrkfac\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name for name, _ in public_names()} <= set(listed)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert set(re.findall(r"(\w+\.md)", navigation)) == {page.name for page in PAGES[1:]}


def test_every_example_is_on_the_first_page():
    found = {path.stem for path in (ROOT / "examples").glob("*.py") if "def main(" in path.read_text()}
    listed = re.findall(r"`python -m examples\.(\w+)`", (ROOT / "docs" / "index.md").read_text())
    assert set(listed) == found


@cache
def messages():
    """The strings of the package, what is filled in replaced by an ellipsis."""
    found = []
    for path in (ROOT / "lrkfac").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{[^{}]*\}", "…", node.value))
    return [message.replace("'…'", "…") for message in found]


def explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().split("## No message")[0]
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("message", explained())
def test_every_message_that_is_explained_exists(message):
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert any(re.search(pattern, one, re.DOTALL) for one in messages()), message
