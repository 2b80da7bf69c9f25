"""What a person sees of the scripts: exit codes, one line for a mistake, and nothing written by it."""

import json
from pathlib import Path

import pytest
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ihb.run import run_script

ROOT = Path(__file__).parents[1]
STUDENT = {
    "dataset_name": "sklearn:digits", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "patch_size": 2, "max_train_samples": 64, "max_eval_samples": 40, "per_device_train_batch_size": 32, "max_steps": 1,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "analyses_after_training": "none",
}  # fmt: skip
TAUGHT = {**STUDENT, "method": "logits"}


@pytest.mark.parametrize(
    ("name", "recipe", "overrides", "code", "says"),
    [
        ("train.py", {**STUDENT, "learning_rat": 1}, [], 2, "unknown; did you mean 'learning_rate'?"),
        ("train.py", STUDENT, ["--drop_path_rate", "1.5"], 2, "command line: key 'drop_path_rate': expected"),
        ("train.py", "{", [], 2, "recipe.json:1:2: expected JSON"),
        ("train.py", {**STUDENT, "patch_size": 3}, [], 2, "a multiple of 3 px, found 8 x 8 px"),
        ("train.py", {**STUDENT, "architecture": "dejt"}, [], 2, "key 'architecture': expected deit, deit_cls, vit"),
        ("train.py", {**STUDENT, "dataset_name": "no/such-set"}, [], 3, "data set 'no/such-set': not in the cache"),
        ("distill.py", {**STUDENT, "method": "logit"}, [], 2, "key 'method': expected one of logits, structural"),
        ("distill.py", TAUGHT, [], 2, "key 'teacher_model': expected a Hub id or a folder, found nothing"),
        ("distill.py", {**TAUGHT, "teacher_model": "x", "teacher_view": "clean", "mixup_alpha": 1}, [], 2, "not mixed"),
        ("distill.py", {**TAUGHT, "teacher_model": "no/such-model"}, [], 3, "'no/such-model': not in the cache"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(name, recipe, overrides, code, says, script, tmp_path):
    done = script(name, recipe, *overrides, "--output_dir", "run")
    last = done.stderr.strip().splitlines()[-1]
    assert done.code == code, done.stderr
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json"]


def test_an_earlier_run_is_kept_unless_it_is_resumed_or_replaced(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = script("train.py", STUDENT, "--output_dir", "run", "--seed", "7")
    assert again.code == 2
    assert "--overwrite_output_dir true" in again.stderr
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    replaced = script("train.py", STUDENT, "--output_dir", "run", "--seed", "7", "--overwrite_output_dir", "true")
    assert replaced.code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_the_next(script, tmp_path):
    failed = script("train.py", {**STUDENT, "per_device_train_batch_size": 500}, "--output_dir", "run")
    assert failed.code == 3
    assert "0 steps" in failed.stderr
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0


def test_replacing_a_run_leaves_files_that_are_not_ours(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoint-99").mkdir()
    assert script("train.py", STUDENT, "--output_dir", "run", "--overwrite_output_dir", "true").code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "checkpoint-99").exists()


def test_a_folder_whose_recipe_is_somebodys_own_is_not_taken_for_a_run(script, tmp_path):
    done = script("train.py", STUDENT, "--output_dir", ".", "--overwrite_output_dir", "true")
    assert done.code == 2
    assert "with other content" in done.stderr


def test_epochs_on_the_command_line_beat_the_recipes(script, tmp_path):
    recipe = {**STUDENT, "max_steps": -1, "num_train_epochs": 5}
    assert script("train.py", recipe, "--output_dir", "run", "--num_train_epochs", "1").code == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["train_steps"] == 2  # 64 images by 32


def test_a_folder_with_other_content_is_never_written_to(script, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    done = script("train.py", STUDENT, "--output_dir", "thesis", "--overwrite_output_dir", "true")
    assert done.code == 2
    assert "expected an empty or new folder" in done.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_run_leaves_what_later_steps_read_and_the_table_shows_it(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    recipe, evaluation = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("recipe", "evaluation"))
    assert recipe["keys"]["hidden_size"] == 32
    assert not any(key.endswith("_token") for key in recipe["keys"])
    assert {"torch", "transformers"} <= recipe["environment"]["versions"].keys()
    assert evaluation["test"]["num_images"] == 40
    assert json.loads((tmp_path / "run" / "training_history.json").read_text())
    table = script("summarize.py", None, "run").stdout
    assert f"{100 * evaluation['test']['accuracy']:.2f}" in table.splitlines()[2]


@pytest.mark.parametrize("name", ["evaluate_model.py", "analyze.py"])
def test_help_of_what_reads_a_finished_model_says_what_goes_first(name, script):
    done = script(name, None, "--help")
    assert done.code == 0
    assert "MODEL" in done.stdout.splitlines()[0]
    for key in ("--dataset_name", "--teacher_model", "--output_dir", "--batch_size"):
        assert key in done.stdout


# ---- Analysis ----

QUICK = [
    "--max_images", "40", "--hessian_images", "20", "--max_probes", "2", "--lanczos_steps", "3", "--lanczos_starts",
    "1", "--device", "cpu",
]  # fmt: skip
DRAWN = {
    "attention_distance.png", "attention_maps.png", "attention_statistics.png", "cka_linear.png", "cka_rbf.png",
    "eigenvalue_density.png",
}  # fmt: skip


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_a_finished_run_is_analysed_on_the_data_of_its_recipe(script, tmp_path):
    assert script("train.py", {**STUDENT, "max_eval_samples": 60}, "--output_dir", "run").code == 0
    done = script("analyze.py", None, "run", *QUICK)
    assert done.code == 0, done.stderr
    found = read(tmp_path / "run" / "analysis.json")
    assert found["data"]["name"] == "sklearn:digits"
    assert found["data"]["num_images"] == 40
    assert found["attention"]["grid"] == [4, 4]
    assert found["hessian"]["num_images"] == 20
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {*DRAWN, "confusion_matrix.png"}
    assert f"{found['attention']['mean_distance']:.3f}" in done.stdout
    assert "numbers and plots are in run" in done.stdout
    # a new run in its place leaves nothing of the old one's results
    assert script("train.py", STUDENT, "--output_dir", "run", "--overwrite_output_dir", "true").code == 0
    assert not (tmp_path / "run" / "analysis.json").exists()
    assert [path.name for path in (tmp_path / "run" / "plots").iterdir()] == ["confusion_matrix.png"]


def test_students_are_put_side_by_side_and_what_is_known_is_read(script, tmp_path):
    for seed in "12":
        assert script("train.py", STUDENT, "--output_dir", f"s{seed}/run", "--seed", seed).code == 0
    metrics = ["--metrics", "attention", "--num_maps", "0"]
    assert script("analyze.py", None, "s1/run", *QUICK, *metrics).code == 0
    own = tmp_path / "s1" / "run" / "analysis.json"
    before = read(own)
    compare = ["--compare", "s1/run", "s2/run", *QUICK, *metrics]
    done = script("analyze.py", None, *compare)
    assert done.code == 0, done.stderr
    together = tmp_path / "outputs" / "comparison"
    side_by_side = read(together / "comparison.json")
    assert list(side_by_side) == ["s1/run", "s2/run"]
    assert side_by_side["s1/run"] == before
    assert (together / "plots" / "attention_distance.png").is_file()
    assert all(f"| {name} |" in done.stdout for name in side_by_side)
    # what was made for the comparison is read when it is made again, and the models' own files are left alone
    side_by_side["s2/run"]["attention"]["mean_distance"] = 42.0
    (together / "comparison.json").write_text(json.dumps(side_by_side))
    assert "42.000" in script("analyze.py", None, *compare).stdout
    assert "42.000" not in script("analyze.py", None, *compare, "--max_images", "30").stdout
    assert read(own) == before
    assert not (tmp_path / "s2" / "run" / "analysis.json").exists()


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def hf_vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **SHAPE)), 16


def dinov2():
    return Dinov2Model(
        Dinov2Config(image_size=56, patch_size=14, **SHAPE)
    ), 28  # shown another size than it is made for


def dinov2_with_registers():
    config = Dinov2WithRegistersConfig(image_size=28, patch_size=14, num_register_tokens=4, **SHAPE)
    return Dinov2WithRegistersModel(config), 28


def timm_vit():
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=10,
        model_args={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        pretrained_cfg={"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    )
    return TimmWrapperForImageClassification(config), None


@pytest.mark.parametrize(
    ("make", "grid", "prefix"),
    [(hf_vit, [4, 4], 1), (timm_vit, [4, 4], 1), (dinov2, [2, 2], 1), (dinov2_with_registers, [2, 2], 5)],
)
def test_models_of_others_are_analysed_as_they_are(make, grid, prefix, script, tmp_path):
    model, size = make()
    model.save_pretrained(tmp_path / "model")
    if size is not None:
        processor = BitImageProcessor(do_center_crop=False, size={"height": size, "width": size})
        processor.save_pretrained(tmp_path / "model")
    arguments = ["--dataset_name", "sklearn:digits", "--metrics", "attention,cka", "--teacher_model", "model"]
    done = script("analyze.py", None, "model", *arguments, *QUICK)
    assert done.code == 0, done.stderr
    found = read(tmp_path / "model" / "analysis.json")
    assert found["attention"]["grid"] == grid
    assert found["attention"]["num_prefix_tokens"] == prefix
    assert len(found["attention"]["layers"]) == 2
    own, cross = (matrix["linear"] for matrix in found["cka"]["matrices"])
    assert cross == own  # it was its own teacher
    assert [own[0][0], own[1][1]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "command line: expected a model first"),
        (["no/such-model"], 3, "model 'no/such-model': not in the cache"),
        (["cnn"], 3, "expected a ViT with self-attention over all patches, found none; leave attention out"),
        (["cnn", "--metrics", "cka", "--teacher_model", "nobody/nothing"], 3, "'nobody/nothing': not in the cache"),
        (["cnn", "--metrics", "cka", "--max_images", "9"], 3, "key 'max_images', test: cannot be split by class"),
        (["cnn", "--compare", "cnn"], 3, "expected different models, found cnn twice"),
    ],
)
def test_an_analysis_that_cannot_be_made_fails_the_command_in_one_line(arguments, code, says, script, tmp_path):
    labels = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    cnn = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **labels)
    ResNetForImageClassification(cnn).save_pretrained(tmp_path / "cnn")
    BitImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(tmp_path / "cnn")
    done = script("analyze.py", None, *arguments, "--dataset_name", "sklearn:digits")
    assert done.code == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train.py", "distill.py"])
def test_help_prints_every_key_with_its_range_without_a_recipe(name, script):
    done = script(name, None, "--help")
    assert done.code == 0
    keys = ["--random_crop_padding", "--drop_path_rate", "--learning_rate"]
    keys += ["--temperature", "--cka_weight", "--teacher_model"] if name == "distill.py" else []
    for key in keys:
        assert key in done.stdout
    assert "in [0, 1)" in " ".join(done.stdout.split())


def test_a_disk_that_is_full_is_one_line_of_any_script(capsys, monkeypatch):
    def main(argv):
        with open("/dev/full", "w") as file:
            file.write("results")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 4
    said = "error: a file: No space left on device; what is there is kept: make room, and start again\n"
    assert capsys.readouterr().err == said
