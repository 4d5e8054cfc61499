"""``lrkfac.testing`` where hypothesis is not installed, and the rest of the package, which does not need it."""

import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_it_says_what_to_install():
    hide = "import sys; sys.modules['hypothesis'] = None\n"
    result = run(hide + "import lrkfac\nlrkfac.low_rank_kfac\nimport lrkfac.testing")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    expected = "hypothesis: lrkfac.testing needs it, and it is not installed; python -m pip install hypothesis"
    assert last == f"ImportError: {expected}"
    assert "During handling" not in result.stderr
