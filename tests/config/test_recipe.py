import json
import math
import os
import random
import re
import string
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_ihb.analysis import ANALYSES, AnalysisArguments
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.fields import TRAINING_RANGES
from hf_ihb.config.measure import EvaluationArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.recipe import MAX_RECIPE_BYTES, parse_models, parse_recipe, parse_run, read_recipe, recipe_path
from hf_ihb.config.run import PublishArguments, RunArguments
from hf_ihb.errors import RecipeError
from hf_ihb.methods import SharedKeys
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

ROOT = Path(__file__).parents[2]
COMMON = (RunArguments, DataArguments, AugmentationArguments, ModelArguments)
TRAIN = (*COMMON, SupervisedTrainingArguments)
METHODS = {"logits": LogitDistillationTrainingArguments, "structural": StructuralDistillationTrainingArguments}
DISTILL = {name: (*COMMON, TeacherArguments, arguments) for name, arguments in METHODS.items()}
LIGHT = (DataArguments, AugmentationArguments, ModelArguments)
NEEDED = {"teacher_model": "somewhere", "cka_weight": 1.0}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


def write(content, name="recipe.json"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return str(path)


def parse(content, *cli, classes=LIGHT):
    return parse_recipe([write(content), *cli], *classes)


def refusal(content, *cli, classes=LIGHT):
    """The message of the `RecipeError`, after what holds of all of them: one line, and nothing was written."""
    with pytest.raises(RecipeError) as error:
        parse(content, *cli, classes=classes)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert sorted(p.name for p in Path().rglob("*")) == ["recipe.json"]
    assert error.value.exit_code == 2
    return message


def as_values(instances):
    return {f.name: getattr(instance, f.name) for instance in instances for f in fields(instance)}


# ---- What a recipe says, and what the command line says over it ----


def test_the_recipe_beats_the_defaults_and_the_command_line_beats_the_recipe():
    recipe = {"cutout_size": 4, "mixup_alpha": 0.5, "dataset_name": "a", "image_size": 8}
    values = as_values(parse(recipe, "--cutout_size", "7", "--dataset_name=b"))
    assert (values["cutout_size"], values["dataset_name"]) == (7, "b")
    assert (values["mixup_alpha"], values["image_size"]) == (0.5, 8)
    rest = as_values([cls() for cls in LIGHT])
    for name in rest.keys() - recipe.keys():
        assert values[name] == rest[name]


def test_the_command_line_beats_the_recipe_for_every_kind_of_value():
    recipe = NEEDED | {"student_layers": [1, 2], "center_positions": True, "cka_scope": "tokens", "learning_rate": 1}
    cli = ("--student_layers", "3", "4", "5", "--center_positions", "false", "--cka_scope", "images")
    values = as_values(parse(recipe, *cli, "--learning_rate", "1e-4", "--seed=3", classes=DISTILL["structural"]))
    assert values["student_layers"] == [3, 4, 5]
    assert values["center_positions"] is False
    assert (values["cka_scope"], values["learning_rate"], values["seed"]) == ("images", 1e-4, 3)
    assert values["data_seed"] == 3


def test_one_instance_of_each_class_comes_back_in_order():
    assert [type(instance) for instance in parse({}, classes=TRAIN)] == list(TRAIN)


def test_null_is_a_value_where_a_key_allows_it():
    assert parse({"image_size": None}, classes=(DataArguments,))[0].image_size is None
    assert "expected an integer" in refusal({"cutout_size": None})


def test_a_whole_number_is_a_number_but_true_is_neither():
    assert parse({"mixup_alpha": 1})[1].mixup_alpha == 1
    for name, expected in (("mixup_alpha", "a number"), ("cutout_size", "an integer"), ("image_size", "an integer")):
        assert (
            refusal({name: True})
            == f"recipe.json: key '{name}': expected {expected} >= {int(name == 'image_size')}, found true"
        )
    assert "expected true or false, found 1" in refusal({"overwrite_output_dir": 1}, classes=(RunArguments,))


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("recipes/paper/cka.json", "outputs/paper/cka"),
        ("elsewhere/recipes/kd.json", "outputs/kd"),
        ("some/where/mine.json", "outputs/mine"),
    ],
)
def test_the_output_folder_follows_the_recipes_path(path, folder):
    args = parse_recipe([write({}, path)], *TRAIN)[-1]
    assert Path(args.output_dir) == Path(folder)
    assert not Path("outputs").exists()


