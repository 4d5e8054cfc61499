"""The code of README, documentation and docstrings runs as it stands; every public name has its place, a full docstring
and an example; every message that is explained exists.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import tomllib
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lrkfac
from benchmarks import figures
from tests.public import public_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def title(page):
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


@pytest.fixture
def without_processes():
    """Ends the group of processes that a page has begun."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_blocks(page, folder, monkeypatch, library=None):
    """In one namespace and an empty folder. Compiled functions are traced whole, but run without the compiler."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if block.group(1) in (None, library):
            # Empty lines in front, so that the numbers of lines in a traceback are those of the page.
            lines = text.count("\n", 0, block.start(2))
            exec(compile("\n" * lines + block.group(2), str(page), "exec"), names)


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize("page", WITH_CODE, ids=title)
def test_code_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    run_blocks(page, tmp_path, monkeypatch)


NEEDS = sorted({(title(page), name) for page in PAGES for name, _ in BLOCK.findall(page.read_text()) if name})


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "library"), NEEDS)
def test_code_blocks_that_need_another_library_run(page, library, tmp_path, monkeypatch):
    """They are marked by a comment, ``<!-- needs: name -->``."""
    pytest.importorskip(library, reason="the extra 'peers' is not installed")
    run_blocks(ROOT / page, tmp_path, monkeypatch, library)


def test_libraries_that_code_blocks_need_are_installed_with_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {library for _, library in NEEDS} <= set(extras["peers"])
    marks = [re.findall("<!-- needs", page.read_text()) for page in PAGES]
    assert sum(map(len, marks)) == sum(bool(name) for page in PAGES for name, _ in BLOCK.findall(page.read_text()))


def test_code_is_on_the_pages_that_show_how_and_marked_as_python_or_not_at_all():
    """A block in another spelling would not be run."""
    guides = ("index", "tutorial", "modules", "frameworks", "structures", "tuning", "diagnostics")
    recipes = ("training", "models", "transformers", "science", "curvature", "extending")
    names = (*guides, "reproducibility", "distributed", *(f"recipes/{name}" for name in recipes))
    showing = {"README.md"} | {f"docs/{name}.md" for name in names}
    assert showing <= {title(page) for page in WITH_CODE}
    for page in PAGES:
        assert set(re.findall(r"^```(\S+)$", page.read_text(), re.MULTILINE)) <= {"python"}, title(page)


def test_the_index_of_recipes_leads_to_each_of_them():
    index = (ROOT / "docs" / "recipes.md").read_text()
    for page in (ROOT / "docs" / "recipes").glob("*.md"):
        for heading in re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE):
            anchor = re.sub(r"\s+", "-", re.sub(r"[^a-z0-9\s-]", "", heading.lower()))
            assert f"(recipes/{page.name}#{anchor})" in index, heading


def test_the_loop_with_adam_and_the_loop_that_replaces_it_train():
    """The README's block of changes, as it was and as it becomes."""
    (block,) = re.findall(r"^```\n(- .*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for mark in "-+":
        torch.manual_seed(0)
        code = "\n".join(line[2:] for line in block.splitlines() if line[0] in (" ", mark))
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        inputs, labels = torch.randn(20, 6), torch.arange(20) % 3
        before = F.cross_entropy(net(inputs), labels)
        names: dict[str, object] = {"torch": torch, "F": F, "lrkfac": lrkfac, "net": net, "example": inputs[:1]}
        names["loader"] = [(inputs, labels)] * 5
        exec(code, names)
        assert names["loss"] < before


def test_figures_are_as_recorded(capsys):
    figures.main(["--check"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page.name != "README.md"], ids=title)
def test_code_fits_into_the_boxes_of_the_site(page):
    """At most 84 columns, as `ruff format docs` makes them: a laptop's screen shows no more."""
    lines = "".join(CODE.findall(page.read_text())).splitlines()
    assert [line for line in lines if len(line) > 84] == []


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = "\n".join(PAGES[0].read_text().splitlines()[:20])
    for extra, command in {"examples": "python -m examples.digits_autoencoder", "test": "python -m pytest"}.items():
        assert f"python -m pip install -c constraints.txt -e '.[{extra}]' && {command}\n" in first_screen


def test_every_public_name_page_and_example_is_listed():
    listed = re.findall(r"^::: lrkfac\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name for name, _ in public_names()} <= set(listed)
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert set(re.findall(r"([\w/]+\.md)", navigation)) == {title(page).removeprefix("docs/") for page in PAGES[1:]}
    examples = {path.stem for path in (ROOT / "examples").glob("*.py") if "def main(" in path.read_text()}
    assert set(re.findall(r"`python -m examples\.(\w+)`", (ROOT / "docs" / "index.md").read_text())) == examples


MODULES = [name for _, name, _ in pkgutil.walk_packages(lrkfac.__path__, "lrkfac.") if not name.endswith("__main__")]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
        torch.manual_seed(0)
        runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


def sections(thing):
    return set(re.findall(r"^ *(Args|Attributes|Returns|Examples):$", inspect.getdoc(thing) or "", re.MULTILINE))


@pytest.mark.parametrize(("name", "thing"), public_names(), ids=[name for name, _ in public_names()])
def test_every_public_name_has_a_full_docstring_with_an_example(name, thing):
    text = inspect.getdoc(thing) or ""
    first, signature = text.split("\n\n")[0], inspect.signature(thing)
    assert first.endswith((".", ":")), "no first sentence"
    assert not re.match(r"(What|Those|That of|Whether|Refuses|Returns)\b", first), "it begins with no imperative"
    assert ">>> " in text and "Examples" in sections(thing), "no example"
    if inspect.isclass(thing):
        assert sections(thing) & {"Args", "Attributes"} or not getattr(thing, "__annotations__", {}), "no Args"
        return
    if signature.parameters:
        assert "Args" in sections(thing), "no Args"
        documented = set(re.findall(r"^ +\*{0,2}(\w+): ", text.split("Args:")[1], re.MULTILINE))
        assert set(signature.parameters) <= documented, "arguments without a word"
    if signature.return_annotation not in (None, "None"):
        assert "Returns" in sections(thing), "no Returns"


@cache
def messages():
    """The strings of the package, what is filled in replaced by an ellipsis."""
    strings = []
    for node in (x for path in (ROOT / "lrkfac").rglob("*.py") for x in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.JoinedStr):
            strings.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(re.sub(r"\{[^{}]*\}", "…", node.value))
    return [message.replace("'…'", "…") for message in strings]


def explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().split("## No message")[0]
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("message", explained())
def test_every_message_that_is_explained_exists(message):
    parts = message.split("…")
    longest, pattern = max(parts, key=len), re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    assert any(longest in one and pattern.search(one) for one in messages()), message
