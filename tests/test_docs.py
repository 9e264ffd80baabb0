"""Every number and table that the docs show comes from a run: these are the runs."""

import doctest
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def test_every_number_of_the_walkthrough() -> None:
    results = doctest.testfile(str(DOCS / "walkthrough.md"), module_relative=False)
    assert results.attempted >= 20
    assert results.failed == 0


def test_the_readme_shows_the_table_of_the_csv() -> None:
    script = str(DOCS / "results" / "compare_twins.py")
    table = runpy.run_path(script, run_name="compare_twins")["table"]()
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- twins -->\n")[2].partition("\n<!-- /twins -->")[0]
    assert shown == table


@pytest.mark.parametrize("study", ["digits", "boundary", "smollm2"])
def test_the_guide_shows_the_tables_of_the_csvs(study: str) -> None:
    table = runpy.run_path(str(DOCS / "results" / f"{study}.py"), run_name=study)["table"]()
    guide = (DOCS / "qat.md").read_text(encoding="utf-8")
    shown = guide.partition(f"<!-- {study}:begin -->\n")[2].partition(f"\n<!-- {study}:end -->")[0]
    assert shown == table


@pytest.mark.parametrize("study", ["training", "int8_backward", "busy"])
def test_the_page_on_training_shows_the_tables_of_the_csvs(study: str) -> None:
    table = runpy.run_path(str(DOCS / "results" / f"{study}.py"), run_name=study)["table"]()
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {study}:begin -->\n")[2].partition(f"\n<!-- {study}:end -->")[0]
    assert shown == table != ""


def test_a_report_draws_the_page_on_training(
    bitnet: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    marks = ("kernels", "machine-code")
    for name in ("README.md", "kernels/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "".join(f"<!-- {mark}:begin -->\n<!-- {mark}:end -->\n" for mark in marks)
        (tmp_path / name).write_text(text)
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    page = results.parent / "training.md"
    page.write_text("head\n<!-- training:begin -->\nold\n<!-- training:end -->\ntail\n")
    figures = sorted((DOCS / "results").glob("train_*.csv"))[0]
    shutil.copy(figures, results)
    code, said, err = bitnet("bench", "report", "--root", tmp_path)
    assert code == 0, err
    assert "docs/training.md: written" in said
    drawn = page.read_text(encoding="utf-8")
    assert "old" not in drawn
    model = figures.read_text(encoding="utf-8").splitlines()[1].split(",")[0]
    assert drawn.startswith(f"head\n<!-- training:begin -->\n**{model}** (")
    assert drawn.endswith(" |\n<!-- training:end -->\ntail\n")
    assert bitnet("bench", "report", "--check", "--root", tmp_path)[0] == 0


def test_every_target_of_make_has_a_recipe() -> None:
    """A phony target without a rule does nothing and succeeds."""
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*##.*\n\t", makefile, re.MULTILINE), target