def test_an_output_folder_that_is_given_is_kept():
    assert parse({"output_dir": "here"}, classes=TRAIN)[-1].output_dir == "here"
    assert parse({"output_dir": "here"}, "--output_dir", "there", classes=TRAIN)[-1].output_dir == "there"
    assert parse({}, "--output_dir=there", classes=TRAIN)[-1].output_dir == "there"


# ---- What is refused ----


@pytest.mark.parametrize("argv", [[], ["--seed", "1"], ["missing.json"], ["."]])
def test_the_command_line_must_start_with_a_recipe(argv):
    with pytest.raises(RecipeError, match="expected"):
        parse_recipe(argv, *LIGHT)
    with pytest.raises(RecipeError, match="expected"):
        recipe_path(argv)


@pytest.mark.parametrize(
    ("text", "place"),
    [("", "1:1"), ("{", "1:2"), ('{"seed": 1', "1:11"), ("{\n  'seed': 1}", "2:3"), ("\ufeff{}", "1:1"), ("a", "1:1")],
)
def test_a_recipe_that_is_no_json_is_refused_with_line_and_column(text, place):
    assert refusal(text).startswith(f"recipe.json:{place}: expected JSON, found ")


@pytest.mark.parametrize("text", ["[1]", "3", '"text"', "null"])
def test_a_recipe_that_is_no_object_is_refused(text):
    assert refusal(text) == f"recipe.json: expected a JSON object, found {text}"


def test_a_recipe_that_is_not_utf8_is_refused():
    assert "UTF-8" in refusal(b'{"dataset_name": "\xff"}')


def test_a_recipe_nested_without_end_is_refused():
    assert "recipe.json" in refusal('{"dataset_name": ' + "[" * 100_000)


def test_a_recipe_of_any_size_is_refused_unread():
    message = refusal('{"dataset_name": "' + "a" * MAX_RECIPE_BYTES + '"}')
    assert str(MAX_RECIPE_BYTES) in message
    assert len(message) < 200


def test_a_number_too_long_to_read_is_refused():
    assert "recipe.json" in refusal('{"cutout_size": ' + "9" * 5000 + "}")


