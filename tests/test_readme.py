"""The README's code runs as it stands, and its two commands are those that CI and the examples know."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_blocks_run_one_after_another():
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    assert names["evaluation"].loss.isfinite()


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = "\n".join(README.splitlines()[:20])
    for extra, command in {"examples": "python -m examples.digits_autoencoder", "test": "python -m pytest"}.items():
        assert f"python -m pip install -c constraints.txt -e '.[{extra}]' && {command}\n" in first_screen
