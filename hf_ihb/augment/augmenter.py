"""A batch of stored images -> what student and teacher see of it."""

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.augment import color, ops, policies
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.functional.constants import constant
from hf_ihb.functional.geometry import affine_matrix, compose_affines, identity_affine, warp
from hf_ihb.functional.random import counter_integers, integers, stream_uniforms, stream_words, uniforms
from hf_ihb.step import Views, as_float


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
    TEACHER_DROPPING = 8  # of a step, not of an image


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

    _POLICY_NUMBERS: ClassVar[dict[str, int]] = {"trivialaugment_wide": 3, "autoaugment_cifar10": 5}

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

    def __call__(
        self,
        images: Tensor,
        index: Tensor,
        epoch: int | Tensor,
        labels: Tensor | None = None,
        partners: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Views:
        """Augments a batch.

        Args:
            images: ``(B, C, H, W)`` uint8.
            index: ``(B,)`` position of each image in the training split.
            epoch: Epoch number, >= 0, as in `stream_words`.
            labels: ``(B,)``, where mixing partners come from the batch.
            partners: Those that `partners_of` names, where they are not fetched here: positions ``(B,)``, uint8 images
                ``(B, C, H, W)`` and labels ``(B,)``.

        Raises:
            ValueError: If the labels are needed and not given.
        """
        own = torch.ones(len(images), device=images.device)
        if not self.args.mixes:
            seen, affine = self._augmented(images, index, epoch)
            return Views(images, seen, affine, own)
        counts = {Stream.MIX: 5} | ({Stream.MIX_PARTNER: 1} if partners is None and self.fetch else {})
        words = stream_words(self.seed, epoch, index, counts)
        u = uniforms(words[Stream.MIX])
        if partners is None and self.fetch is None:
            if labels is None:
                raise ValueError("mixing partners from the batch: expected its labels, found none")
            seen, affine = self._augmented(images, index, epoch)
            return self._mix(Views(images, seen, affine, own), u, seen.roll(-1, 0), labels.roll(-1, 0))
        if partners is None:
            rows = integers(words[Stream.MIX_PARTNER][:, 0], self.num_images)
            partners = (rows, *self.fetch(rows))
        rows, partner_images, partner_labels = partners
        # own images and partners go through everything together: half the operations, each on twice as many images
        both, affine = self._augmented(torch.cat((images, partner_images)), torch.cat((index, rows)), epoch)
        seen, other = both.chunk(2)
        return self._mix(Views(images, seen, affine[: len(images)], own), u, other, partner_labels)

    def partners_of(self, index: Tensor, epoch: int) -> Tensor:
        """``(B,)`` positions of the mixing partners of some images in the training split, on their index's device."""
        return counter_integers(self.seed, epoch, index, Stream.MIX_PARTNER, self.num_images)

    def _numbers(self) -> dict[int, int]:
        """How many numbers an image draws from each stream that is used; always in one order."""
        args = self.args
        moves = args.rotation_degrees or args.translate_fraction or args.scale_jitter or args.shear_degrees
        recolors = args.brightness or args.contrast or args.saturation or args.hue
        policy = self._POLICY_NUMBERS.get(args.auto_augment, 2 * args.randaugment_num_ops)
        counts = {
            Stream.GEOMETRY: 3 if args.random_crop_padding or args.horizontal_flip else 0,
            Stream.AFFINE: 5 if moves else 0,
            Stream.COLOR_JITTER: 8 if recolors else 0,
            Stream.POLICY: 0 if args.auto_augment == "none" else policy,
            Stream.CUTOUT: 2 if args.cutout_size else 0,
            Stream.ERASING: 3 + 2 * ops.ERASING_TRIES if args.random_erasing else 0,
        }
        return {stream: count for stream, count in counts.items() if count}

    def _augmented(self, images: Tensor, index: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor]:
        args, (height, width) = self.args, images.shape[-2:]
        affine, counts = identity_affine(len(images), images.device), self._numbers()
        if not counts:
            return images, affine
        drawn = stream_uniforms(self.seed, epoch, index, counts)
        if (u := drawn.get(Stream.GEOMETRY)) is not None:
            corner = (u[:, :2] * (2 * args.random_crop_padding + 1)).long()
            images, affine = ops.crop_flip(images, corner, u[:, 2] < args.horizontal_flip, args.random_crop_padding)
        if (u := drawn.get(Stream.AFFINE)) is not None:
            moved = self._affine(u, height, width)
            images, affine = warp(images, moved, args.interpolation), compose_affines(affine, moved)
        if (u := drawn.get(Stream.COLOR_JITTER)) is not None:
            amounts = (args.brightness, args.contrast, args.saturation, args.hue)
            images = color.color_jitter(images, *color.jitter_draws(u, amounts), amounts)
        if (u := drawn.get(Stream.POLICY)) is not None:
            images, moved = policies.apply_operations(images, *self._policy(u, height, width), args.interpolation)
            affine = compose_affines(affine, moved)
        if (u := drawn.get(Stream.CUTOUT)) is not None:
            center = (u * constant((height, width), u.device)).long()
            images = ops.cutout(as_float(images), center, args.cutout_size, constant(self.fill, images.device))
        if (u := drawn.get(Stream.ERASING)) is not None:
            corner, sides = ops.erasing_rectangles(u[:, 1:], height, width)
            sides = sides * (u[:, :1] < args.random_erasing)
            images = ops.erase(as_float(images), corner, sides, constant(self.fill, images.device))
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

    def _policy(self, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Operations ``(B, n)`` of each image, and their magnitudes."""
        args, size = self.args, (height, width)
        match args.auto_augment:
            case "randaugment":
                return policies.randaugment(u.unflatten(1, (-1, 2)), args.randaugment_magnitude, size)
            case "trivialaugment_wide":
                return policies.trivialaugment_wide(u, size)
            case "autoaugment_cifar10":
                return policies.autoaugment_cifar10(u, size)
        raise ValueError(f"auto_augment {args.auto_augment!r} is none of the policies")

    def _mix(self, views: Views, u: Tensor, other: Tensor, labels: Tensor) -> Views:
        """The views mixed, as five uniform numbers say, with augmented images ``other`` and their labels."""
        args, (height, width) = self.args, views.seen.shape[-2:]
        both = args.mixup_alpha > 0 and args.cutmix_alpha > 0
        cuts = u[:, 1] < (args.mix_switch_probability if both else float(args.cutmix_alpha > 0))
        share = torch.ones_like(u[:, 0])
        weight = share[:, None, None, None].expand(-1, 1, height, width)
        if args.mixup_alpha > 0:
            share = ops.beta_from_uniform(u[:, 2], args.mixup_alpha)
            weight = share[:, None, None, None].expand(-1, 1, height, width)
        if args.cutmix_alpha > 0:
            center = (u[:, 3:] * constant((height, width), u.device)).long()
            lam = ops.beta_from_uniform(u[:, 2], args.cutmix_alpha)
            box_weight, box_share = ops.cutmix_weight(lam, center, height, width)
            weight = torch.where(cuts[:, None, None, None], box_weight, weight)
            share = torch.where(cuts, box_share, share)
        mixed, whole = u[:, 0] < args.mix_probability, constant(1.0, u.device)
        weight = torch.where(mixed[:, None, None, None], weight, whole)
        views.own_share = torch.where(mixed, share, whole)
        views.seen = ops.mix(as_float(views.seen), as_float(other), weight)
        views.partner_labels = labels
        return views


def class_targets(labels: Tensor, num_labels: int, smoothing: float, views: Views | None) -> Tensor:
    """Class probabilities of a batch: smoothed first, then mixed like the images.

    Args:
        labels: ``(B,)`` hard labels, or ``(B, K)`` probabilities, which are not smoothed.
        num_labels: Number of classes K.
        smoothing: Label smoothing in [0, 1).
        views: The batch's views; None for images made elsewhere.

    Returns:
        ``(B, K)`` float32, rows sum to 1.
    """

    def probabilities(labels: Tensor) -> Tensor:
        return labels.float() if labels.ndim == 2 else ops.smoothed_one_hot(labels, num_labels, smoothing)

    targets = probabilities(labels)
    if views is None or views.partner_labels is None:
        return targets
    return ops.mix(targets, probabilities(views.partner_labels), views.own_share[:, None])