@pytest.mark.parametrize(
    ("name", "nearest", "classes"),
    [
        ("tempurature", "temperature", DISTILL["logits"]),
        ("learning-rate", "learning_rate", TRAIN),
        ("mixup", "mixup_alpha", LIGHT),
        ("evaluation_strategy", "eval_strategy", TRAIN),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(name, nearest, classes):
    assert refusal({name: 1}, classes=classes) == f"recipe.json: key '{name}': unknown; did you mean '{nearest}'?"
    message = refusal({}, f"--{name}x", "1", classes=classes)
    assert message.startswith("command line: key ")
    assert message.endswith(f"unknown; did you mean '{nearest}'?")


def test_an_unknown_key_stays_on_one_line_whatever_it_holds():
    assert "unknown" in refusal({"a\nb\u2028c": 1})


def test_a_prefix_of_a_key_is_no_key():
    assert "unknown" in refusal({}, "--cutout", "3")


def test_a_key_given_twice_is_refused():
    assert (
        refusal('{"cutout_size": 1, "cutout_size": 2}') == "recipe.json: key 'cutout_size': expected once, found twice"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_train_epochs", "ten", "expected a number > 0, found \"ten\""),
        ("num_train_epochs", "10", "expected a number > 0, found \"10\""),
        ("num_train_epochs", True, "expected a number > 0, found true"),
        ("gradient_accumulation_steps", 1.0, "expected an integer >= 1, found 1.0"),
        ("student_layers", 3, "expected a list, each item an integer, found 3"),
        ("student_layers", [1, "2"], "expected a list, each item an integer, found [1, \"2\"]"),
        ("student_layers", [True], "expected a list, each item an integer, found [true]"),
        ("cka_scope", "token", "expected one of tokens, pooled, images, found \"token\""),
        ("method", "magic", "expected one of logits, structural, found \"magic\""),
        ("output_dir", 5, "expected a string, found 5"),
        ("dataset_name", ["a"], "expected a string, found [\"a\"]"),
        ("dataset_name", {}, "expected a string, found {}"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_was_expected(name, value, expected):
    message = refusal(NEEDED | {name: value}, classes=DISTILL["structural"])
    assert message == f"recipe.json: key '{name}': {expected}"


@pytest.mark.parametrize("name", ["optim", "eval_strategy", "lr_scheduler_type"])
def test_an_unknown_choice_of_transformers_is_refused_with_the_choices(name):
    message = refusal({name: "foo"}, classes=TRAIN)
    assert message.startswith(f"recipe.json: key '{name}': expected one of ")
    assert message.endswith('found "foo"')


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_a_number_that_is_not_finite_is_refused(literal):
    for name in ("mixup_alpha", "cutout_size"):
        assert "expected" in refusal(f'{{"{name}": {literal}}}')
    nested = f'{{"lr_scheduler_kwargs": {{"min_lr": {literal}}}}}'
    assert "expected" in refusal(nested, classes=TRAIN)


def out_of_range_values():
    yield from (("mixup_alpha", -0.1, ">= 0"), ("horizontal_flip", 1.5, "in [0, 1]"), ("image_size", 0, ">= 1"))
    yield from (("drop_path_rate", 1.0, "in [0, 1)"), ("validation_fraction", 0, "in (0, 1)"))
    yield from (("validation_fraction", 1, "in (0, 1)"), ("hidden_size", -3, ">= 1"))


@pytest.mark.parametrize(("name", "value", "allowed"), list(out_of_range_values()))
def test_a_value_out_of_range_is_refused_with_the_range(name, value, allowed):
    for message in (refusal({name: value}), refusal({}, f"--{name}", str(value)), refusal({}, f"--{name}={value}")):
        assert f"key '{name}'" in message
        assert f" {allowed}, found " in message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", 0, "> 0"),
        ("alpha", 1.5, "in [0, 1]"),
        ("learning_rate", -1e-3, ">= 0"),
        ("per_device_train_batch_size", 0, ">= 1"),
        ("num_train_epochs", 0, "> 0"),
        ("label_smoothing_factor", 1.0, "in [0, 1)"),
        ("save_total_limit", 0, ">= 1"),
    ],
)
def test_a_training_value_out_of_range_is_refused_with_the_range(name, value, allowed):
    recipe = {"teacher_model": "somewhere"}
    expected = f"key '{name}': expected "
    for message in (
        refusal(recipe | {name: value}, classes=DISTILL["logits"]),
        refusal(recipe, f"--{name}", str(value), classes=DISTILL["logits"]),
    ):
        assert expected in message
        assert f" {allowed}, found " in message


@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs"])
def test_an_integer_beyond_floats_is_refused(name):
    assert f"key '{name}'" in refusal({name: 10**400}, classes=TRAIN)


def test_a_seed_that_numpy_cannot_take_is_refused():
    assert parse({"seed": 2**32 - 1}, classes=TRAIN)[-1].seed == 2**32 - 1
    assert "key 'seed'" in refusal({"seed": 2**32}, classes=TRAIN)


def test_python_callers_meet_the_same_ranges():
    with pytest.raises(ValueError, match=r"key 'mixup_alpha': expected a number >= 0, found -1"):
        AugmentationArguments(mixup_alpha=-1)
    with pytest.raises(ValueError, match="key 'mixup_alpha'"):
        AugmentationArguments(mixup_alpha=math.nan)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ({"model_name_or_path": "x", "architecture": "deit"}, ("model_name_or_path", "architecture")),
        ({"model_name_or_path": "x", "patch_size": 4}, ("model_name_or_path", "patch_size")),
        ({"hidden_size": 100, "num_attention_heads": 3}, ("hidden_size", "num_attention_heads")),
        (NEEDED | {"student_layers": [1], "teacher_layers": [1, 2]}, ("student_layers", "teacher_layers")),
        (NEEDED | {"student_layers": []}, ("student_layers",)),
        ({"teacher_model": "x"}, ("cka_weight", "gram_weight", "token_weight")),
        ({"cka_weight": 1}, ("teacher_model",)),
    ],
)
def test_keys_that_contradict_each_other_are_all_named(recipe, names):
    message = refusal(recipe, classes=DISTILL["structural"])
    assert message.startswith("recipe.json: ")
    for name in names:
        assert name in message


