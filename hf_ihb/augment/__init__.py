"""What a training image goes through, drawn per image and epoch, and made in batches on the device."""

import functools
import hashlib
import inspect

from hf_ihb.augment import augmenter, color, ops, policies, recolor
from hf_ihb.augment.augmenter import Augmenter, Stream, class_targets
from hf_ihb.functional import geometry, random

__all__ = ["Augmenter", "Stream", "class_targets", "code_digest"]


@functools.cache
def code_digest() -> str:
    """SHA-256 of the code that makes views: a change of a rare operation would show in few of them."""
    modules = (augmenter, color, ops, policies, recolor, geometry, random)
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()
