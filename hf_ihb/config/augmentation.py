"""Keys of what a training image goes through."""

from dataclasses import dataclass
from typing import Literal

from hf_ihb.config.fields import AT_LEAST_ONE, FRACTION, FRACTION_BELOW_ONE, NON_NEGATIVE, SEEDS, Checked, Range, key


@dataclass
class AugmentationArguments(Checked):
    """What a training image goes through, drawn per image and epoch."""

    _argument_group_name = "augmentation"

    augmentation_seed: int | None = key(
        None,
        "Seed of what images go through, apart from that of the weights and of the order of the images: runs that "
        "share it show the same views, and can share what a teacher says of them (teacher_cache 'views'). seed if not "
        "given.",
        within=SEEDS,
    )

    random_crop_padding: int = key(
        0, "Zero padding on each side before a random crop of the original size.", within=NON_NEGATIVE, unit="px"
    )
    horizontal_flip: float = key(0.0, "Probability of a horizontal flip.", within=FRACTION)
    rotation_degrees: float = key(
        0.0, "Random rotation, uniform between -x and x.", within=Range(0, 180), unit="degrees"
    )
    translate_fraction: float = key(
        0.0,
        "Random shift along each axis, uniform between -x and x as a share of the side, to whole pixels.",
        within=FRACTION,
    )
    scale_jitter: float = key(0.0, "Random scale, uniform between 1 - x and 1 + x.", within=FRACTION_BELOW_ONE)
    shear_degrees: float = key(
        0.0, "Random horizontal shear, uniform between -x and x.", within=Range(0, 90, high_open=True), unit="degrees"
    )
    brightness: float = key(0.0, "Brightness factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    contrast: float = key(0.0, "Contrast factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    saturation: float = key(0.0, "Saturation factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    hue: float = key(0.0, "Hue shift, uniform between -x and x.", within=Range(0, 0.5), unit="turns of the hue circle")
    auto_augment: Literal["none", "randaugment", "autoaugment_cifar10", "trivialaugment_wide"] = key(
        "none", "Policy of random operations."
    )
    randaugment_num_ops: int = key(2, "Operations RandAugment applies to an image.", within=AT_LEAST_ONE)
    randaugment_magnitude: int = key(9, "Strength of RandAugment, one of 31 bins.", within=Range(0, 30))
    interpolation: Literal["nearest", "bilinear"] = key(
        "bilinear", "How rotations, shears, shifts and scalings resample; the published runs used 'nearest'."
    )
    cutout_size: int = key(
        0, "Side of one square covered with the mean colour, clipped at the border.", within=NON_NEGATIVE, unit="px"
    )
    random_erasing: float = key(
        0.0,
        "Probability of covering one rectangle (2 to 33 per cent of the area, ratio 0.3 to 3.3) with the mean colour.",
        within=FRACTION,
    )
    mixup_alpha: float = key(0.0, "MixUp: Beta parameter of the mixing weight; 0 turns it off.", within=NON_NEGATIVE)
    cutmix_alpha: float = key(0.0, "CutMix: Beta parameter of the box's area; 0 turns it off.", within=NON_NEGATIVE)
    mix_probability: float = key(1.0, "Probability that an image is mixed, where mixing is on.", within=FRACTION)
    mix_switch_probability: float = key(
        0.5, "Share of mixed images that get CutMix where both kinds are on.", within=FRACTION
    )

    @property
    def mixes(self) -> bool:
        """Whether any image is mixed with another."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