def test_a_contradiction_made_on_the_command_line_is_blamed_on_it():
    assert refusal({"architecture": "deit"}, "--model_name_or_path", "x").startswith("command line: ")


def test_a_nested_value_that_transformers_cannot_use_is_refused():
    assert "recipe.json" in refusal({"accelerator_config": {"unheard_of": 1}}, classes=TRAIN)


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "my_token"])
def test_a_token_in_a_recipe_is_refused_and_not_shown(name):
    message = refusal({name: "hf_" + "a" * 30}, classes=TRAIN)
    assert f"key '{name}'" in message
    assert "HF_TOKEN" in message
    assert "aaaa" not in message


@pytest.mark.parametrize("value", ["hf_" + "b" * 34, "see hf_" + "b" * 34, "https://me:bbbbbb@host/repo"])
def test_a_secret_in_any_value_is_refused_and_not_shown(value):
    message = refusal({"dataset_name": value})
    assert message.startswith("recipe.json: key 'dataset_name': expected no secret")
    assert "bbbb" not in message


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "b" * 34,
        "--hf_" + "b" * 34,
        "https://me:bbbbbb@host/repo",
        "x:hf_" + "b" * 34,
        "ghp_" + "b" * 36,
        "github_pat_" + "b" * 40,
        "AKIA" + "B" * 16,
    ],
)
@pytest.mark.parametrize("form", ["{}", "--dataset_name {}", "--dataset_name={}", "--datset_name {}", "--seed {}"])
def test_a_secret_on_the_command_line_is_refused_and_not_shown(form, value):
    cli = form.format(value).split()
    lines = [refusal({}, *cli, classes=TRAIN)]
    for argv in (["m", *cli], cli):
        with pytest.raises(RecipeError, match="command line:") as error:
            models(*argv)
        lines.append(str(error.value))
    for line in lines:
        assert "expected no secret" in line
        assert "HF_TOKEN" in line
        assert "bbbb" not in line.lower()


@pytest.mark.parametrize("cli", [("--hub_token", "{}"), ("--hub_token={}",), ("--hub-token", "{}")])
def test_the_token_of_transformers_may_stand_on_the_command_line_and_is_not_shown(cli):
    token = "hf_" + "b" * 34
    given = [part.format(token) for part in cli]
    if cli[0] != "--hub-token":
        assert parse({}, *given, classes=TRAIN)[-1].hub_token == token
    assert "bbbb" not in refusal({}, *given, "--seed", "x", classes=TRAIN)
    assert "bbbb" not in refusal({}, *given, "--sed", "1", classes=TRAIN)
    assert "bbbb" not in refusal({"seed": -1}, *given, classes=TRAIN)
    for more in (["--seed", token], [token], [f"--x={token}"]):
        assert "expected no secret" in refusal({}, *given, *more, classes=TRAIN)


@pytest.mark.parametrize("value", ["a" * 40, "me/hf_model", "https://hub/me/x", "hf_hub_download", "user@host:/data"])
def test_what_is_no_secret_is_let_through(value):
    assert parse({}, "--dataset_name", value)[0].dataset_name == value
    assert parse({"dataset_name": value})[0].dataset_name == value


def test_a_secret_within_a_value_or_a_key_of_a_recipe_is_refused_and_not_shown():
    token = "hf_" + "b" * 34
    for recipe in ({"accelerator_config": {"deep": [token]}}, {"report_to": ["none", token]}, {token: token}):
        line = refusal(recipe, classes=TRAIN)
        assert "expected no secret in a recipe" in line
        assert "bbbb" not in line


def test_no_secret_is_shown_before_the_method_is_known():
    with pytest.raises(RecipeError, match="command line: key 'method': expected no secret") as error:
        parse({}, "--method", "hf_" + "b" * 34, classes=DISTILL["structural"])
    assert "bbbb" not in str(error.value)


REVISIONS = {"dataset_name": "dataset_revision", "teacher_model": "teacher_revision"}


