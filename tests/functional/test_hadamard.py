import numpy as np
import pytest
import scipy.linalg
import torch

from hf_ihb.functional.hadamard import equalizing_rotation, hadamard, phi_s_matrix

KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 64, 76, 96, 192, 384, 768, 1024, 1280]


@pytest.mark.parametrize("width", KNOWN)
def test_entries_are_signs_and_rows_are_orthogonal(width):
    matrix = hadamard(width)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, width * torch.eye(width, dtype=torch.float64))


def test_powers_of_two_are_sylvesters():
    for width in (1, 2, 16, 64):
        assert np.array_equal(hadamard(width).numpy(), scipy.linalg.hadamard(width))


@pytest.mark.parametrize("width", [3, 5, 6, 10, 18, 22, 50, 92])
def test_there_is_none_where_no_construction_has_one(width):
    assert hadamard(width) is None  # of 92 there is one, and of the others none


def features(width, rank, generator):
    """Of a covariance with a fast decaying spectrum."""
    mixing = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    mixing = mixing * torch.logspace(1, -3, rank, dtype=torch.float64)
    return torch.randn(500, rank, generator=generator, dtype=torch.float64) @ mixing.T + 3


@pytest.mark.parametrize(("width", "rank"), [(8, 8), (24, 24), (24, 7), (6, 6), (18, 18), (25, 4), (7, 1)])
def test_every_channel_has_variance_one_and_the_spectrum_keeps_its_ratios(width, rank, generator):
    x = features(width, rank, generator)
    covariance = torch.cov(x.T)
    y = (x - x.mean(0)) @ phi_s_matrix(covariance).T
    found = torch.cov(y.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(width, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    before, after = (torch.linalg.eigvalsh(c) for c in (covariance, found))
    torch.testing.assert_close(after, before / before.mean(), rtol=1e-7, atol=1e-9)
    # one scale for all: distances keep their ratios, unlike where each channel has its own
    torch.testing.assert_close(
        torch.pdist(y), torch.pdist(x) / covariance.diagonal().mean().sqrt(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("width", [12, 14])
def test_a_rotation_is_orthogonal(width, generator):
    variances = torch.rand(width, generator=generator, dtype=torch.float64)
    rotation = equalizing_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    alike = rotation @ torch.diag(variances) @ rotation.T
    torch.testing.assert_close(alike.diagonal(), variances.mean().expand(width), rtol=0, atol=1e-12)


def test_channels_that_vary_alike_already_are_left_so():
    assert torch.equal(equalizing_rotation(torch.ones(6, dtype=torch.float64)), torch.eye(6, dtype=torch.float64))
