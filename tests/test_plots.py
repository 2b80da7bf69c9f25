import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_ihb.plots import COLORS, curve_panels

PANELS = {
    "one": {"a": ([0, 1, 2], [3.0, 2.0, 1.0]), "b": ([0, 1, 2], [1.0, 1.0, 4.0])},
    "two": {"b": ([0, 5], [2.0, 0.5])},
    "three": {"c": ([0, 5], [2.0, 0.5]), "a": ([1, 2], [9.0, 8.0])},
}


@pytest.fixture
def figure(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    curve_panels(PANELS, tmp_path / "plot.png", x_label="steps", y_label="loss")
    return drawn[0]


def test_every_line_shows_its_numbers(figure):
    for axis, (title, lines) in zip(figure.axes, PANELS.items(), strict=False):
        assert axis.get_title() == title
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("steps", "loss")
        found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        assert found == lines


def test_a_name_has_one_colour_and_one_legend_entry_in_all_panels(figure):
    looks = {}
    for axis in figure.axes:
        for line in axis.lines:
            looks.setdefault(line.get_label(), set()).add((line.get_color(), line.get_linestyle()))
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == len(looks) == 3
    assert {color for look in looks.values() for color, _ in look} <= set(COLORS)
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["a", "b", "c"]


def test_a_panel_that_is_left_over_is_empty(figure):
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]


def test_the_picture_is_as_wide_as_a_readme(tmp_path):
    curve_panels(PANELS, tmp_path / "plot.png", x_label="steps", y_label="loss")
    with Image.open(tmp_path / "plot.png") as image:
        assert 900 <= image.width <= 1400
