import io
import pickle
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from hf_ihb.data import StreamedSplit, collate_images
from hf_ihb.data.decode import size_of_first
from hf_ihb.errors import DataError
from tests.image_sets import NAMES, as_bytes, load, picture, pixels, png, rows, write


def jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("side", [None, 9])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_pixels_are_pillows_for_any_number_of_threads(encode, mode, side, num_workers):
    images = [picture(i, (6, 6) if side is None else (5 + i % 3, 8), mode) for i in range(50)]
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


# ---- What is in a file, as `datasets` and `pipeline` see it ----


def stored(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def as_pipeline_sees_it(data, mode=None):
    """``(C, H, W)`` of `datasets` and of `pipeline`, which makes every image RGB."""
    image = load_image(datasets.Image(mode=mode).decode_example({"bytes": data, "path": None}))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def png_of_16_bits(levels):
    """PNG of ``(H, W, C)`` levels, written here: Pillow writes no colours of 16 bits."""
    height, width, channels = levels.shape

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_of_16_bits(levels):
    """TIFF of ``(H, W, 3)`` levels, one strip."""
    height, width, _ = levels.shape
    strip, bits = levels.astype("<u2").tobytes(), 8 + 2 + 9 * 12 + 4
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, bits + 6), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(strip))]
    directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8) + directory + struct.pack("<HHH", 16, 16, 16) + strip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(encode, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(picture(orientation, (5, 8)), kind, exif=exif)
    expected = as_pipeline_sees_it(data)
    size = (8, 5) if orientation > 4 else (5, 8)
    assert expected.shape == (3, *size)
    encoded = encode([data], size, resizes=False)
    assert torch.equal(encoded.decode([0])[0], expected)
    assert size_of_first(encoded.table, "image", "here", True) == size


def test_the_size_of_a_set_is_that_of_its_first_image_as_it_is_seen(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    train = [(stored(picture(i, (5, 8)), "JPEG", exif=exif), i % 3) for i in range(30)]
    data = load(write(folder, train=train, test=rows(6, start=900)), selection_split="test")
    assert data.image_size == (8, 5)
    assert torch.equal(data.train.images, torch.stack([as_pipeline_sees_it(image) for image, _ in train]))


def see_through(image, how):
    """An image of a palette with transparent colours."""
    palette = image.quantize(8)
    return stored(palette, "PNG", transparency=3 if how == "one" else bytes(range(0, 256, 32)))


def film(kind):
    frames = [picture(i) for i in (1, 2, 3)]
    return stored(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("data", [
    pytest.param(see_through(picture(1), "one"), id="palette, one transparent"),
    pytest.param(see_through(picture(1), "all"), id="palette, all transparent"),
    *(pytest.param(stored(picture(1).convert(mode), "PNG"), id=mode) for mode in ("LA", "RGBA", "P", "1", "L")),
    *(pytest.param(stored(picture(1).convert(mode), "TIFF"), id=f"TIFF {mode}") for mode in ("CMYK", "YCbCr", "1")),
    pytest.param(stored(picture(1).convert("CMYK"), "JPEG"), id="JPEG CMYK"),
    pytest.param(stored(picture(1), "PNG", transparency=picture(1).getpixel((0, 0))), id="RGB, one transparent"),
    *(pytest.param(film(kind), id=f"film {kind}") for kind in ("GIF", "PNG", "WEBP", "TIFF")),
    *(pytest.param(png_of_16_bits(np.random.default_rng(0).integers(0, 1 << 16, (6, 6, n))), id=f"PNG 16 bits x {n}")
      for n in (2, 3, 4)),
    pytest.param(tiff_of_16_bits(np.random.default_rng(0).integers(0, 1 << 16, (6, 6, 3))), id="TIFF 16 bits x 3"),
])  # fmt: skip
def test_every_kind_of_image_is_what_pipeline_makes_of_it(encode, data):
    assert torch.equal(encode([data], resizes=False).decode([0])[0], as_pipeline_sees_it(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_levels_of_16_bits_are_those_of_a_colour_image_of_16_bits(encode, kind, mode):
    levels = np.random.default_rng(0).integers(0, 1 << 16, (6, 6), dtype=np.uint16)
    levels[0, :4] = 0, 300, 32768, 65535
    big = kind.endswith("big-endian")
    data = stored(Image.fromarray(levels.astype(">u2" if big else np.uint16)), kind.split()[0])
    colour = png_of_16_bits(np.repeat(levels[:, :, None], 3, 2))
    found, expected = encode([data, colour], mode=mode).decode([0, 1])
    assert torch.equal(found, expected)
    assert torch.equal(expected[0], torch.from_numpy((levels >> 8).astype(np.uint8)))


@pytest.mark.parametrize(("dtype", "found"), [(np.float32, "floating-point"), (np.int32, "32-bit integer")])
def test_levels_without_a_white_are_refused_with_their_row(encode, dtype, found):
    data = stored(Image.fromarray(np.arange(36, dtype=dtype).reshape(6, 6)), "TIFF")
    with pytest.raises(DataError, match=rf"^here, row 1: expected levels of 8 or 16 bits, found {found} ones"):
        encode([picture(0), data]).decode([0, 1])


@pytest.mark.parametrize("mode", ["L", "1", "RGBA"])
def test_the_mode_that_a_data_set_names_is_taken_first(folder, mode):
    train, test = rows(30), rows(6, start=900)
    name = write(folder, train=train, test=test, features={"image": datasets.Image(mode=mode)})
    expected = torch.stack([as_pipeline_sees_it(png(image), mode) for image, _ in test])
    assert torch.equal(load(name).test.images, expected)


# ---- In a data set ----


@pytest.mark.parametrize("broken", [b"no image", b"", "truncated"])
def test_an_image_that_cannot_be_decoded_is_refused_with_its_row(folder, broken):
    data = png(picture(1, (64, 64)))[:2000] if broken == "truncated" else broken
    test = [*rows(4, start=900), (data, 0), *rows(2, start=950)]
    with pytest.raises(DataError, match=r"split 'test', row 4: the image cannot be decoded") as error:
        load(write(folder, train=rows(30), test=test))
    assert "\n" not in str(error.value)


def test_a_missing_image_is_refused_with_its_row(folder):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [as_bytes(image) for image, _ in rows(12)]
    for name, column in (("train", images[:6]), ("test", [*images[6:11], None])):
        split = datasets.Dataset.from_dict({"image": column, "label": [0, 1, 2] * 2}, features=features)
        split.to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match=r"split 'test', row 5: expected an image, found none"):
        load(str(folder), validation_fraction=0.5)


@pytest.mark.parametrize(
    ("side", "reason"), [(8200, "expected at most 67108864 px, found 8200 x 8200"), (9600, "bomb")]
)
def test_a_decompression_bomb_is_refused_with_its_row(folder, side, reason):
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    with pytest.raises(DataError, match=rf"split 'train', row 1: .*{reason}"):
        load(write(folder, train=[*rows(1), (stream.getvalue(), 0), *rows(30)], test=rows(3, start=900)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_every_colour_mode_becomes_rgb(folder, mode):
    test = [(picture(900 + i, mode=mode), i % 3) for i in range(6)]
    data = load(write(folder, train=rows(30), test=test))
    assert torch.equal(data.test.images, pixels([Image.open(io.BytesIO(png(image))) for image, _ in test]))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1"])
def test_grey_images_of_any_mode_have_one_channel(folder, mode):
    train = [(image.convert("L"), label) for image, label in rows(30)]
    test = [(picture(900 + i, mode="L").convert(mode), i % 3) for i in range(6)]
    name = write(folder, train=train, test=test)
    opened = [Image.open(io.BytesIO(png(image))) for image, _ in test]
    for side in (None, 9):
        data = load(name, color_mode="grayscale", image_size=side)
        grey = [image.convert("L") for image in opened]
        if side:
            grey = [image.resize((9, 9), Image.Resampling.BICUBIC) for image in grey]
        assert torch.equal(data.test.images, torch.stack([torch.from_numpy(np.array(g))[None] for g in grey]))
        assert data.train.images.shape[1] == 1
        assert [len(values) for values in data.train.statistics()] == [1, 1]


@pytest.mark.parametrize("decode", ["once", "stream"])
def test_colours_are_no_grey_images(folder, decode):
    """`pipeline` shows a model the three channels of a file; no image processor makes grey of them."""
    grey = [(image.convert("L"), label) for image, label in rows(33)]
    name = write(folder, train=grey[:30], test=[*grey[30:], (picture(900), 0)])
    with pytest.raises(DataError, match=r"split 'test', row 3: key 'color_mode': expected a grey image .* give 'rgb'"):
        load(name, color_mode="grayscale", decode=decode).test.__getitems__([3])


def test_images_of_other_sizes_are_refused_until_a_size_is_given(folder):
    train = [*rows(29), (picture(50, (8, 7)), 2)]
    name = write(folder, train=train, test=rows(3, start=900, size=(9, 9)))
    with pytest.raises(DataError, match=r"row 29: expected 6 x 6 px like row 0, found 8 x 7; give 'image_size'"):
        load(name)
    data = load(name, image_size=10)
    assert data.image_size == (10, 10)
    assert data.test.images.shape == (3, 3, 10, 10)
    expected = [image.resize((10, 10), Image.Resampling.BICUBIC) for image, _ in rows(3, start=900, size=(9, 9))]
    assert torch.equal(data.test.images, pixels(expected))
