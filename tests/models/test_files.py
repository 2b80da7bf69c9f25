"""Where a model is read from: one commit, safetensors and JSON alone, and nothing outside."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ihb import access
from hf_ihb.config.data import MAX_CLASSES
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.errors import ModelLoadError
from hf_ihb.models.files import model_files
from hf_ihb.models.pretrained import load_pretrained, weights_digest
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import load_teacher

SHAPE = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = {"id2label": {0: "cat", 1: "../dog"}, "label2id": {"cat": 0, "../dog": 1}}  # a class is called what it is


@pytest.fixture(autouse=True)
def _nothing_confirmed():
    access._confirmed.clear()


def save(folder, seed, **options):
    torch.manual_seed(seed)
    ViTForImageClassification(ViTConfig(**SHAPE, **LABELS)).save_pretrained(folder, **options)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "vit", 0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logits(model):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(pixel_values=images).logits


def refused(name, role="model"):
    with pytest.raises(ModelLoadError) as error:
        load_pretrained(str(name), role=role)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{role} '{name}'")
    return line


# ---- From the Hub ----


def test_a_model_of_the_hub_is_that_of_the_folder(hub_here, folder):
    commit = hub_here.add_folder("me/vit", folder)
    here, there = load_pretrained(str(folder)), load_pretrained("me/vit")
    assert torch.equal(logits(here.model), logits(there.model))
    assert (there.revision, here.revision) == (commit, None)
    assert there.pixels == here.pixels
    assert there.summary() == here.summary() | {"name": "me/vit", "revision": commit}
    assert there.model.name_or_path == there.model.config.name_or_path == "me/vit"


def test_a_teacher_reports_the_commit_it_was_read_at(hub_here, folder):
    first = hub_here.add_folder("me/vit", folder)
    hub_here.commit("me/vit", contents(save(folder, 1)))
    for control in ("none", "untrained"):
        args = TeacherArguments("me/vit", teacher_revision=first, teacher_control=control)
        teacher = load_teacher(args, ["cat", "../dog"], True)
        assert (teacher.name, teacher.revision) == ("me/vit", first)
    args = TeacherArguments("me/vit")
    assert load_teacher(args, ["cat", "../dog"], True).revision == hub_here.history("me/vit")[0] != first


@pytest.mark.parametrize("at", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_everything_is_of_one_commit_while_the_branch_moves_on(hub_here, folder, monkeypatch, at):
    first = hub_here.add_folder("me/vit", folder)
    digest = weights_digest(load_pretrained(str(folder)).model)
    later = contents(save(folder, 1))
    download = access.hf_hub_download

    def download_then_move(name, filename, **options):
        if filename == at:
            hub_here.commit("me/vit", later)
        return download(name, filename, **options)

    monkeypatch.setattr(access, "hf_hub_download", download_then_move)
    loaded = load_pretrained("me/vit")
    assert len(hub_here.history("me/vit")) == 2
    assert (loaded.revision, weights_digest(loaded.model)) == (first, digest)
    assert all(first in r.path for r in hub_here.requests if "/resolve/" in r.path)
    assert weights_digest(load_pretrained("me/vit").model) != digest


def test_what_was_loaded_once_is_loaded_offline(hub_here, folder, monkeypatch):
    commit = hub_here.add_folder("me/vit", folder)
    online = load_pretrained("me/vit")
    hub_here.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        access._confirmed.clear()
        offline = load_pretrained("me/vit", revision)
        assert offline.summary() == online.summary()
    assert not hub_here.requests


@pytest.mark.parametrize("architecture", [None, "convnextv2"])
def test_a_student_starts_from_weights_of_the_hub(hub_here, folder, tmp_path, architecture):
    if architecture is not None:
        shape = {"architecture": "convnextv2", "hidden_sizes": [4, 8], "depths": [1, 1]}
        model, processor = build_student(ModelArguments(**shape), ["a"], (16, 16), [0.5] * 3, [0.5] * 3)
        model.save_pretrained(tmp_path / "next")
        processor.save_pretrained(tmp_path / "next")
        folder = tmp_path / "next"
    hub_here.add_folder("me/start", folder)
    students = []
    for name in (str(folder), "me/start"):
        torch.manual_seed(3)
        args = ModelArguments(model_name_or_path=name, architecture=architecture)
        students.append(build_student(args, ["a", "b", "c"], (16, 16), [0.5] * 3, [0.5] * 3)[0])
        assert students[-1].name_or_path == name
    assert torch.equal(*(logits(student.eval()) for student in students))
    students[1].save_pretrained(tmp_path / "saved")
    assert "hf_home" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_sharded_model_of_the_hub_is_that_of_the_folder(hub_here, tmp_path):
    folder = save(tmp_path / "vit", 0, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    hub_here.add_folder("me/vit", folder)
    digests = [weights_digest(load_pretrained(name).model) for name in (str(folder), "me/vit")]
    assert digests[0] == digests[1] == weights_digest(load_pretrained(str(save(tmp_path / "one", 0))).model)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_trouble_in_the_middle_is_one_line_and_the_next_try_succeeds(hub_here, folder, file):
    hub_here.add_folder("me/vit", folder)
    hub_here.fail("HEAD", f"/{file}", 503, times=20)
    assert "model 'me/vit': the Hub answered 503" in refused("me/vit")
    hub_here.faults.clear()
    assert load_pretrained("me/vit").revision in hub_here.history("me/vit")


def test_a_download_that_breaks_off_is_one_line(hub_here, folder):
    hub_here.add_folder("me/vit", folder)
    hub_here.drop("GET", "/object/", times=99, answered=True)
    assert f"teacher 'me/vit': the connection broke off to {hub_here.endpoint}" in refused("me/vit", "teacher")


# ---- What is more than data ----

CANARY = "canary.txt"


def hostile(folder, file, **changes):
    """Changes keys of one of the JSON files."""
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


EVIL_PROCESSOR = {"auto_map": {"AutoImageProcessor": "code.P"}, "image_processor_type": "Evil"}
CONFIGS = [
    ("config.json", {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}, "model_type": "evil"}, "'auto_map'"),
    ("config.json", {"auto_map": {"AutoConfig": "me/code--code.C"}, "model_type": None}, "'auto_map'"),
    ("config.json", {"auto_map": {"AutoConfig": "code.C"}, "model_type": ["vit"]}, "'auto_map'"),
    ("preprocessor_config.json", EVIL_PROCESSOR, "'auto_map'"),
    ("processor_config.json", {"image_processor": EVIL_PROCESSOR}, "'auto_map'"),
    ("config.json", {"transformers_weights": "../outside/model.safetensors"}, "'transformers_weights'"),
    ("config.json", {"configuration_files": ["config.1.0.0.json", "../outside/config.json"]}, "'configuration_files'"),
    ("config.json", {"vision_config": {"deep": [{"vocab_file": "{outside}/.env"}]}}, "'vision_config.deep.vocab_file'"),
    ("config.json", {"vocab_file": "~/.ssh/id"}, "'vocab_file'"),
    ("config.json", {"vocab_file": "file:///etc/passwd"}, "'vocab_file'"),
    ("config.json", {"vocab_file": "C:\\secrets"}, "'vocab_file'"),
    ("config.json", {"backbone": "hf-hub:other/model"}, "'backbone'"),
    ("config.json", {"attn_implementation": "other/kernel:flash"}, "'attn_implementation'"),
    ("config.json", {"kernel_config": {"Linear": "other/kernel"}}, "'kernel_config.Linear'"),
    ("preprocessor_config.json", {"vocab_file": "sub/../../outside"}, "'vocab_file'"),
]  # fmt: skip


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize(("file", "changes", "says"), CONFIGS)
def test_a_config_that_reaches_outside_is_refused(hub_here, folder, tmp_path, monkeypatch, file, changes, says, place):
    monkeypatch.chdir(tmp_path)
    (folder / "code.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w').close()\nclass C: pass\nM = P = C\n")
    shutil.copytree(folder, tmp_path / "outside")
    hostile(folder, file, **json.loads(json.dumps(changes).replace("{outside}", str(tmp_path / "outside"))))
    hub_here.add_folder("me/vit", folder)
    line = refused(folder if place == "folder" else "me/vit")
    assert f"{file}, key {says}: expected" in line
    assert not (tmp_path / CANARY).exists()
    assert not [r.path for r in hub_here.requests if r.path.endswith((".py", ".safetensors"))]
    assert not [r.path for r in hub_here.requests if "/me/vit" not in r.path]


@pytest.mark.parametrize("changes", [
    {"num_labels": 10**9}, {"num_labels": 1e9}, {"id2label": None, "num_labels": 10**12},
    {"model_args": {"num_classes": 10**9}},
    {"pretrained_cfg": {"num_classes": 10**9}}, {"vision_config": {"num_labels": 10**9}},
])  # fmt: skip
@pytest.mark.parametrize("untrained", [None, 0])
def test_more_classes_than_there_can_be_are_refused_before_names_are_made_of_them(folder, changes, untrained):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        ModelLoadError, match=rf"^teacher .*expected at most {MAX_CLASSES} classes, found 10{{9}}(0{{3}}|\.0)?$"
    ):
        load_pretrained(str(folder), role="teacher", untrained_seed=untrained)


def test_timm_reads_no_other_file(hub_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / CANARY), "w"))

    torch.save(Payload(), tmp_path / "weights.pth")
    config = TimmWrapperConfig(
        architecture="test_convnext",
        num_labels=2,
        pretrained_cfg={"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "url": "https://host/x.pth"},
    )
    folder = tmp_path / "timm"
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    hub_here.add_folder("me/timm", folder)
    assert load_pretrained("me/timm").revision is not None
    for key in ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"):
        hostile(folder, "config.json", model_args={key: "weights.pth"})
        hub_here.commit("me/timm", contents(folder))
        for name in (folder, "me/timm"):
            assert f"key 'model_args.{key}': expected none" in refused(name)
    assert not (tmp_path / CANARY).exists()


def test_a_class_that_is_known_is_used_whatever_code_lies_beside(hub_here, folder, tmp_path):
    (folder / "code.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w')\nclass C: pass\n")
    before = weights_digest(load_pretrained(str(folder)).model)
    hostile(folder, "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForImageClassification": "code.C"})
    hostile(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "code.C"})
    hub_here.add_folder("me/vit", folder)
    for name in (str(folder), "me/vit"):
        assert weights_digest(load_pretrained(name).model) == before
    assert not (tmp_path / CANARY).exists()
    assert not [r.path for r in hub_here.requests if r.path.endswith(".py")]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_pickles_are_not_even_fetched(hub_here, folder, tmp_path, place):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / CANARY), "w"))

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"payload": Payload()}, folder / name)
    hub_here.add_folder("me/vit", folder)
    line = refused(folder if place == "folder" else "me/vit")
    assert line.endswith("expected model.safetensors, found none (pickled weights are never read)")
    assert not (tmp_path / CANARY).exists()
    assert not [r.path for r in hub_here.requests if r.path.endswith((".bin", ".pt"))]


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, ""])
def test_an_index_names_safetensors_of_its_own_folder(hub_here, folder, shard, place):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    hub_here.add_folder("me/vit", folder)
    line = refused(folder if place == "folder" else "me/vit")
    assert f"key 'weight_map': expected names of safetensors files, found {shard!r}" in line
    assert not [r.path for r in hub_here.requests if "outside" in r.path]


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_weights_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "key 'weight_map': expected a file for each weight, found none" in refused(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(folder, file):
    (folder / "inner").mkdir()
    (folder / file).rename(folder / "inner" / file)
    (folder / file).symlink_to(Path("inner") / file)
    assert load_pretrained(str(folder)).revision is None
    (folder / "inner" / file).rename(folder.parent / file)
    (folder / file).unlink()
    (folder / file).symlink_to(folder.parent / file)
    assert f"expected {file} in the folder, found a link to {folder.parent / file}" in refused(folder)


def test_the_caches_own_links_are_no_way_out(hub_here, folder):
    commit = hub_here.add_folder("me/vit", folder)
    snapshot = model_files("me/vit").folder
    assert (Path(snapshot) / "model.safetensors").is_symlink()
    assert snapshot.endswith(commit)
    assert load_pretrained(snapshot).summary() == load_pretrained("me/vit").summary() | {
        "name": snapshot,
        "revision": None,
    }


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", b"{", "config.json could not be read"),
        ("config.json", b"[]", "config.json: expected a JSON object, found list"),
        ("config.json", b"\xff\xfe", "config.json could not be read"),
        ("config.json", b"[" * 100_000, "config.json could not be read"),
        ("config.json", b"{}", "could not be loaded"),
        ("config.json", b'{"model_type": "vit", "hidden_size": "x"}', "could not be loaded"),
        ("config.json", b'{"model_type": "vit", "num_attention_heads": 0}', "could not be loaded"),
        ("config.json", b'{"architecture": "x:y", "pretrained_cfg": {}, "model_type": "timm_wrapper"}', "could not be"),
        ("preprocessor_config.json", b'{"image_processor_type": "ViTImageProcessor", "size": 1.5}', "could not be"),
        ("preprocessor_config.json", b"null", "expected a JSON object, found NoneType"),
        ("model.safetensors", b"not safetensors", "could not be loaded"),
        ("model.safetensors", b"", "could not be loaded"),
    ],
)
def test_any_content_is_loaded_or_refused_in_one_line(folder, file, content, says):
    (folder / file).write_bytes(content)
    assert says in refused(folder)
