"""``benchmarks.figures``: marked places are filled from the recorded results, and what differs is named."""

import pytest

from benchmarks import figures

PAGE = (
    "Adam: <!-- figure: loss digits_autoencoder adam -->{}<!-- end --> nats.\n\n<!-- figure: widths -->{}<!-- end -->\n"
)


def test_marked_places_are_filled_and_filling_again_changes_nothing():
    page = figures.filled(PAGE.format("0.00", ""))
    assert figures.filled(page) == page and figures.differences(page) == []
    adam = figures.figure("loss digits_autoencoder adam")
    assert f"-->{adam}<!-- end --> nats." in page and float(adam) > 10
    assert "\n\n| width" in page and page.endswith(" |\n\n<!-- end -->\n"), "tables need empty lines around them"


def test_what_differs_is_named_with_both_texts():
    page = figures.filled(PAGE.format("", ""))
    adam = figures.figure("loss digits_autoencoder adam")
    (difference,) = figures.differences(page.replace(adam, "1.23"))
    assert difference == f"loss digits_autoencoder adam: expected '{adam}', got '1.23'"


@pytest.mark.parametrize("call", ["nothing", "loss nothing adam", "step_time deep_narrow adaptive adam"])
def test_figures_without_a_recorded_result_are_refused(call):
    """The last two methods were not trained in turn by one command, so that their times cannot be compared."""
    with pytest.raises((ValueError, KeyError)):
        figures.figure(call)


def test_numbers_at_the_start_of_a_line_are_refused():
    """There, Markdown takes the comment for a block, and the paragraph is torn apart."""
    with pytest.raises(ValueError, match="within a line"):
        figures.differences("Adam:\n<!-- figure: loss digits_autoencoder adam -->1<!-- end --> nats.")


def test_the_check_fails_where_a_page_differs(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for path in ("README.md", "benchmarks/README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(PAGE.format("", ""))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"python -m benchmarks\.figures"):
        figures.main(["--check"])
    figures.main([])
    figures.main(["--check"])
    assert "README.md: loss" in capsys.readouterr().out
