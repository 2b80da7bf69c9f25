"""What may not leave: names of folders, paths and tokens, in whatever way a file spells them."""

import copy
import json
import random
import zlib
from pathlib import Path

import pytest
from safetensors.torch import save
from torch import zeros

from hf_ihb.config.secrets import secrets_in_effect
from hf_ihb.redaction import find_leaks, machine_folders, publishable

SECRET = "hf_" + "canary" * 5
HOME = "/home/path-canary"
FOLDER = f"{HOME}/résumé & co/out_put"


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)


def run_of(teacher="outputs/resnet18", data="../shared/cifar10", own="outputs/cka", revision=None):
    def named(name, at=None):
        return {"name": name, "revision": at, "num_parameters": 3}

    return {
        "recipe.json": {
            "recipe": "recipes/micro/cka.json",
            "keys": {
                "dataset_name": data, "dataset_revision": None, "teacher_model": teacher, "teacher_revision": revision,
                "baseline_model": "outputs/ce", "model_name_or_path": None, "model_revision": None, "alpha": 0.5,
                "architecture": "resnet18", "output_dir": own, "run_name": own, "logging_dir": "x", "seed": 3,
                "resume_from_checkpoint": "true", "deepspeed": "conf/zero.json", "fsdp_config": {"min_num_params": 1},
                "hub_model_id": "me/cka", "lr_scheduler_kwargs": {"state": f"{HOME}/state.json", "num_cycles": 2},
                "optim_args": f"cache={HOME}/x", "debug": [f"see {HOME}", "underflow"],
            },
            "dataset": {**named(data), "label_names": ["/b", "cat"]},
            "teacher": named(teacher, revision),
            "environment": {"commit": "c" * 40},
        },
        "metrics.json": {"model": named(own), "teacher": named(teacher, revision), "baseline": named("outputs/ce"),
                         "data": named(data)},
        "analysis.json": {"model": named(own), "cka": [{"rows": {"name": own}, "columns": {"name": teacher}}]},
        "training_history.json": [{"loss": 1.0}],
    }  # fmt: skip


def strings(content):
    if isinstance(content, dict):
        return [s for key, value in content.items() for s in ([key] if key else []) + strings(value)]
    return [s for item in content for s in strings(item)] if isinstance(content, list) else [content]


def test_every_folder_becomes_its_last_component_wherever_it_stands():
    run = run_of()
    found = publishable(run)
    keys, metrics = found["recipe.json"]["keys"], found["metrics.json"]
    assert (keys["teacher_model"], keys["dataset_name"], keys["baseline_model"]) == (
        "local:resnet18",
        "local:cifar10",
        "local:ce",
    )
    assert [metrics[part]["name"] for part in metrics] == ["local:cka", "local:resnet18", "local:ce", "local:cifar10"]
    assert found["analysis.json"]["cka"] == [{"rows": {"name": "local:cka"}, "columns": {"name": "local:resnet18"}}]
    assert keys["architecture"] == "resnet18"
    assert found["recipe.json"]["dataset"]["label_names"] == ["/b", "cat"]  # classes are called what they are called
    assert found["training_history.json"] == run["training_history.json"]
    assert run == run_of()


