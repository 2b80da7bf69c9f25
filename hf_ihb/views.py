"""A batch of stored images -> what student and teacher see of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hf_ihb.arguments import AugmentationArguments
from hf_ihb.functional import augment, color, policies
from hf_ihb.functional.constants import constant
from hf_ihb.functional.geometry import affine_matrix, compose_affines, warp
from hf_ihb.functional.random import counter_integers, counter_uniforms


class Stream(IntEnum):
    """Purposes of random numbers; each draws from its own sequence, so adding one leaves the others alone."""

    GEOMETRY = 0
    CUTOUT = 1
    MIX_PARTNER = 2
    MIX = 3
    AFFINE = 4
    COLOR_JITTER = 5
    POLICY = 6
    ERASING = 7


@dataclass
class Views:
    """A batch before and after augmentation.

    Attributes:
        images: ``(B, C, H, W)`` uint8, as they are stored.
        seen: ``(B, C, H, W)`` what the student sees of them: uint8, or float in [0, 1] where it is mixed or covered.
        affine: ``(B, 2, 3)`` from augmented to stored coordinates.
        own_share: ``(B,)`` share of the own image, 1 where it is not mixed.
        partner_labels: ``(B,)`` labels of the mixing partners; None without mixing.
    """

    images: Tensor
    seen: Tensor
    affine: Tensor
    own_share: Tensor
    partner_labels: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """``(B, C, H, W)`` float in [0, 1], `images`."""
        return as_float(self.images)

    @property
    def augmented(self) -> Tensor:
        """``(B, C, H, W)`` float in [0, 1], `seen`."""
        return as_float(self.seen)

    @property
    def unmixed(self) -> Tensor:
        """``(B,)`` float, 1 where the image shows itself alone."""
        return (self.own_share == 1).float()


def as_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]; float as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class Augmenter:
    """Augments image k of epoch e as a function of (seed, e, k) alone.

    Args:
        args: What to do.
        seed: Run seed.
        fill: Mean colour in [0, 1], one value a channel; what cutout leaves behind.
        fetch: Positions of training images -> (uint8 images ``(B, C, H, W)``, labels ``(B,)``); mixing partners come
            from the whole split, so a batch's composition does not matter. None where images cannot be had at random:
            the partner is the next image of the batch then.
        num_images: Size of the training split.
    """

    def __init__(
        self,
        args: AugmentationArguments,
        seed: int,
        fill: tuple[float, ...],
        fetch: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        num_images: int,
    ) -> None:
        self.args, self.seed, self.fill = args, seed, tuple(fill)
        self.fetch, self.num_images = fetch, num_images

    def __call__(self, images: Tensor, index: Tensor, epoch: int | Tensor, labels: Tensor | None = None) -> Views:
        """Augments a batch.

        Args:
            images: ``(B, C, H, W)`` uint8.
            index: ``(B,)`` position of each image in the training split.
            epoch: Epoch number, >= 0, as in `counter_words`.
            labels: ``(B,)``, where mixing partners come from the batch.

        Raises:
            ValueError: If the labels are needed and not given.
        """
        seen, affine = self._one(images, index, epoch)
        views = Views(images, seen, affine, torch.ones(len(images), device=images.device))
        if not self.args.mixes:
            return views
        if self.fetch is None:
            if labels is None:
                raise ValueError("mixing partners from the batch: expected its labels, found none")
            return self._mix(views, index, epoch, seen.roll(-1, 0), labels.roll(-1, 0))
        partner = counter_integers(self.seed, epoch, index, Stream.MIX_PARTNER, self.num_images)
        partner_images, partner_labels = self.fetch(partner)
        other, _ = self._one(partner_images, partner, epoch)
        return self._mix(views, index, epoch, other, partner_labels)

    def _one(self, images: Tensor, index: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor]:
        args, (height, width) = self.args, images.shape[-2:]
        draw = functools.partial(counter_uniforms, self.seed, epoch, index)
        affine = augment.identity_affine(len(images), images.device)
        if args.random_crop_padding or args.horizontal_flip:
            u = draw(Stream.GEOMETRY, 3)
            offsets = (u[:, :2] * (2 * args.random_crop_padding + 1)).long()
            flip = u[:, 2] < args.horizontal_flip
            images, affine = augment.crop_flip(images, offsets[:, 0], offsets[:, 1], flip, args.random_crop_padding)
        if args.rotation_degrees or args.translate_fraction or args.scale_jitter or args.shear_degrees:
            moved = self._affine(draw(Stream.AFFINE, 5), height, width)
            images, affine = warp(images, moved, args.interpolation), compose_affines(affine, moved)
        if any(amounts := (args.brightness, args.contrast, args.saturation, args.hue)):
            order, parameters = color.jitter_draws(draw(Stream.COLOR_JITTER, 8), amounts)
            images = color.color_jitter(images, order, parameters, amounts)
        if args.auto_augment != "none":
            drawn = self._policy(draw, height, width)
            images, moved = policies.apply_operations(images, *drawn, args.interpolation)
            affine = compose_affines(affine, moved)
        if args.cutout_size:
            u = draw(Stream.CUTOUT, 2)
            y, x = (u[:, 0] * height).long(), (u[:, 1] * width).long()
            images = augment.cutout(as_float(images), y, x, args.cutout_size, constant(self.fill, images.device))
        if args.random_erasing:
            u = draw(Stream.ERASING, 3 + 2 * augment.ERASING_TRIES)
            top, left, tall, wide = augment.erasing_rectangles(u[:, 1:], height, width)
            tall = torch.where(u[:, 0] < args.random_erasing, tall, 0)
            images = augment.erase(as_float(images), top, left, tall, wide, constant(self.fill, images.device))
        return images, affine

    def _affine(self, u: Tensor, height: int, width: int) -> Tensor:
        """Rotation, shift (to whole pixels, as torchvision's `RandomAffine`), scale and horizontal shear as one."""
        args, u = self.args, 2 * u - 1
        reach = constant((args.translate_fraction * width, args.translate_fraction * height), u.device)
        slope = torch.deg2rad(u[:, 4] * args.shear_degrees).tan()
        return affine_matrix(
            (height, width),
            degrees=u[:, 0] * args.rotation_degrees,
            translate=(u[:, 1:3] * reach).round(),
            scale=1 + u[:, 3] * args.scale_jitter,
            slope=torch.stack((slope, torch.zeros_like(slope)), dim=1),
        )

    def _policy(self, draw: Callable[[int, int], Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Operations ``(B, n)`` of each image, and their magnitudes."""
        args, size = self.args, (height, width)
        match args.auto_augment:
            case "randaugment":
                u = draw(Stream.POLICY, 2 * args.randaugment_num_ops).unflatten(1, (-1, 2))
                return policies.randaugment(u, args.randaugment_magnitude, size)
            case "trivialaugment_wide":
                return policies.trivialaugment_wide(draw(Stream.POLICY, 3), size)
            case "autoaugment_cifar10":
                return policies.autoaugment_cifar10(draw(Stream.POLICY, 5), size)
        raise ValueError(f"auto_augment {args.auto_augment!r} is none of the policies")

    def _mix(self, views: Views, index: Tensor, epoch: int | Tensor, other: Tensor, labels: Tensor) -> Views:
        """The views mixed with augmented images ``other`` and their labels."""
        args, (height, width) = self.args, views.seen.shape[-2:]
        u = counter_uniforms(self.seed, epoch, index, Stream.MIX, 5)
        both = args.mixup_alpha > 0 and args.cutmix_alpha > 0
        cuts = u[:, 1] < (args.mix_switch_probability if both else float(args.cutmix_alpha > 0))
        share = torch.ones_like(u[:, 0])
        weight = share[:, None, None, None].expand(-1, 1, height, width)
        if args.mixup_alpha > 0:
            share = augment.beta_from_uniform(u[:, 2], args.mixup_alpha)
            weight = share[:, None, None, None].expand(-1, 1, height, width)
        if args.cutmix_alpha > 0:
            y, x = (u[:, 3] * height).long(), (u[:, 4] * width).long()
            lam = augment.beta_from_uniform(u[:, 2], args.cutmix_alpha)
            box_weight, box_share = augment.cutmix_weight(lam, y, x, height, width)
            weight = torch.where(cuts[:, None, None, None], box_weight, weight)
            share = torch.where(cuts, box_share, share)
        mixed = u[:, 0] < args.mix_probability
        weight = torch.where(mixed[:, None, None, None], weight, 1.0)
        views.own_share = torch.where(mixed, share, 1.0)
        views.seen = augment.mix(as_float(views.seen), as_float(other), weight)
        views.partner_labels = labels
        return views


def class_targets(labels: Tensor, num_labels: int, smoothing: float, views: Views | None) -> Tensor:
    """Class probabilities of a batch: smoothed first, then mixed like the images.

    Args:
        labels: ``(B,)`` hard labels, or ``(B, K)`` probabilities, which are taken as they are.
        num_labels: Number of classes K.
        smoothing: Label smoothing in [0, 1).
        views: The batch's views; None for images made elsewhere.

    Returns:
        ``(B, K)`` float32, rows sum to 1.
    """
    if labels.ndim == 2:
        return labels.float()
    targets = augment.smoothed_one_hot(labels, num_labels, smoothing)
    if views is None or views.partner_labels is None:
        return targets
    partners = augment.smoothed_one_hot(views.partner_labels, num_labels, smoothing)
    return augment.mix(targets, partners, views.own_share[:, None])