@pytest.mark.parametrize(("name", "revision"), REVISIONS.items())
def test_a_revision_of_the_recipe_goes_with_its_name(name, revision):
    recipe = NEEDED | {name: "me/old", revision: "v1"}
    for cli, expected in (
        ([], "v1"),
        ([f"--{name}", "me/old"], "v1"),
        ([f"--{name}", "me/new"], None),
        ([f"--{name}=me/new", f"--{revision}", "v2"], "v2"),
        ([f"--{revision}=v2"], "v2"),
    ):
        assert as_values(parse(recipe, *cli, classes=DISTILL["structural"]))[revision] == expected


@pytest.mark.parametrize(
    ("cli", "name", "found"),
    [
        (("--mixup_alpha", "nan"), "mixup_alpha", "nan"),
        (("--mixup_alpha", "inf"), "mixup_alpha", "inf"),
        (("--mixup_alpha", "1e400"), "mixup_alpha", "inf"),
        (("--mixup_alpha", "abc"), "mixup_alpha", "'abc'"),
        (("--cutout_size", "1.5"), "cutout_size", "'1.5'"),
        (("--cutout_size", "true"), "cutout_size", "'true'"),
        (("--image_size", "none"), "image_size", "'none'"),
        (("--cutout_size",), "cutout_size", ""),
        (("--tempurature", "1"), "tempurature", ""),
    ],
)
def test_the_command_line_is_checked_like_the_recipe(cli, name, found):
    message = refusal({}, *cli)
    assert message.startswith(f"command line: key '{name}': ")
    assert "expected" in message or "unknown" in message
    assert message.endswith(f"found {found}") or not found


@pytest.mark.parametrize(
    ("cli", "name", "expected"),
    [
        (("--cka_scope", "token"), "cka_scope", "expected one of tokens, pooled, images, found"),
        (("--center_positions", "maybe"), "center_positions", "expected true or false, found"),
        (("--student_layers", "1", "x"), "student_layers", "expected int, found 'x'"),
    ],
)
def test_the_command_line_says_what_it_expected(cli, name, expected):
    message = refusal(NEEDED, *cli, classes=DISTILL["structural"])
    assert message.startswith(f"command line: key '{name}': ")
    assert expected in message


@pytest.mark.parametrize("cli", [("junk",), ("--cutout_size", "1", "junk"), ("--", "x")])
def test_leftovers_on_the_command_line_are_refused(cli):
    assert refusal({}, *cli).startswith("command line: ")


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("method", METHODS)
def test_help_lists_every_key_with_its_text_and_its_range(method, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit) as end:
        parse_recipe([flag], *DISTILL[method], description="What this does.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "What this does." in text
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in text.split("\n  --")[1:]}
    inherited = {f.name for f in fields(TrainingArguments)}
    for f in (f for cls in DISTILL[method] for f in fields(cls) if f.init):
        entry = entries[f.name.rstrip(",")]
        if f.name not in inherited:
            assert f.metadata["help"] in entry
        if "range" in f.metadata:
            assert str(f.metadata["range"]) in entry


def test_every_key_of_ours_has_a_help_text_and_a_default_in_its_range():
    for cls in {*TRAIN, *DISTILL["logits"], *DISTILL["structural"]}:
        for f in fields(cls):
            assert f.metadata.get("help"), f"{cls.__name__}.{f.name}"
            if "range" in f.metadata and isinstance(f.default, (int, float)):
                assert f.default in f.metadata["range"]


def test_no_key_belongs_to_two_classes():
    for classes in (TRAIN, *DISTILL.values()):
        names = [f.name for cls in classes for f in fields(cls)]
        assert len(names) == len(set(names))


def test_the_ranges_of_transformers_keys_name_keys_that_exist():
    names = {f.name for f in fields(TrainingArguments)}
    assert TRAINING_RANGES.keys() <= names


# ---- Shipped recipes ----


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.json")), ids=lambda p: "-".join(p.parts[-2:]))
def test_every_shipped_recipe_parses(path):
    recipe = read_recipe(path)
    classes = DISTILL[recipe["method"]] if "method" in recipe else TRAIN
    values = as_values(parse_recipe([str(path)], *classes))
    for name, value in recipe.items():
        assert values[name] == value or name in ("lr_scheduler_type", "report_to", "eval_strategy", "save_strategy")
    assert Path(values["output_dir"]).parts[0] == "outputs"