def test_what_says_where_a_run_happened_is_left_out_and_how_it_was_made_stays():
    keys = publishable(run_of())["recipe.json"]["keys"]
    gone = {"output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "deepspeed", "optim_args"}
    assert run_of()["recipe.json"]["keys"].keys() - keys.keys() == gone
    assert keys["lr_scheduler_kwargs"] == {"state": "local:state.json", "num_cycles": 2}
    assert keys["fsdp_config"] == {"min_num_params": 1}
    assert keys["debug"] == ["underflow"]
    assert keys["hub_model_id"] == "me/cka"


def test_an_id_on_the_hub_stays():
    found = publishable(run_of(teacher="facebook/dinov2-small", data="sklearn:digits", revision="a" * 40))
    assert found["recipe.json"]["teacher"]["name"] == "facebook/dinov2-small"
    assert found["recipe.json"]["keys"]["teacher_model"] == "facebook/dinov2-small"
    assert found["recipe.json"]["keys"]["dataset_name"] == "sklearn:digits"
    weights = {"keys": {"model_name_or_path": "facebook/deit", "model_revision": "b" * 40}, "environment": {}}
    assert publishable({"recipe.json": weights})["recipe.json"] == weights


def test_the_run_itself_is_called_by_its_repo():
    found = publishable(run_of(), repo_id="me/cka-student")
    assert found["metrics.json"]["model"]["name"] == "me/cka-student"
    assert found["analysis.json"]["cka"][0]["rows"]["name"] == "me/cka-student"
    assert found["metrics.json"]["baseline"]["name"] == "local:ce"


@pytest.mark.parametrize("repo_id", [None, "me/cka"])
def test_twice_is_once(repo_id):
    once = publishable(run_of(), repo_id=repo_id)
    assert publishable(copy.deepcopy(once), repo_id=repo_id) == once
    assert publishable(publishable(run_of()), repo_id=repo_id) == once  # a name may be learned later


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("/data/teachers/resnet18", "local:resnet18"), ("/data/teachers/resnet18/", "local:resnet18"),
        ("~/resnet18", "local:resnet18"), ("./resnet18", "local:resnet18"), ("C:\\models\\resnet18", "local:resnet18"),
        ("\\\\server\\share\\resnet18", "local:resnet18"), ("resnet18", "local:resnet18"), ("a/b", "local:b"),
        ("~", "local:unnamed"), ("..", "local:unnamed"), ("~someone", "local:unnamed"), (HOME, "local:unnamed"),
        ("/", "local:unnamed"), ("C:\\", "local:unnamed"), (f"{HOME}/../path-canary", "local:unnamed"),
        ("local:resnet18", "local:resnet18"), ("file:///data/x", "local:x"),
    ],
)  # fmt: skip
def test_a_folder_by_any_path(name, published):
    found = publishable(run_of(teacher=name))
    assert found["recipe.json"]["keys"]["teacher_model"] == found["metrics.json"]["teacher"]["name"] == published


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("recipes/cka.json", "recipes/cka.json"), ("recipes/micro/cka.json", "recipes/micro/cka.json"),
        ("/home/me/recipes/cka.json", "cka.json"), ("../recipes/cka.json", "cka.json"), ("my/cka.json", "cka.json"),
        ("recipes/../../me/cka.json", "cka.json"), ("cka.json", "cka.json"), (f"{HOME}/cka.json", "cka.json"),
        ("D:\\me\\cka.json", "cka.json"), (None, None),
    ],
)  # fmt: skip
def test_the_recipe_is_named_so_that_others_find_it(path, published):
    recipe = run_of()["recipe.json"] | {"recipe": path}
    assert publishable({"recipe.json": recipe})["recipe.json"]["recipe"] == published


def test_no_path_survives_at_any_place():
    """Paths put at random into random JSON are gone from every string but the names of classes."""
    draw = random.Random(0)
    paths = [f"{HOME}/a/canary-dir", "../canary-dir/x", "~/canary-dir/x", "C:\\canary-dir\\x", f"in {HOME}/canary-dir."]

    def grow(depth):
        if depth == 0 or draw.random() < 0.2:
            return draw.choice([*paths, 1.5, None, "plain", True])
        if draw.random() < 0.4:
            return [grow(depth - 1) for _ in range(3)]
        keys = draw.sample(["name", "teacher_model", "x", "y_dir", "recipe", "model", "revision"], 3)
        return {key: grow(depth - 1) for key in keys}

    for _ in range(300):
        recipe = {"recipe": draw.choice(paths), "keys": {"a": grow(3), "b": grow(2)}, "environment": {"c": grow(2)}}
        found = publishable({"recipe.json": recipe, "metrics.json": {"model": grow(2), "x": grow(4)}}, repo_id="me/x")
        for text in strings(list(found.values())):
            assert not isinstance(text, str) or ("canary-dir/" not in text and HOME not in text), recipe


