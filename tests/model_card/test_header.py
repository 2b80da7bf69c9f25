"""The YAML header of a card."""

import random

import pytest
from huggingface_hub import ModelCard

from hf_ihb.errors import DataError
from hf_ihb.hub import card_files, run_card
from hf_ihb.model_card import card_data
from tests.model_card.records import SHA, records


def test_the_header_holds_the_numbers_of_the_json_files_exactly(make_run):
    files = records()
    draw = random.Random(3).random
    files["metrics.json"]["heads"]["averaged"]["accuracy"] = draw()
    for layer in files["analysis.json"]["attention"]["layers"]:
        layer["distance"] = 5 * draw()
    card = ModelCard(run_card(make_run(files), repo_id="me/cka"))
    accuracy, *distances = card.data.eval_results
    assert accuracy.metric_type == "accuracy"
    assert accuracy.metric_value == files["metrics.json"]["heads"]["averaged"]["accuracy"]
    assert [r.metric_value for r in distances] == [
        layer["distance"] for layer in files["analysis.json"]["attention"]["layers"]
    ]
    assert [r.metric_name for r in distances] == [f"Mean attention distance, layer {i}" for i in range(2)]
    assert {r.metric_type for r in distances} == {"mean_attention_distance"}
    for i, result in enumerate(distances):
        assert result.metric_args == {
            "layer": i,
            "unit": "patches",
            "reduction": "mean over heads, query patches and images",
            "uniform_distance": files["analysis.json"]["attention"]["uniform_distance"],
            "num_images": 2048,
        }
    for result in card.data.eval_results:
        assert type(result.metric_value) is float
        assert (result.dataset_type, result.dataset_name) == ("uoft-cs/cifar10", "cifar10")
        assert (result.dataset_config, result.dataset_split) == ("plain_text", "test")
        assert result.dataset_revision == SHA


def test_the_header_says_what_the_hub_files_it_under(make_run):
    data = ModelCard(run_card(make_run(records()), repo_id="me/deit")).data.to_dict()
    assert len(data["model-index"]) == 1
    assert data["model-index"][0]["name"] == "deit"
    del data["model-index"]
    assert data == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "hf_ihb", "distillation", "knowledge-distillation"],
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
        "teacher_model": "facebook/dinov2-small",
        "teacher_revision": SHA,
    }


def test_the_card_is_the_text_that_the_library_would_write(make_run):
    text = run_card(make_run(records()))
    assert str(ModelCard(text)) == text
    assert card_data(card_files(make_run(records()))).to_dict() == ModelCard(text).data.to_dict()


def test_numbers_that_are_not_defined_are_not_published(make_run):
    files = records()
    files["analysis.json"]["attention"]["layers"][1]["distance"] = None
    results = ModelCard(run_card(make_run(files))).data.eval_results
    assert [(r.metric_type, (r.metric_args or {}).get("layer")) for r in results] == [
        ("accuracy", None),
        ("mean_attention_distance", 0),
    ]


def test_a_data_set_or_teacher_that_was_local_is_no_hub_id(make_run, tmp_path):
    files = records()
    local = {"name": str(tmp_path / "sets" / "cifar10"), "revision": None}
    files["recipe.json"]["keys"] |= {"dataset_name": local["name"], "teacher_model": "outputs/a/resnet18"}
    files["recipe.json"]["dataset"] |= local
    files["recipe.json"]["teacher"] = {"name": "outputs/a/resnet18", "revision": None}
    for name in ("metrics.json", "analysis.json"):
        files[name]["data"] |= local
        files[name]["teacher"] |= {"name": "outputs/a/resnet18", "revision": None}
    text = run_card(make_run(files))
    data = ModelCard(text).data.to_dict()
    assert "datasets" not in data
    assert "teacher_revision" not in data
    assert data["teacher_model"] == "local:resnet18"
    assert "`resnet18` (a local folder)" in text
    assert "`cifar10` (a local folder)" in text
    assert "--dataset_name FOLDER" in text
    for leak in (str(tmp_path), "outputs/a", "sets"):
        assert leak not in text


def test_digits_are_neither_local_nor_on_the_hub(make_run):
    files = records()
    digits = {"name": "sklearn:digits", "revision": None}
    files["recipe.json"]["keys"]["dataset_name"] = "sklearn:digits"
    files["recipe.json"]["dataset"] |= digits
    files["metrics.json"]["data"] |= digits
    text = run_card(make_run(files))
    assert "datasets" not in ModelCard(text).data.to_dict()
    assert "--dataset_name" not in text
    assert "`sklearn:digits`" in text


def test_weights_that_training_started_from_are_the_base_model(make_run):
    files = records()
    files["recipe.json"]["keys"] |= {"model_name_or_path": "facebook/deit-tiny-patch16-224", "model_revision": SHA}
    text = run_card(make_run(files))
    data = ModelCard(text).data
    assert data.base_model == "facebook/deit-tiny-patch16-224"
    assert data.base_model_relation == "finetune"
    assert "from the weights of" in text
    files["recipe.json"]["keys"] |= {"model_name_or_path": "/weights/tiny", "model_revision": None}
    text = run_card(make_run(files))
    assert ModelCard(text).data.base_model is None
    assert "from the weights of `tiny` (a local folder)" in text


def test_options_add_to_what_the_files_say_or_take_its_place(make_run):
    folder = make_run(records())
    options = {
        "license": "cc-by-4.0",
        "tags": ["mine", "distillation"],
        "model_name": "Small-DeiT",
        "base_model": "me/base",
        "datasets": ["me/more"],
    }
    text = run_card(folder, **options)
    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    assert data.tags == ["image-classification", "hf_ihb", "distillation", "knowledge-distillation", "mine"]
    assert data.base_model == "me/base"
    assert data.datasets == ["uoft-cs/cifar10", "me/more"]
    assert data.model_name == "Small-DeiT"
    assert "\n# Small-DeiT\n" in text


@pytest.mark.parametrize("option", [{"base_model": "/a/b/c"}, {"datasets": ["https://x/y"]}, {"datasets": ["a/b\n"]}])
def test_names_that_the_hub_cannot_have_are_refused(make_run, option):
    with pytest.raises(DataError, match="expected Hub ids"):
        run_card(make_run(records()), **option)