# ---- Any recipe ----


@pytest.mark.parametrize("key", ["activation_checkpointing", "seed", "teacher_view"])
@pytest.mark.parametrize("separator", ["\x1e", "\x85", "\u2028"])
def test_what_ends_a_line_in_a_value_does_not_end_it_in_a_message(key, separator, tmp_path):
    path = write({"teacher_model": "x", "cka_weight": 1.0})
    with pytest.raises(RecipeError, match=f"key '{key}': expected") as error:
        parse_recipe([path, f"--{key}", f"a{separator}0"], *DISTILL["structural"])
    assert len(str(error.value).splitlines()) == 1


def random_value(rng, depth=0):
    kinds = [
        lambda: rng.choice([True, False, None]),
        lambda: rng.randint(-3, 300),
        lambda: rng.choice([0, 1, -1, 2**31, 2**63, -(2**64), 10**400]),
        lambda: rng.choice([0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, 5e-324]),
        lambda: "".join(rng.choices(string.printable + "é☃\u2028\ud800\x00", k=rng.randint(0, 12))),
        lambda: rng.choice(["deit", "linear", "no", "epoch", "structural", "none", "", "nan", "1", "true"]),
        lambda: [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))],
        lambda: {rng.choice("ab\n"): random_value(rng, depth + 1) for _ in range(rng.randint(0, 2))},
    ]
    return rng.choice(kinds[: 6 if depth > 2 else 8])()


def random_recipe(rng, names):
    recipe = dict(NEEDED) if rng.random() < 0.7 else {}
    for name in rng.sample(names, rng.randint(0, 3)):
        recipe[name] = random_value(rng)
    if rng.random() < 0.1:
        recipe["".join(rng.choices(string.printable, k=5))] = random_value(rng)
    text = json.dumps(recipe)
    if rng.random() < 0.1:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(["", "}", "NaN", "[", "\x00"]) + text[cut + rng.randint(0, 3) :]
    return text


def test_any_recipe_is_parsed_or_refused_in_one_line():
    rng = random.Random(0)
    classes = DISTILL["structural"]
    transformers_names = {f.name for f in fields(TrainingArguments)}
    some_of_transformers = {*TRAINING_RANGES, "output_dir", "optim", "eval_strategy", "lr_scheduler_type", "report_to"}
    some_of_transformers |= {"logging_steps", "save_strategy", "accelerator_config", "lr_scheduler_kwargs"}
    known = {f.name for cls in classes for f in fields(cls)}
    names = sorted((known - transformers_names) | some_of_transformers)
    parsed = 0
    for _ in range(500):
        text = random_recipe(rng, names)
        cli = []
        for name in rng.sample(names, rng.choice([0, 0, 1, 2])):
            cli += [f"--{name}", str(random_value(rng)).replace("\x00", "")]
        if "-h" in cli or "--help" in cli:
            continue
        path = write(text.encode("utf-8", "surrogatepass"))
        try:
            instances = parse_recipe([path, *cli], *classes)
        except RecipeError as error:
            assert len(str(error).splitlines()) == 1, (text, cli)  # noqa: PT017
        except BaseException as error:
            raise AssertionError(f"{text} {cli}") from error
        else:
            parsed += 1
            assert [type(instance) for instance in instances] == list(classes)
    assert parsed > 25
    assert [p.name for p in Path().rglob("*")] == ["recipe.json"]


# ---- Finished models ----


def models(*argv, classes=(DataArguments, EvaluationArguments), defaults=lambda name, revision: {}):
    return parse_models(argv, *classes, defaults=defaults)


def test_the_command_line_beats_what_the_model_was_trained_on_and_that_beats_the_defaults():
    def defaults(name, revision):
        assert (name, revision) == ("outputs/cka", "v1")
        return {"dataset_name": "mine", "split_seed": 3}

    name, data, args = models(
        "outputs/cka", "--model_revision", "v1", "--split_seed", "5", "--batch_size=7", defaults=defaults
    )
    assert name == "outputs/cka"
    assert (data.dataset_name, data.split_seed, data.train_split) == ("mine", 5, "train")
    assert args.batch_size == 7
    assert args.output_dir is None


