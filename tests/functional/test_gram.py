import pytest
import torch

from hf_ihb.functional.gram import gram_width, pack_gram, unpack_gram
from hf_ihb.functional.similarity import gram_distance, linear_cka, published_cka, rbf_cka
from hf_ihb.functional.tokens import resampling_matrix

GRID = (4, 4)
N = 16


@pytest.fixture
def tokens(generator):
    """A mean that is large beside what varies, as deep layers have it."""
    return torch.randn(5, N, 24, generator=generator, dtype=torch.float64) + 10


def moved(count):
    """Affines of a flip, a shift, a rotation with a zoom, nothing, and a shift out of the image."""
    return torch.tensor(
        [
            [[-1.0, 0, 0], [0, 1, 0]],
            [[1.0, 0, 0.3], [0, 1, -0.2]],
            [[0.8, 0.3, 0.1], [-0.3, 0.7, -0.2]],
            [[1.0, 0, 0], [0, 1, 0]],
            [[1.0, 0, 1.1], [0, 1, 0]],
        ]
    )[:count]


def proportional(x, y):
    """The factor between two tensors that differ by one."""
    factor = (x * y).sum() / (y * y).sum()
    torch.testing.assert_close(x, factor * y, rtol=1e-9, atol=1e-12)
    return factor


def test_a_packed_row_holds_the_inner_products_of_the_tokens_up_to_a_factor(tokens):
    found = unpack_gram(pack_gram(tokens), N)
    for image, row in zip(tokens, zip(*found, strict=True), strict=True):
        mean = image.mean(0)
        centered = image - mean
        factor = proportional(row[0], centered @ centered.T)
        torch.testing.assert_close(row[1], factor * centered @ mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(row[2], factor * mean @ mean)
    raw = found.raw()
    for image, gram in zip(tokens, raw, strict=True):
        proportional(gram, image @ image.T)


def test_the_width_is_that_of_a_triangle_a_vector_and_a_number(tokens):
    assert pack_gram(tokens).shape[-1] == gram_width(N) == 136 + 16 + 1
    with pytest.raises(ValueError, match="15 tokens make 136 numbers, got 153"):
        unpack_gram(pack_gram(tokens), 15)


def test_resampled_inner_products_are_those_of_resampled_tokens(tokens):
    matrix = resampling_matrix(moved(5), GRID, (3, 5))[0].double()
    matrix = matrix / matrix.sum(-1, keepdim=True)  # rows sum to 1 to float32's rounding
    found = unpack_gram(pack_gram(tokens), N).resampled(matrix).raw()
    for image, gram in zip(matrix @ tokens, found, strict=True):
        proportional(gram, image @ image.T)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
def test_a_row_is_fit_for_half_precision_at_any_scale_of_the_tokens(tokens, scale):
    packed = pack_gram((tokens * scale).float())
    torch.testing.assert_close(packed.abs().amax(-1), torch.ones(5))
    torch.testing.assert_close(packed, pack_gram(tokens).float(), rtol=1e-4, atol=1e-6)


def test_tokens_that_are_zero_or_alike_have_no_centred_part():
    packed = pack_gram(torch.stack((torch.zeros(N, 8), torch.full((N, 8), 0.1))))
    assert packed[0].abs().max() == 0
    assert packed[1, : -N - 1].abs().max() == 0
    assert packed[1, -1] == 1


SIMILARITIES = {
    "biased": lambda x, y, m: linear_cka(x, y, "biased", mask=m),
    "debiased": lambda x, y, m: linear_cka(x, y, "debiased", mask=m),
    "rbf": lambda x, y, m: rbf_cka(x, y, "debiased", mask=m),
    "published": lambda x, y, m: published_cka(x, y, mask=m),
    "gram": lambda x, y, m: gram_distance(x, y, mask=m),
    "gram published": lambda x, y, m: gram_distance(x, y, mask=m, normalization="published"),
}


@pytest.mark.parametrize("masked", [False, True, "shares"])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_from_inner_products_equal_those_from_tokens(tokens, generator, name, masked):
    x = torch.randn(5, N, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, N, generator=generator) < 0.7 if masked else None
    mask = mask * torch.rand(5, N, generator=generator) if masked == "shares" else mask
    matrix = resampling_matrix(moved(5), GRID, GRID)[0].double()
    similarity = SIMILARITIES[name]
    expected = similarity(x, matrix @ tokens, mask)
    exact = similarity(x, unpack_gram(pack_gram(tokens), N).resampled(matrix), mask)
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=1e-9)
    stored = unpack_gram(pack_gram(tokens).half(), N).resampled(matrix.float())
    # half precision keeps eleven bits
    torch.testing.assert_close(similarity(x.float(), stored, mask), expected.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_students_gradient_is_the_same_from_inner_products(tokens, generator, name):
    x = torch.randn(5, N, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(SIMILARITIES[name](x, tokens, None).sum(), x)
    (found,) = torch.autograd.grad(SIMILARITIES[name](x, unpack_gram(pack_gram(tokens), N), None).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_teacher_whose_tokens_are_alike_leaves_cka_undefined(generator):
    x = torch.randn(1, N, 6, generator=generator)
    alike = unpack_gram(pack_gram(torch.full((1, N, 8), 3.0)).half(), N)
    assert linear_cka(x, alike, "debiased").isnan()
    assert linear_cka(x, alike, "biased") == 0
    assert rbf_cka(x, alike, "debiased").isnan()


def test_what_is_only_the_rounding_of_half_precision_counts_as_nothing(generator):
    """Inside the mask all tokens are alike; stored, they differ by what half precision cut off."""
    tokens = torch.randn(1, N, 8, generator=generator)
    tokens[:, :6] = tokens[:, :1]
    mask = torch.arange(N)[None] < 6
    stored = unpack_gram(pack_gram(tokens).half(), N)
    x = torch.randn(1, N, 6, generator=generator)
    assert linear_cka(x, tokens, "debiased", mask=mask).isnan()
    assert linear_cka(x, stored, "debiased", mask=mask).isnan()


def test_features_and_inner_products_must_be_paired(tokens):
    with pytest.raises(ValueError, match="features must be paired"):
        linear_cka(torch.randn(5, N + 1, 3), unpack_gram(pack_gram(tokens), N))
