"""What the documents say of the repository is so: the map of files, their length, the paths they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md", "model_cards/README.md")


def mapped_modules():
    """Paths that the map in CONTRIBUTING.md names, by its indentation."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    lines = text[text.index("    hf_ihb/\n") : text.index("    scripts/ ")].splitlines()
    stack, found = [], []
    for line in lines:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        stack[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            assert len(line.split()) > 1, f"{name}: says nothing"
            found.append("/".join(stack))
    return found


def test_the_map_of_files_names_every_module_once_and_nothing_else():
    there = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ihb").rglob("*.py")]
    assert sorted(mapped_modules()) == sorted(path for path in there if not path.endswith("__init__.py"))


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_links_to_is_there(name):
    folder = (ROOT / name).parent
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (folder / target).exists(), f"{name}: {target}"
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        other = (folder / target).read_text("utf-8") if target and "://" not in target else text
        headings = re.findall(r"^#+ (.*)$", other, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert "://" in target or anchor in anchors, f"{name}: #{anchor}"


def test_recipes_and_scripts_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text("utf-8")
    for path in re.findall(r"(?:recipes|scripts|benchmarks)/[\w/.-]+\.(?:json|py|md)", text):
        assert (ROOT / path).is_file(), path


def test_every_fault_has_a_test_that_is_there_or_a_reason():
    text = (ROOT / "tests" / "reliability.md").read_text("utf-8")
    cases = [int(number) for number in re.findall(r"^\| (\d+) ", text, flags=re.MULTILINE)]
    assert cases == list(range(1, 64))
    for path, name in re.findall(r"`([\w/]+\.py)::(test_\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / path).read_text("utf-8"), f"{path}::{name}"
