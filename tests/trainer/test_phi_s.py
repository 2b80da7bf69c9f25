"""PHI-S of what a teacher says: the law in float64, and where it is refused."""

import pytest
import torch

from hf_ihb.errors import NumericsError, RecipeError
from tests.trainer.test_several_teachers import STRUCTURE

PHI_S = {"teacher_standardization": "phi_s", "teacher_statistics_samples": 128, "teacher_view": "clean"}
PLAIN = PHI_S | {"teacher_standardization": "none"}


def prepared(trainer, split):
    """Standardised tokens of all training images, of each layer."""
    trainer.prepare_teacher()
    step = trainer.prepare(split.__getitems__(list(range(len(split)))), train=True)
    return [layer.tokens.double() for layer in (step.of_teachers or (step,))[-1].teacher.layers["standardized"]]


@pytest.mark.parametrize("cache", ["off", "tokens"])
def test_channels_vary_alike_and_the_spectrum_keeps_its_ratios(cache, make_several, make_vit, train_split):
    teacher = make_vit()
    trainer = make_several(teacher, augmentation=None, **STRUCTURE | PHI_S | {"teacher_cache": cache})
    maps = teacher.features(teacher.prepare(train_split.images), (1, 2))
    for tokens, feature_map in zip(prepared(trainer, train_split), maps, strict=True):
        plain = feature_map.patch_tokens.double()
        covariance, found = ((x - x.mean(0)).flatten(0, 1).T.cov(correction=0) for x in (plain, tokens))
        tolerance = 1e-5 if cache == "off" else 5e-3  # half precision of what is stored
        torch.testing.assert_close(found.diagonal(), torch.ones_like(found.diagonal()), rtol=0, atol=tolerance)
        before, after = torch.linalg.eigvalsh(covariance), torch.linalg.eigvalsh(found)
        torch.testing.assert_close(after, before / before.mean(), rtol=tolerance, atol=tolerance)
        assert tokens.mean(0).abs().max() < tolerance
        own_scale = (
            plain - plain.mean(0)
        ) / covariance.diagonal().sqrt()  # differs from what each channel's scale gives
        assert not torch.allclose(torch.linalg.eigvalsh(own_scale.flatten(0, 1).T.cov()), after, rtol=0.05)


def test_it_holds_for_the_teacher_whose_entry_asks_for_it(make_several, make_vit, train_split):
    teachers, entries = [make_vit(), make_vit()], [STRUCTURE | PLAIN, STRUCTURE | PHI_S]
    trainer = make_several(teachers, augmentation=None, teacher_models=entries)
    rotated = prepared(trainer, train_split)
    assert trainer.lessons[0].teacher_side.rotations is None
    alone = prepared(make_several(make_vit(), augmentation=None, **STRUCTURE | PHI_S), train_split)
    assert all(torch.equal(a, b) for a, b in zip(alone, rotated, strict=True))
    trainer.train()  # and whoever does not ask for it has a loss of its own
    logs = [entry for entry in trainer.state.log_history if "token_loss_1" in entry]
    assert logs[0]["token_loss_1"] != logs[0]["token_loss_2"]
    assert logs[0]["cka_loss_1"] == logs[0]["cka_loss_2"]  # of tokens as they are


def test_it_is_refused_where_it_would_do_nothing_or_cannot(make_several, make_teacher, make_vit):
    with pytest.raises(RecipeError, match="key 'teacher_standardization': expected 'none' where no method compares"):
        make_several(make_vit(), cka_weight=1.0, student_layers=[0], teacher_layers=[1], **PHI_S)
    blind = make_vit()
    with torch.no_grad():
        blind.model.embeddings.patch_embeddings.projection.weight.zero_()
    with pytest.raises(NumericsError, match="expected features of block 1 that differ between images"):
        make_several(blind, **STRUCTURE | PHI_S).prepare_teacher()
