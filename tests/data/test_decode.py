import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ihb.data import StreamedSplit, collate_images
from hf_ihb.errors import DataError
from tests.image_sets import NAMES, picture


def jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("side", [None, 9])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_pixels_are_pillows_for_any_number_of_threads(encode, mode, side, num_workers):
    images = [picture(i, (6, 6) if side is None else (5 + i % 3, 8)) for i in range(50)]
    stored = [jpeg(image) if i % 2 else image for i, image in enumerate(images)]
    size = (side or 6,) * 2
    expected = []
    for image in stored:
        opened = (Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image).convert(mode)
        opened = opened.resize(size, Image.Resampling.BICUBIC) if side else opened
        expected.append(torch.from_numpy(np.array(opened).reshape(*size, -1)).permute(2, 0, 1))
    encoded = encode(stored, size, mode)
    assert encoded.shape == (50, len(expected[0]), *size)
    assert encoded.num_bytes == torch.stack(expected).numel()
    assert torch.equal(encoded.decode(range(50), num_workers), torch.stack(expected))
    assert torch.equal(encoded.decode_all(num_workers, show=False), torch.stack(expected))
    some = torch.tensor([49, 3, 3, 20])
    assert torch.equal(encoded.decode(some, num_workers), torch.stack(expected)[some])
    assert torch.equal(encoded.select(some).decode([2, 0], num_workers), torch.stack(expected)[[3, 49]])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_of_several_bad_rows_the_first_is_named(encode, num_workers):
    images = [picture(i) for i in range(90)]
    images[70], images[23], images[24] = b"broken", b"broken too", b""
    encoded = encode(images)
    with pytest.raises(DataError, match=r"^here, row 23: the image cannot be decoded"):
        encoded.decode_all(num_workers, show=False)
    with pytest.raises(DataError, match=r"^here, row 24: "):
        encoded.select(torch.arange(24, 90)).decode_all(num_workers, show=False)


def test_an_image_of_another_size_is_refused_with_its_row_unless_it_is_resized(encode):
    images = [picture(0), picture(1, (6, 7))]
    with pytest.raises(DataError, match=r"row 1: expected 6 x 6 px like row 0, found 6 x 7; give 'image_size'"):
        encode(images, resizes=False).decode([0, 1])
    assert encode(images).decode([0, 1]).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_is_one_line_out_of_a_worker_process_too(encode, num_workers):
    split = StreamedSplit(encode([picture(0), b"broken"] * 4), torch.zeros(8, dtype=torch.long), NAMES)
    loader = torch.utils.data.DataLoader(split, 4, num_workers=num_workers, collate_fn=collate_images)
    batches = iter(loader)
    with pytest.raises(DataError, match=r"^here, row 1: the image cannot be decoded \(no format that Pillow knows\)$"):
        next(batches)
    if num_workers:  # the traceback keeps the iterator; left to the garbage collector, its end takes five seconds
        batches._shutdown_workers()


def test_encoded_images_go_to_other_processes(encoded):
    again = pickle.loads(pickle.dumps(encoded))
    assert torch.equal(again.decode(range(40)), encoded.decode(range(40)))
    assert again.fingerprint() == encoded.fingerprint()


def test_a_fingerprint_tells_rows_sizes_modes_and_tables_apart(encode):
    images = [picture(i) for i in range(4)]
    base = encode(images)
    others = [
        encode(images, size=(6, 7)),
        encode(images, mode="L"),
        encode(images, mode="YCbCr"),
        encode(images, identity=("other",)),
        base.select(torch.tensor([0, 1, 2])),
        base.select(torch.tensor([1, 0, 2, 3])),
    ]
    assert len({x.fingerprint() for x in (base, *others)}) == 7
    assert base.select(torch.arange(4)).fingerprint() == encode(images).fingerprint() == base.fingerprint()
