"""PHI-S of a teacher's layers: one scale for all channels, after a rotation that lets them vary alike."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_ihb.errors import NumericsError
from hf_ihb.functional.hadamard import phi_s_matrix


@torch.no_grad()
def measure_phi_s(side: Any, images: Dataset) -> list[Tensor]:
    """For each layer of a teacher's side the transposed W of `phi_s_matrix`, ``(D, D)`` float32, on the host.

    The covariance is that of patch tokens around the mean of their position, as everything here is that is
    standardised; the published one is around the mean of all positions.

    Args:
        side: A `TeacherSide` that has layers.
        images: Training images that statistics are taken from.

    Raises:
        NumericsError: If a layer says the same of all images.
    """
    trainer, count = side.trainer, 0
    sums: list[list[Any]] = [[0, 0] for _ in side.layers.teacher_layers]
    loader = DataLoader(images, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    for inputs in tqdm(loader, desc="Teacher covariance", disable=trainer.is_quiet):
        pixels = side._pixels(trainer._prepare_inputs(inputs), None, False, False)
        # float64 on the CPU: not every accelerator has it, and this is done once
        tokens = [m.patch_tokens.cpu().double() for m in side.forward(pixels, layers=True)[1]]
        products = [t.flatten(0, 1).T @ t.flatten(0, 1) for t in tokens]
        sums = [[a + t.sum(0), b + p] for (a, b), t, p in zip(sums, tokens, products, strict=True)]
        count += len(pixels)
    matrices = []
    for layer, (first, second) in zip(side.layers.teacher_layers, sums, strict=True):
        mean = first / count
        covariance = (second / count - mean.T @ mean) / len(mean)
        if not covariance.isfinite().all() or covariance.trace() <= 1e-12 * second.trace() / count / len(mean):
            raise NumericsError(
                f"teacher '{trainer.teacher.name}', key 'teacher_standardization': expected features of block {layer} "
                "that differ between images, found the same for all, or numbers that are not finite"
            )
        matrices.append(phi_s_matrix(covariance).T.float())
    return matrices
