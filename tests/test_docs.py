"""Every number and table that the docs show comes from a run: these are the runs."""

import doctest
import re
import runpy
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from bitnet.cli.main import bitnet as bitnet_group
from bitnet.config import Config

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(("page", "examples"), [("walkthrough.md", 20), ("quantization.md", 5)])
def test_every_number_of_an_example(page: str, examples: int) -> None:
    results = doctest.testfile(str(DOCS / page), module_relative=False)
    assert results.attempted >= examples
    assert results.failed == 0


def test_the_readme_shows_the_figures_of_the_csvs() -> None:
    """The picture is drawn again; the text of the results names the figures of the ternary bars."""
    overview = runpy.run_path(str(DOCS / "results" / "overview.py"), run_name="overview")
    assert (DOCS / "results" / "overview.svg").read_text(encoding="utf-8") == overview["svg"](), (
        "stale; run python docs/results/overview.py"
    )
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    results = " ".join(readme.partition("\n## Results\n")[2].split())
    for name, bars in (("quality", 2), ("training", 2), ("decoding", 2)):
        for bar in overview[name]().bars[-bars:]:
            assert f" {bar.shown.rstrip('x')} " in results


def test_every_document_that_code_cites_exists() -> None:
    root = DOCS.parent
    code = [root / "train.py", *(root / "bitnet").rglob("*.py"), *(root / "kernels").rglob("*.py")]
    for path in [*code, *(DOCS / "results").glob("*.py")]:
        for name in re.findall(r"[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
            assert (root / name).is_file(), f"{path}: {name}"


GUIDES = sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "kernels/README.md", *GUIDES]
CONFIGS = [f"configs/{name}" for name in ("qat.toml", "quickstart.toml", "15m.toml", "60m.toml")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path = DOCS.parent / page
    for file, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        target = path.parent / file if file else path
        assert target.exists(), file
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert anchor in anchors, f"{file}#{anchor}"
    if path.name != "LOG.md":  # which names the files of its day
        named = r"`((?:bitnet|bitnet_kernels|tests|docs|configs)/[\w/-]+\.\w+)`"
        for file in re.findall(named, path.read_text(encoding="utf-8")):
            assert (DOCS.parent / file).is_file(), file


def test_the_readme_links_every_guide() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert [guide for guide in GUIDES if f"]({guide}" not in readme] == []


def commands(text: str) -> list[str]:
    """The code of a page that runs ``bitnet``, without comments; continued lines are joined."""
    inline = re.findall(r"`(bitnet [a-z][^`]*)`", text)
    blocks = re.findall(r"^```\n([^`]*)^```|((?:^    .*\n)+)", text, re.MULTILINE)
    lines = "".join(map("".join, blocks)).replace("\\\n", " ").splitlines()
    found = [*inline, *(line for line in lines if re.match(r" *bitnet [a-z]+( |$)", line))]
    return [" ".join(line.partition(" #")[0].split()) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    for line in commands((DOCS.parent / page).read_text(encoding="utf-8")):
        words = line.split()[1:]
        command: Any = bitnet_group
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not bitnet_group, line
        if words and hasattr(command, "commands"):  # `bitnet inspect CONFIG`
            command = command.commands["config"]
        options = [option.opts + option.secondary_opts for option in command.params]
        known = {"--help"}.union(*options)
        for word in words:
            assert not word.startswith("--") or word.partition("=")[0] in known, f"{line}: {word}"


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_every_key_of_a_config_exists(page: str) -> None:
    sections = get_type_hints(Config)
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    for section, key in re.findall(r"(?<![\w./])([a-z]+)\.(\w+) ?=(?!=)", text):
        if section in sections:
            assert key in get_type_hints(sections[section]), f"{section}.{key}"


def test_the_five_lines_of_the_readme() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    lines = text.partition("```python\n")[2].partition("```")[0]
    model = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), lm_head=nn.Linear(8, 4)))
    names: dict[str, Any] = {"model": model, "train": lambda model: model(torch.ones(1, 8))}
    exec(lines, names)
    kinds = [type(module).__name__ for module in names["model"]]
    assert kinds == ["TernaryLinear", "Linear"]


def test_the_stable_names_can_be_imported() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    imports = re.findall(r"^from bitnet.* import .+$", text, re.MULTILINE)
    assert len(imports) == 3
    exec("\n".join(imports), {})


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


@pytest.mark.parametrize("study", ["faults", "soak"])
def test_the_page_on_processes_shows_the_tables_of_the_csvs(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DOCS / "results")  # a study of several files
    table = runpy.run_path(str(DOCS / "results" / f"{study}.py"), run_name=study)["table"]()
    page = (DOCS / "distributed.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {study}:begin -->\n")[2].partition(f"\n<!-- {study}:end -->")[0]
    assert shown == table != ""


@pytest.mark.parametrize(
    ("study", "page"),
    [
        ("scaling", "README.md"),
        ("scaling", "docs/evidence.md"),
        ("scaling rates", "docs/evidence.md"),
        ("telemetry", "docs/evidence.md"),
        ("ablations", "docs/evidence.md"),
        ("equal_bytes", "docs/evidence.md"),
    ],
)
def test_the_pages_on_evidence_show_the_tables_of_the_csvs(
    study: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, _, table = study.partition(" ")
    monkeypatch.syspath_prepend(DOCS / "results")  # a study of several files
    names = runpy.run_path(str(DOCS / "results" / f"{script}.py"), run_name=script)
    text, mark = (DOCS.parent / page).read_text(encoding="utf-8"), table or script
    shown = text.partition(f"<!-- {mark}:begin -->\n")[2].partition(f"\n<!-- {mark}:end -->")[0]
    assert shown == names[table or "table"]() != ""


def test_a_report_draws_the_page_on_training(
    bitnet: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    marks = ("kernels", "machine-code")
    text = "".join(f"<!-- {mark}:begin -->\n<!-- {mark}:end -->\n" for mark in marks)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/README.md").write_text(text)
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
