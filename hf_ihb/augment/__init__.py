"""What a training image goes through, drawn per image and epoch, and made in batches on the device."""

from hf_ihb.augment.augmenter import Augmenter, Stream, class_targets

__all__ = ["Augmenter", "Stream", "class_targets"]