def test_the_commit_that_was_asked_for_defaults_is_the_one_that_is_measured():
    def defaults(name, revision):
        return {"dataset_name": "me/set", "dataset_revision": "v1", "model_revision": f"commit of {revision}"}

    for cli, expected in (([], "commit of None"), (["--model_revision", "v3"], "commit of v3")):
        assert models("me/x", *cli, defaults=defaults)[2].model_revision == expected
    data = models("me/x", "--dataset_name", "me/other", defaults=defaults)[1]
    assert (data.dataset_name, data.dataset_revision) == ("me/other", None)
    classes = (DataArguments, AnalysisArguments)
    assert models("--compare", "a", classes=classes, defaults=defaults)[2].model_revision is None


def test_compared_models_stand_in_for_the_first_argument():
    seen = []
    classes = (DataArguments, AnalysisArguments)

    def defaults(name, revision):
        seen.append(name)
        return {}

    name, _, args = models("--compare", "a", "b/c", "--max_images", "64", classes=classes, defaults=defaults)
    assert name is None
    assert args.compare == ["a", "b/c"]
    assert args.max_images == 64
    name, _, args = models("m", "--compare", "a", classes=classes, defaults=defaults)
    assert (name, args.compare) == ("m", ["a"])
    assert seen == ["a", "m"]


@pytest.mark.parametrize("classes", [(DataArguments, EvaluationArguments), (DataArguments, AnalysisArguments)])
@pytest.mark.parametrize("argv", [(), ("--batch_size", "3")])
def test_a_model_is_needed(classes, argv):
    with pytest.raises(RecipeError, match="command line: expected a model first, its folder or Hub id"):
        models(*argv, classes=classes)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--metrics", "attention,ckb"), f"key 'metrics': expected some of {','.join(ANALYSES)}, found 'ckb'"),
        (("--metrics", ""), "key 'metrics': expected some of"),
        (("--max_images", "2"), "command line: key 'max_images': expected an integer >= 8, found 2"),
        (("--split", "tset"), "command line: key 'split': expected one of test, validation, train, found 'tset'"),
        (("--hessian_dtype", "bf16"), "key 'hessian_dtype': expected one of float32, float64"),
        (("--device", "gpu0"), "command line: key 'device': expected a device such as cpu, found 'gpu0'"),
        (("--metrix", "cka"), "key 'metrix': unknown; did you mean 'metrics'?"),
        (("b",), "expected --key value, found 'b'"),
    ],
)
def test_a_mistake_in_measuring_is_one_line(argv, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        models("m", *argv, classes=(DataArguments, AnalysisArguments))


def test_what_stands_beside_a_model_is_checked_like_a_recipe():
    with pytest.raises(RecipeError, match=r"m: recipe\.json: key 'split_seed': expected an integer"):
        models("m", defaults=lambda name, revision: {"split_seed": "seven"})


def test_analyses_are_made_in_one_order():
    args = AnalysisArguments(metrics="hessian, attention")
    assert args.analyses == ["attention", "hessian"]


# ---- Given twice ----


@pytest.mark.parametrize(("options", "found"), [
    (["--seed", "1", "--seed", "2"], "key 'seed': expected once, found 1 and 2"),
    (["--seed=1", "--patch_size", "4", "--seed", "1"], "key 'seed': expected once, found 1 and 1"),
    (["--patch-size", "2", "--patch_size=4"], "key 'patch_size': expected once, found 2 and 4"),
    (["--hidden_sizes", "8", "16", "--hidden_sizes", "4"], "key 'hidden_sizes': expected once, found 8 16 and 4"),
    (["--bf16", "--no_bf16"], "key 'bf16': expected once, found true and false"),
    (["--bf16", "false", "--bf16"], "key 'bf16': expected once, found false and true"),
    (["--dataset_name", "a\nb", "--dataset_name", "c"], "key 'dataset_name': expected once, found a b and c"),
    (["--hub_token", "hf_" + "x" * 20, "--hub_token", "y"], "key 'hub_token': expected once, found two tokens"),
])  # fmt: skip
def test_a_key_given_twice_is_refused_with_both_values(tmp_path, options, found):
    path = tmp_path / "recipe.json"
    path.write_text("{}")
    with pytest.raises(RecipeError) as error:
        parse_recipe([str(path), *options], *TRAIN)
    assert str(error.value) == f"command line: {found}"


def test_a_key_given_twice_is_refused_by_every_script(tmp_path):
    asked = []
    twice = ["--device", "cpu", "--device", "cuda"]
    for first in (["somewhere"], ["--compare", "a", "b"]):
        with pytest.raises(RecipeError, match=r"^command line: key 'device': expected once, found cpu and cuda$"):
            parse_models([*first, *twice], DataArguments, AnalysisArguments, defaults=lambda *name: asked.append(name))
    with pytest.raises(RecipeError, match=r"^command line: key 'license': expected once, found a and b$"):
        parse_run([str(tmp_path), "--license", "a", "--license", "b"], PublishArguments)
    assert not asked


def test_a_revision_that_is_looked_up_is_not_one_given_twice():
    name, _, args = parse_models(
        ["me/model", "--model_revision", "main"], DataArguments, EvaluationArguments,
        defaults=lambda *asked: {"model_revision": "0" * 40},
    )  # fmt: skip
    assert (name, args.model_revision) == ("me/model", "0" * 40)


def test_layers_may_be_counted_from_the_last_one(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"student_layers": [3, "last"], "teacher_layers": [-2, -1]}), encoding="utf-8")
    (keys,) = parse_recipe([str(path)], SharedKeys)
    assert (keys.student_layers, keys.teacher_layers) == ([3, -1], [-2, -1])
    (keys,) = parse_recipe([str(path), "--teacher_layers", "last", "-3"], SharedKeys)
    assert keys.teacher_layers == [-1, -3]
    assert SharedKeys(student_layers=["last"]).student_layers == [-1]
    with pytest.raises(RecipeError, match="key 'teacher_layers': expected int, found 'first'"):
        parse_recipe([str(path), "--teacher_layers", "first", "2"], SharedKeys)


