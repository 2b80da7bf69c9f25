import math

import numpy as np
import pytest
import torch

from hf_ihb.analysis import AnalysisArguments, analysis_table
from hf_ihb.analysis.rankme import EPSILON, RankMeAnalysis, StreamedMatrix, effective_rank
from hf_ihb.errors import NumericsError
from hf_ihb.models.features import extract_features
from tests.analysis.conftest import PIXELS, measure


def matrix(rows, width, values, generator):
    """A matrix with these singular values, between random orthogonal ones."""
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(width, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def streamed(rows, batch_size=7):
    found = StreamedMatrix()
    for some in rows.split(batch_size):
        found.update(some)
    return found


def rank_by_numpy(rows):
    values = np.linalg.svd(np.asarray(rows, dtype=np.float64), compute_uv=False)
    shares = values / np.abs(values).sum() + 1e-7
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize(("rows", "width"), [(40, 9), (9, 40)])
def test_equal_singular_values_have_the_rank_that_they_are(rank, rows, width, generator):
    """Whatever the matrix is multiplied by; what epsilon adds is a closed form too."""
    made = matrix(rows, width, [3.0] * rank, generator)
    others = min(rows, width) - rank
    share = 1 / rank + EPSILON
    expected = math.exp(-rank * share * math.log(share) - others * EPSILON * math.log(EPSILON))
    for factor in (1, 1e-6, 1e6):
        found = effective_rank(streamed(factor * made).singular_values())
        assert found == pytest.approx(expected, rel=1e-9)
        assert found == pytest.approx(rank, rel=2e-5)


def test_two_directions_have_the_rank_of_their_entropy(generator):
    made = matrix(30, 6, [3.0, 1.0], generator)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(streamed(made).singular_values(), 1e-15) == pytest.approx(math.exp(entropy), rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("width", [6, 80])
def test_singular_values_are_numpys_however_the_rows_come(batch_size, width, generator):
    """Those below the square root of float64's precision too, which a Gram matrix loses."""
    values = [10.0 ** -(2 * i) for i in range(6)]
    made = matrix(50, width, values, generator)
    found = streamed(made, batch_size)
    expected = np.linalg.svd(made.numpy(), compute_uv=False)
    assert found.num_rows == 50
    assert len(found.singular_values()) == len(expected) == min(50, width)
    np.testing.assert_allclose(found.singular_values().numpy(), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.singular_values().numpy()[:6], values, rtol=1e-5)
    assert effective_rank(found.singular_values()) == pytest.approx(rank_by_numpy(made), rel=1e-9)


def test_nothing_but_zeros_has_no_rank():
    assert math.isnan(effective_rank(streamed(torch.zeros(5, 3)).singular_values()))


@pytest.mark.parametrize("images", [24, 5])
@pytest.mark.parametrize("kind", ["student", "cnn"])
def test_the_rank_is_that_of_the_mean_patch_tokens_of_the_chosen_images(kind, images, split, request):
    subject = request.getfixturevalue(kind)
    rows = torch.arange(24).flip(0)[:images]
    layers = RankMeAnalysis().compute(subject, split, rows, AnalysisArguments(batch_size=4))["layers"]
    pixels = PIXELS.apply(split.images[rows].float() / 255)
    with torch.no_grad():
        features = [f.patch_tokens.mean(1) for f in extract_features(subject.model, pixels, None)[1]]
    assert [layer["layer"] for layer in layers] == list(range(len(features)))
    for layer, expected in zip(layers, features, strict=True):
        assert layer["rank"] == pytest.approx(rank_by_numpy(expected), rel=1e-4)
        assert layer["width"] == expected.shape[1]
        assert layer["largest_rank"] == min(expected.shape)
        assert layer["rank_relative"] == pytest.approx(layer["rank"] / layer["largest_rank"])
        assert 1 <= layer["rank"] <= layer["largest_rank"] + 1e-4


def test_what_is_shown_are_the_numbers_of_the_first_and_the_last_layer(student, split):
    result = measure(student, split, "rankme")
    for layer, rank in zip(result["rankme"]["layers"], (4.25, 2.5), strict=True):
        layer["rank"] = rank
    assert analysis_table({"a": result}).splitlines()[2].split("|")[2:4] == [" 2.5              ", " 8       "]
    text = RankMeAnalysis.card_text(result)
    assert "is 4.2 in layer 0 and 2.5 in layer 1, of at most 8, on 24 images of the `test` split of `noise`. " in text
    result["rankme"]["layers"][1]["rank"] = None  # not a number, in a file
    assert analysis_table({"a": result}).splitlines()[2].split("|")[2].strip() == ""


def test_features_that_are_not_finite_are_refused(student, split):
    with torch.no_grad():
        student.model.deit.embeddings.cls_token.fill_(float("nan"))
    with pytest.raises(NumericsError, match="layer 0: expected finite features"):
        measure(student, split, "rankme")
