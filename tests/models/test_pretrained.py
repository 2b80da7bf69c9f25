import json

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ihb.access import resolve_commit
from hf_ihb.errors import ModelLoadError, TeacherMismatchError
from hf_ihb.models.pretrained import (
    data_defaults,
    label_permutation,
    load_pretrained,
    untrained_twin,
    weights_digest,
)

NAMES = ["cat", "dog", "night owl"]
SHAPE = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def save(folder, model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classifier(tmp_path):
    return save(tmp_path / "vit", ViTForImageClassification(ViTConfig(**SHAPE, **LABELS)))


def test_a_classifier_is_taken_where_one_was_saved_and_a_backbone_where_not(classifier, tmp_path):
    assert isinstance(load_pretrained(classifier, needs_logits=None).model, ViTForImageClassification)
    backbone = save(tmp_path / "dino", Dinov2Model(Dinov2Config(**SHAPE)))
    assert isinstance(load_pretrained(backbone, needs_logits=None).model, Dinov2Model)
    with pytest.raises(ModelLoadError, match=r"model '.*dino': expected weights for all of Dinov2ForImage"):
        load_pretrained(backbone, needs_logits=True)


def test_a_backbone_of_a_classifier_is_the_same_whatever_the_runs_seed(classifier):
    digests, draws = set(), set()
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        model = load_pretrained(classifier, needs_logits=False).model
        assert "pooler.dense.weight" in model.state_dict()  # which no classifier has, and no block needs
        digests.add(weights_digest(model))
        draws.add((seed, torch.rand(()).item()))
    assert len(digests) == 1
    assert draws == {(seed, torch.rand((), generator=torch.Generator().manual_seed(seed)).item()) for seed in (1, 2)}


def test_a_loaded_model_is_ready_to_be_measured(classifier):
    loaded = load_pretrained(classifier)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.pixels.size == (16, 16)
    assert loaded.summary() == {
        "name": classifier,
        "revision": None,
        "class": "ViTForImageClassification",
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "weights_sha256": weights_digest(loaded.model),
    }


def test_the_digest_follows_the_weights_and_nothing_else(classifier):
    one, other = (load_pretrained(classifier).model for _ in range(2))
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        other.classifier.bias[0] += 1e-6
    assert weights_digest(one) != weights_digest(other)


def test_an_untrained_twin_has_the_shape_but_not_the_weights(classifier):
    model = load_pretrained(classifier).model
    state = torch.get_rng_state()
    twin, again, other = (untrained_twin(model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not twin.training
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert weights_digest(twin) == weights_digest(again) != weights_digest(other)
    name = "vit.embeddings.position_embeddings"
    assert 0 < twin.state_dict()[name].std() < 0.03 < 0.1 < model.state_dict()[name].std()


def test_tokens_that_transformers_leaves_at_zero_are_drawn():
    config = DeiTConfig(**SHAPE, **LABELS)
    embeddings = untrained_twin(DeiTForImageClassificationWithTeacher(config), 0).deit.embeddings
    for tokens in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        assert 0.005 < tokens.std() < 0.03


def test_the_recipe_beside_a_model_says_what_it_was_trained_on(classifier, tmp_path):
    assert data_defaults(classifier) == {}
    keys = {"dataset_name": "sklearn:digits", "split_seed": 7, "output_dir": "elsewhere", "teacher_model": "t"}
    (tmp_path / "vit" / "recipe.json").write_text(json.dumps({"keys": keys}), "utf-8")
    assert data_defaults(classifier) == {"dataset_name": "sklearn:digits", "split_seed": 7}


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_recipe_that_cannot_be_read_is_refused(content, classifier, tmp_path):
    (tmp_path / "vit" / "recipe.json").write_text(content, "utf-8")
    with pytest.raises(ModelLoadError, match=r"vit': its recipe\.json could not be read"):
        data_defaults(classifier)


def recipe(**keys):
    return {"recipe.json": json.dumps({"keys": keys}).encode()}


def test_the_recipe_on_the_hub_is_read_at_the_commit_that_is_measured(hub_here):
    first = hub_here.add_repo("me/recipe", recipe(dataset_name="me/set", dataset_revision="a" * 40, seed=1))
    second = hub_here.commit("me/recipe", recipe(dataset_name="me/other"))
    assert data_defaults("me/recipe") == {"dataset_name": "me/other", "model_revision": second}
    expected = {"dataset_name": "me/set", "dataset_revision": "a" * 40, "model_revision": first}
    assert data_defaults("me/recipe", first) == expected
    hub_here.commit("me/recipe", {"recipe.json": None})
    assert data_defaults("me/recipe") == {"model_revision": hub_here.history("me/recipe")[0]}


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_recipe_that_cannot_be_asked_for_is_not_taken_for_absent(hub_here, status):
    hub_here.add_repo("me/recipe", recipe(dataset_name="me/set"))
    code = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    hub_here.fail("HEAD", "/recipe.json", status, times=99, headers=code)
    with pytest.raises(ModelLoadError, match=f"^model 'me/recipe': the Hub answered {status}"):
        data_defaults("me/recipe")


def test_an_unknown_recipe_is_said_to_be_unknown_offline(hub_here, monkeypatch, caplog):
    commit = hub_here.add_repo("me/unfetched", recipe(dataset_name="me/set"))
    resolve_commit("me/unfetched")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert data_defaults("me/unfetched") == {"model_revision": commit}
    assert "recipe.json is not in the cache, and is taken for absent offline" in caplog.text


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_said_to_be_so():
    with pytest.raises(ModelLoadError, match="model 'no/such/folder': expected a folder or a Hub id, found neither"):
        data_defaults("no/such/folder")


def test_classes_are_matched_by_name():
    config = ViTConfig(id2label={0: "Night_Owl", 1: "cat", 2: "dog"})
    permutation = label_permutation(config, NAMES, "model 'm'")
    logits = torch.tensor([[10.0, 20.0, 30.0]])  # of night owl, cat, dog
    assert logits[:, permutation].tolist() == [[20.0, 30.0, 10.0]]
    assert label_permutation(ViTConfig(id2label=dict(enumerate(NAMES))), NAMES, "model 'm'") is None
    with pytest.raises(TeacherMismatchError, match="model 'm': expected 2 classes"):
        label_permutation(config, NAMES[:2], "model 'm'")
    with pytest.raises(TeacherMismatchError, match=r"give it the data set's names$"):
        label_permutation(config, ["a", "b", "c"], "model 'm'")
