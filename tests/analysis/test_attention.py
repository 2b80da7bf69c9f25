import copy

import pytest
import torch

from hf_ihb.analysis.attention import AttentionAnalysis
from hf_ihb.functional.attention import attention_distance
from tests.analysis.conftest import NAMES, PIXELS, measure


def test_attention_is_that_of_the_models_own_maps(student, split):
    found = measure(student, split, "attention")["attention"]
    student.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = student.model(PIXELS.apply(split.images.float() / 255), output_attentions=True).attentions
    expected = [attention_distance(m, (3, 3), 2).double().mean(0) for m in maps]
    assert [layer["distance_per_head"] for layer in found["layers"]] == [pytest.approx(e.tolist()) for e in expected]
    assert found["mean_distance"] == pytest.approx(torch.stack(expected).mean().item())
    assert found["num_prefix_tokens"] == 2
    assert found["grid"] == [3, 3]
    assert found["patch_size_px"] == [4, 4]


def test_the_untrained_twin_is_measured_beside_the_model(student, split):
    found = measure(student, split, "attention")["attention"]
    assert found["untrained"]["mean_distance"] != found["mean_distance"]
    assert found["untrained"]["mean_distance"] == pytest.approx(found["uniform_distance"], abs=0.02)
    again = copy.deepcopy(student)
    with torch.no_grad():
        again.model.deit.layernorm.weight.mul_(2)  # another model, the same architecture
    assert measure(again, split, "attention")["attention"]["untrained"] == found["untrained"]
    assert measure(student, split, "attention", untrained_reference=False)["attention"]["untrained"] is None


def test_maps_are_those_of_the_images_they_name(student, split):
    grouped = split.select(torch.arange(24).reshape(8, 3).T.flatten())  # by class: 8 of each
    maps = measure(student, grouped, "attention", num_maps=4)["attention"]["maps"]
    assert [m["index"] for m in maps] == [0, 8, 16, 1]
    assert [m["label"] for m in maps] == [*NAMES, NAMES[0]]
    for m in maps:
        assert torch.equal(torch.tensor(m["image"]).permute(2, 0, 1), grouped.images[m["index"]].long())
        assert [sum(map(sum, w)) for w in m["weights"]] == [pytest.approx(1, abs=1e-5)] * 2


def test_a_result_tells_the_settings_that_its_numbers_depend_on():
    assert set(AttentionAnalysis.deciding_settings()) == {"untrained_reference", "num_maps"}
