"""The tests' Hub, by the real clients: what it answers is what they act on."""

import inspect
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

SIZE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model():
    return ViTForImageClassification(ViTConfig(**SIZE, intermediate_size=16))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "plots").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\nmetrics:\n- accuracy\n---\n# Card\n")
    (path / "config.json").write_text("{}")
    (path / "plots" / "a.png").write_bytes(bytes(range(256)) * 300)
    return path


def upload(folder, **keys):
    return HfApi().upload_folder(repo_id="me/m", folder_path=folder, **keys)


def pull(name, **keys):
    return Path(hf_hub_download("me/m", name, **keys)).read_bytes()


@pytest.fixture
def repo(hub_here):
    HfApi().create_repo("me/m")
    return hub_here


def test_a_pushed_model_is_pulled_with_the_same_weights(hub_here, model):
    model.push_to_hub("me/m")
    found = AutoModelForImageClassification.from_pretrained("me/m").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_an_unchanged_push_makes_no_commit(repo, folder):
    upload(folder)
    before = repo.history("me/m")
    upload(folder)
    assert repo.history("me/m") == before
    assert len(before) == 2


def test_a_download_has_the_bytes_of_the_upload_and_a_pinned_one_stays(repo, folder):
    first = upload(folder).oid
    repo.commit("me/m", {"config.json": b'{"a": 1}'})
    assert pull("plots/a.png") == (folder / "plots" / "a.png").read_bytes()
    assert pull("config.json", revision=first) == b"{}"
    assert pull("config.json") == b'{"a": 1}'


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_tree_comes_in_pages(repo, folder, tmp_path, size):
    upload(folder)
    repo.page_size = size
    path = snapshot_download("me/m", local_dir=tmp_path / "there")
    assert sorted(p.name for p in (tmp_path / "there").rglob("*.*") if ".cache" not in p.parts) == [
        ".gitattributes", "README.md", "a.png", "config.json",
    ]  # fmt: skip
    assert path == str(tmp_path / "there")


def test_what_does_not_exist_is_told_apart(repo):
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("me/none")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("me/m", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/m", "none.json")


def test_a_private_repo_is_there_for_its_owner_alone(hub_here):
    HfApi().create_repo("me/secret", private=True)
    hub_here.add_user("you", "hf_" + "y" * 30)
    assert HfApi().model_info("me/secret").private
    for token in (False, "hf_" + "y" * 30):
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info("me/secret", token=token)


def test_a_gated_repo_shows_what_it_is_and_keeps_its_files(hub_here):
    hub_here.add_repo("them/gated", {"config.json": b"{}"}, gated=True)
    assert HfApi().model_info("them/gated").gated == "manual"
    for call in (lambda: hf_hub_download("them/gated", "config.json"), lambda: HfApi().auth_check("them/gated")):
        with pytest.raises(GatedRepoError):
            call()
    hub_here.repos["model", "them/gated"].granted.add("me")
    assert hf_hub_download("them/gated", "config.json")


def test_a_wrong_token_is_no_missing_repo(repo, folder):
    with pytest.raises(HfHubHTTPError, match="401") as caught:
        upload(folder, token="hf_" + "x" * 30)
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_others_repos_can_be_read_and_not_written(hub_here, folder):
    hub_here.add_repo("them/m")
    assert HfApi().create_repo("them/m", exist_ok=True).repo_id == "them/m"
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().auth_check("them/m", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().upload_folder(repo_id="them/m", folder_path=folder)


def test_branches_tags_and_a_pull_request(repo, folder):
    api, first = HfApi(), repo.history("me/m")[0]
    api.create_branch("me/m", branch="wip")
    api.create_tag("me/m", tag="v1")
    assert api.model_info("me/m", revision="v1").sha == first
    proposed = upload(folder, create_pr=True)
    assert proposed.pr_num == 1
    assert repo.history("me/m") == [first]
    assert api.model_info("me/m", revision="refs/pr/1").sha == proposed.oid
    api.merge_pull_request("me/m", 1)
    assert b"license" in repo.files("me/m")["README.md"]
    assert {r.name for r in api.list_repo_refs("me/m").branches} == {"main", "wip"}
    assert api.get_discussion_details("me/m", 1).status == "merged"


def test_an_outdated_parent_is_refused(repo, folder):
    parent = repo.history("me/m")[0]
    repo.commit("me/m", {"x": b""})
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(folder, parent_commit=parent)


@pytest.mark.parametrize("fault", ["fail", "drop"])
@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/upload/", "/verify"])
def test_trouble_on_the_way_is_outlived_and_the_commit_is_one(repo, folder, fault, path):
    method = "PUT" if path == "/upload/" else "POST"
    planned = getattr(repo, fault)(method, path, times=2)
    upload(folder)
    assert planned.fired == 2
    assert len(repo.history("me/m")) == 2


def test_an_interrupted_upload_leaves_the_branch_and_the_next_sends_what_is_missing(repo, folder):
    (folder / "plots" / "b.png").write_bytes(b"b" * 99)
    repo.fail("PUT", "/upload/", status=403)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload(folder)
    assert len(repo.history("me/m")) == 1
    before = len([r for r in repo.requests if r.method == "PUT"])
    stored = len(repo.stored)
    upload(folder)
    assert len([r for r in repo.requests if r.method == "PUT"]) - before == 2 - stored
    assert {"plots/a.png", "plots/b.png"} <= repo.files("me/m").keys()


@pytest.mark.skipif(
    "constants.ENDPOINT" not in inspect.getsource(ModelCard.validate),
    reason="this huggingface_hub asks huggingface.co itself, whatever the endpoint is",
)
def test_a_card_with_false_metadata_is_refused(repo):
    ModelCard("---\nmetrics:\n- accuracy\n---\n").validate()
    for bad in ("metrics: accuracy", "license: [1]"):
        with pytest.raises(ValueError, match="must be"):
            ModelCard(f"---\n{bad}\n---\n").push_to_hub("me/m")


def test_an_image_set_is_pushed_loaded_and_pinned(hub_here):
    def images(value):
        pixels = [np.full((4, 4, 3), value, dtype=np.uint8)] * 3
        names = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        split = datasets.Dataset.from_dict({"img": pixels, "label": [0, 1, 0]}, features=names)
        return datasets.DatasetDict({"train": split, "test": split.select([0])})

    images(7).push_to_hub("me/set")
    first = hub_here.history("me/set", repo_type="dataset")[0]
    images(9).push_to_hub("me/set")
    assert np.asarray(datasets.load_dataset("me/set", revision=first)["train"][0]["img"]).max() == 7
    assert np.asarray(datasets.load_dataset("me/set")["test"][0]["img"]).max() == 9


def test_the_storage_host_sees_no_token_and_every_request_is_kept(repo, folder):
    upload(folder)
    hosts = {r.host: r for r in repo.requests}
    assert "authorization" not in hosts["storage"].headers
    assert any(b"hf_canary" in r.headers.get("authorization", "").encode() for r in repo.requests if r.host == "hub")
    assert any((folder / "plots" / "a.png").read_bytes() == r.body for r in repo.requests)