SEVERAL = [{"teacher_model": "a", "alpha": 0.5}, {"teacher_model": "b", "cka_weight": 1.0, "student_layers": ["last"]}]


def test_several_teachers_come_from_the_recipe_or_as_json_from_the_command_line():
    args = parse({"teacher_models": SEVERAL}, classes=DISTILL["structural"])[-1]
    assert [own.alpha for own in args.of_each_teacher()] == [0.5, 0.0]
    assert args.of_each_teacher()[1].student_layers == [-1]
    words = [json.dumps(SEVERAL[0] | {"alpha": 0.3}), json.dumps(SEVERAL[1])]
    args = parse({"teacher_models": SEVERAL}, "--teacher_models", *words, classes=DISTILL["structural"])[-1]
    assert [own.alpha for own in args.of_each_teacher()] == [0.3, 0.0]


@pytest.mark.parametrize(("recipe", "options", "line"), [
    ({}, (), "key 'teacher_model': expected a Hub id or a folder, found nothing"),
    ({"teacher_model": "c", "teacher_models": SEVERAL}, (), "keys 'teacher_model' and 'teacher_models' contradict"),
    ({"teacher_models": [*SEVERAL, {"gram_weight": 1}]}, (), "entry 3: key 'teacher_model': expected a Hub id"),
    ({"teacher_models": [{"teacher_modle": "a"}]}, (), "entry 1: key 'teacher_modle': unknown; did you mean 'teacher_"),
    ({"teacher_models": "a"}, (), "key 'teacher_models': expected a list, each item an object, found \"a\""),
    ({"teacher_models": SEVERAL}, ("--teacher_models", "a"), "key 'teacher_models': expected object, found 'a'"),
    ({"teacher_models": SEVERAL}, ("--teacher_models", "[1]"), "key 'teacher_models': expected object, found '[1]'"),
])  # fmt: skip
def test_several_teachers_that_contradict_are_refused_in_one_line(recipe, options, line):
    recipe = recipe or {"cka_weight": 1.0}
    found = refusal(recipe, *options, classes=DISTILL["structural"])
    assert line in found
    assert "\n" not in found
