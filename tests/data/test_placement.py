import psutil
import pytest
import torch

from hf_ihb.data import ImageSplit, placement
from hf_ihb.data.placement import DEVICE_SHARE, _limit_of, available_memory, rows_onto
from tests.image_sets import NAMES

GIB = 1 << 30


@pytest.mark.parametrize(("free", "where"), [(4 / DEVICE_SHARE, "device"), (3.9 / DEVICE_SHARE, "host")])
def test_rows_are_placed_where_a_share_of_the_memory_holds_them(free, where):
    assert placement(4 * GIB, "cuda:1", free_bytes=int(free * GIB)) == where
    assert placement(4 * GIB, "cpu", free_bytes=int(free * GIB)) == "host"


@pytest.mark.parametrize("shape", [(40, 3, 5, 4), (40, 7), (40,)])
def test_rows_of_the_host_are_gathered(shape, generator):
    rows = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    index = torch.randint(40, (9,), generator=generator)
    assert torch.equal(rows_onto(torch.device("cpu"), rows, index), rows[index])


def test_memory_is_at_most_the_machines():
    assert 0 < available_memory() <= psutil.virtual_memory().total
    assert available_memory(whole=True) == available_memory(whole=True) <= psutil.virtual_memory().total


def test_a_control_group_limits_memory(tmp_path):
    assert _limit_of(tmp_path, False) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert _limit_of(tmp_path, False) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert _limit_of(tmp_path, False) == 300
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 150\n")
    assert _limit_of(tmp_path, False) == 450
    assert _limit_of(tmp_path, True) == 1000
    (tmp_path / "memory.current").write_text("5000\n")
    assert _limit_of(tmp_path, False) == 0


def test_a_split_moves_with_labels_and_index(generator):
    images = torch.randint(256, (8, 3, 4, 5), generator=generator, dtype=torch.uint8)
    split = ImageSplit(images, torch.arange(8) % 3, NAMES)
    assert split.to("cpu") is split
    moved = split.to("meta")  # a device without memory: shapes and places alone
    assert moved.to(torch.device("meta")) is moved
    batch = moved.__getitems__([3, 1])
    assert batch.pop("rows").tolist() == [3, 1]  # stay on the host
    assert batch.pop("split") == split.key  # the same images
    assert {name: (value.device.type, tuple(value.shape)) for name, value in batch.items()} == {
        "pixel_values": ("meta", (2, 3, 4, 5)), "labels": ("meta", (2,)), "index": ("meta", (2,)),
    }  # fmt: skip
    assert (moved.image_size, moved.num_channels, len(moved), moved.label_names) == ((4, 5), 3, 8, NAMES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_on_the_device_is_that_of_the_host_without_a_wait(generator):
    images = torch.randint(256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = ImageSplit(images, torch.arange(64) % 3, NAMES)
    moved, rows = split.to("cuda"), list(range(0, 64, 3))
    moved.__getitems__(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = moved.__getitems__(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = split.__getitems__(rows)
    assert batch.pop("rows").tolist() == expected.pop("rows").tolist() == rows
    assert all(value.device.type == "cuda" for value in batch.values())
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in batch.items())
    assert moved.statistics() == split.statistics()
    assert moved.fingerprint() == split.fingerprint()
