import copy

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTMSNConfig, ViTMSNModel

from benchmarks.families import MEAN, STD, TRANSFORMERS
from hf_ihb.analysis.cka import CKAAnalysis
from hf_ihb.errors import ModelLoadError
from hf_ihb.functional.similarity import linear_cka
from hf_ihb.models.features import extract_features
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.models.processing import student_processor
from tests.analysis.conftest import PIXELS, SHAPE, measure, subject


def test_cka_is_that_of_pooled_block_outputs(student, cnn, split):
    found = measure(student, split, "cka", cnn)["cka"]
    pixels = PIXELS.apply(split.images.float() / 255)
    with torch.no_grad():
        x, y = (
            [f.patch_tokens.mean(1).double() for f in extract_features(s.model, pixels, None)[1]]
            for s in (student, cnn)
        )
    own, cross = found["matrices"]
    assert own["rows"] == own["columns"] == {"name": student.name, "layers": [0, 1]}
    assert cross["columns"] == {"name": cnn.name, "layers": [0, 1, 2]}
    for matrix, columns in ((own, x), (cross, y)):
        expected = [[linear_cka(a, b, "debiased").item() for b in columns] for a in x]
        assert torch.tensor(matrix["linear"]).numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-4)


def test_a_teacher_sees_the_images_at_its_own_size(student, split):
    shape = SHAPE | {"image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**shape))
    small, large = (subject(copy.deepcopy(model), PIXELS.whole((px, px))) for px in (28, 56))
    for teacher in (small, large):
        teacher.model.load_state_dict(small.model.state_dict())
    matrices = [measure(student, split, "cka", t)["cka"]["matrices"][1]["linear"] for t in (small, large)]
    assert matrices[0] != matrices[1]


def test_a_teacher_is_part_of_the_similarity_alone(student, cnn, split):
    first = measure(student, split, "attention,cka", cnn)
    later = measure(student, split, "hessian", previous=first)
    assert later["cka"] is first["cka"]
    assert later["teacher"] == first["teacher"]
    other = measure(student, split, "hessian", student, previous=first)
    assert "cka" not in other
    assert other["attention"] is first["attention"]
    assert len(measure(student, split, "cka", previous=first)["cka"]["matrices"]) == 1


def test_a_result_tells_the_settings_that_its_numbers_depend_on():
    assert set(CKAAnalysis.deciding_settings()) == {"rows_per_batch", "teacher_image_size"}


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "hiera", "swiftformer", "mobilenet-v1"])
def test_a_repo_as_it_is_on_the_hub_is_compared_layer_by_layer(student, split, name, tmp_path):
    family = TRANSFORMERS[name]
    family.build().save_pretrained(tmp_path)
    student_processor(MEAN, STD, (family.size, family.size)).save_pretrained(tmp_path)
    found = measure(student, split, "cka", load_pretrained(str(tmp_path), needs_logits=None))["cka"]["matrices"][1]
    assert found["columns"]["layers"] == list(range(len(family.sides)))


def test_a_model_that_does_not_take_the_images_is_one_line(student, split):
    vit = subject(ViTMSNModel(ViTMSNConfig(**SHAPE | {"num_channels": 4})))
    with pytest.raises(ModelLoadError, match=r"model 'ViTMSNModel': expected one that takes images of \(3, 12, 12\)"):
        measure(student, split, "cka", vit)
