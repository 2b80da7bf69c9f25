import pytest

from hf_ihb.runs.report import learned_from

WEIGHTS = {f"{name}_weight": 0.0 for name in ("cka", "gram", "token", "relation")}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"method": "logits", "distillation_type": "hard"}, "cnn: hard logits"),
        ({"method": "structural", **WEIGHTS, "cka_weight": 1.0}, "cnn: cka"),
        ({"method": "structural", **WEIGHTS, "token_weight": 0.5, "relation_weight": 0.1}, "cnn: token + relation"),
        ({"method": "structural", **WEIGHTS, "gram_weight": 1.0, "teacher_control": "shuffled"}, "shuffled cnn: gram"),
        ({"method": "structural", **WEIGHTS, "cka_weight": 1.0, "teacher_control": "none"}, "cnn: cka"),
    ],
)
def test_a_run_is_named_by_its_teacher_its_control_and_its_losses(keys, expected):
    assert learned_from({"keys": keys, "teacher": {"name": "outputs/cnn"}}) == expected


def test_a_run_without_a_teacher_learned_from_labels():
    assert learned_from({"keys": {}, "teacher": None}) == "labels"


def test_a_run_with_several_teachers_names_each_with_its_losses():
    teachers = [
        {"name": "outputs/cnn", "keys": {"alpha": 0.5}},
        {"name": "org/vit", "keys": {"cka_weight": 1.0, "teacher_control": "shuffled"}},
    ]
    recipe = {"keys": {"method": None, "alpha": 0.0, **WEIGHTS}, "teacher": teachers[0], "teachers": teachers}
    assert learned_from(recipe) == "cnn: soft logits; shuffled vit: cka"