def leaks(data):
    return find_leaks(data if isinstance(data, bytes) else data.encode(), secrets=["opensesame"], paths=[FOLDER, HOME])


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("wrap", ["{}", "a{}b", "%20{}", "\\n{}", "\n{}", "x={}&", "\u00e9{}"])
def test_a_token_is_found_in_any_neighbourhood(wrap):
    assert leaks(wrap.format(SECRET)) == ["what looks like a token"]
    assert leaks(wrap.format("opensesame")) == ["a secret of this environment"]


@pytest.mark.parametrize(
    "secret", ["ghp_" + "a1" * 10, "github_pat_" + "a1" * 10, "AKIA" + "A1" * 8, "glpat-" + "a" * 20]
)
def test_tokens_of_others_are_found(secret):
    assert leaks(f'{{"key": "{secret}"}}') == ["what looks like a token"]


@pytest.mark.parametrize(
    "spell",
    [
        str, json.dumps, lambda s: json.dumps(s, ensure_ascii=False), lambda s: s.replace("&", "&amp;"),
        lambda s: s.replace("_", "\\_"), lambda s: f"file://{s}/x.png", lambda s: f"({s})", lambda s: f"`{s}`",
        lambda s: s.replace("_", "\\_").replace("&", "\\&amp;"),
    ],
)  # fmt: skip
def test_a_path_is_found_as_json_html_and_markdown_write_it(spell):
    found = find_leaks(f"see {spell(FOLDER)}".encode(), secrets=[], paths=[FOLDER])
    assert found == ["the path of a folder of this machine"]


@pytest.mark.parametrize(
    "text",
    [
        "https://hub.example/home/path-canary/x", f"{HOME}s/x", f"{HOME}-2", "/opt", "hf_ihb", "hf_home = 1",
        "https://host/a:b@c", "mailto:me@host", "https://me@host/x", "short", "mask_token_of_the_student_is_long",
    ],
)  # fmt: skip
def test_what_only_resembles_a_leak_passes(text):
    assert find_leaks(text.encode(), secrets=["short"], paths=[HOME, "/", "relative", ""]) == []


def test_a_password_in_a_url_is_found():
    assert leaks("clone https://me:pa55@host/x") == ["a URL with a password"]


def test_binary_files_are_searched():
    png = b"\x89PNG\r\n\x1a\n"
    assert leaks(png + chunk(b"tEXt", b"Source\0" + HOME.encode()) + chunk(b"IEND", b""))
    packed = zlib.compress(f"made by {SECRET}".encode())
    assert leaks(png + chunk(b"IHDR", b"0" * 13) + chunk(b"zTXt", b"Comment\0\0" + packed)) == [
        "what looks like a token"
    ]
    assert leaks(png + chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed) + chunk(b"IEND", b"")) == [
        "what looks like a token"
    ]
    assert leaks(png + chunk(b"IDAT", zlib.compress(b"pixels" * 100)) + chunk(b"IEND", b"")) == []
    assert leaks(save({"a": zeros(3)}, metadata={"from": FOLDER})) == ["the path of a folder of this machine"]
    assert leaks(random.Random(0).randbytes(1 << 20)) == []


def test_what_is_found_is_not_repeated():
    text = f"{SECRET} {FOLDER} opensesame https://me:pa55word@host"
    found = leaks(text)
    assert len(found) == 4
    assert not any(part in " ".join(found) for part in (SECRET, HOME, "sesame", "pa55"))


def test_the_secrets_of_the_environment_are_known(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "w" * 20)
    monkeypatch.setenv("SOME_SECRET", "s" * 20)
    monkeypatch.setenv("EDITOR", "vi")
    found = secrets_in_effect("given", None)
    assert {SECRET, "w" * 20, "s" * 20, "given"} <= found
    assert not found & {"vi", None, ""}


def test_the_folders_of_this_machine_are_known_by_both_names(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    found = machine_folders(Path("run"), tmp_path / "link")
    real = tmp_path / "real"
    assert {HOME, str(real), str(real / "run"), str(tmp_path / "link")} <= found
