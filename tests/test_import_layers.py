import ast
import graphlib
from pathlib import Path

import pytest
from transformers import Trainer

import hf_ihb

PACKAGE = Path(hf_ihb.__file__).parent
# A name stands for a module, or for every module of a folder.
LAYERS = (
    {"errors"},
    {"functional", "config", "plots", "checkpoint", "storage"},
    {"step"},
    {"augment", "methods", "runs", "access", "redaction"},
    {"data", "models", "metrics", "markdown"},
    {"trainer.arguments", "analysis"},
    {"model_card", "runs.report"},
    {"hub"},
    {"trainer"},
    {"evaluation"},
    {"run"},
)
SEPARATE = {name for layer in LAYERS for name in layer if "." in name}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
INNER = [name for name in MODULES if name != "hf_ihb"]


def unit_of(module):
    """The module or folder directly below the package; `trainer.arguments` is one of its own."""
    name = module.removeprefix("hf_ihb.")
    return name if name in SEPARATE else name.split(".")[0]


def layer_of(module):
    return next((i for i, units in enumerate(LAYERS) if unit_of(module) in units), None)


def imports_of(path, modules=MODULES):
    """Absolute names a file imports, wherever in the file; modules as far as they are ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found


def ours(names):
    return {name for name in names if name == "hf_ihb" or name.startswith("hf_ihb.")}


def faults_of(module, imported):
    """What is wrong with a module that imports some modules of ours."""
    for other in sorted(imported):
        if other == "hf_ihb":
            yield f"{module} imports the package itself"
        elif None in (layer_of(other), layer_of(module)):
            yield f"{module} imports {other}: one of them is in no layer"
        elif unit_of(other) != unit_of(module) and layer_of(other) >= layer_of(module):
            yield f"{module} (layer {layer_of(module)}) imports {other} (layer {layer_of(other)})"


@pytest.mark.parametrize("module", INNER)
def test_every_module_has_a_layer(module):
    assert layer_of(module) is not None, f"{module}: give it a layer in this file"


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_lower_layers_or_its_own_folder_alone(module):
    assert not list(faults_of(module, ours(imports_of(MODULES[module]))))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_neither_scripts_nor_tests(module):
    roots = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert not roots & {"scripts", "tests"}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: ours(imports_of(MODULES[module])) for module in INNER}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("hf_ihb.functional.random", "hf_ihb.config.data"),
        ("hf_ihb.methods.cka", "hf_ihb.augment.augmenter"),
        ("hf_ihb.runs.folder", "hf_ihb.models.files"),
        ("hf_ihb.models.student", "hf_ihb.trainer"),
        ("hf_ihb.data", "hf_ihb"),
        ("hf_ihb.run", "hf_ihb.unheard_of"),
    ],
)
def test_the_check_sees_an_import_that_is_not_allowed(module, imported):
    assert list(faults_of(module, {imported}))


@pytest.mark.parametrize(
    ("module", "imported"),
    [("hf_ihb.models.student", "hf_ihb.models.features"), ("hf_ihb.run", "hf_ihb.errors")],
)
def test_the_check_lets_an_import_pass_that_is_allowed(module, imported):
    assert not list(faults_of(module, {imported}))


def test_the_check_reads_every_form_of_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import hf_ihb.data as d\nfrom hf_ihb.functional import gram, nothing\n"
        "def f():\n    from hf_ihb.methods.base import TokenPair\n"
    )
    modules = {"hf_ihb.functional.gram"}
    expected = {"hf_ihb.data", "hf_ihb.functional.gram", "hf_ihb.functional", "hf_ihb.methods.base"}
    assert imports_of(path, modules) == expected
    path.write_text("from . import data\n")
    with pytest.raises(AssertionError, match="relative"):
        imports_of(path)


def subclasses(cls):
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_at_most_two_classes_stand_between_a_trainer_and_transformers():
    trainers = [cls for cls in subclasses(Trainer) if cls.__module__.startswith("hf_ihb.")]
    assert {"SupervisedTrainer", "LogitDistillationTrainer"} <= {cls.__name__ for cls in trainers}
    for cls in trainers:
        assert len(cls.__mro__[1 : cls.__mro__.index(Trainer)]) <= 2, cls.__name__
