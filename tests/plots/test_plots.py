import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hf_ihb.plots import (
    COLORS,
    attention_distance_plot,
    attention_map_plot,
    attention_statistics_plot,
    cka_heatmaps,
    confusion_matrix_plot,
    curve_panels,
    eigenvalue_density_plot,
    layer_lines_plot,
)
from hf_ihb.plots.style import short_names


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Calls a plot and gives the figure that it would save."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))

    def drawn(plot, *args, **kwargs):
        plot(*args, path=tmp_path / "plot.png", **kwargs)
        return saved.pop()

    return drawn


# ---- Curves ----

PANELS = {
    "one": {"a": ([0, 1, 2], [3.0, 2.0, 1.0]), "b": ([0, 1, 2], [1.0, 1.0, 4.0])},
    "two": {"b": ([0, 5], [2.0, 0.5])},
    "three": {"c": ([0, 5], [2.0, 0.5]), "a": ([1, 2], [9.0, 8.0])},
}


@pytest.fixture
def figure(draw):
    return draw(curve_panels, PANELS, x_label="steps", y_label="loss")


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


# ---- Analyses as they are written ----

UNIFORM = {(8, 8): 4.136482711405379, (4, 4): 2.0080149693800875}


def attention_layers(rng, grid, layers, heads, has_cls):
    for layer in range(layers):
        distance, entropy, mass, spread = rng.uniform(0.1, [[2.0], [2.5], [0.3], [9.0]], (4, heads)).tolist()
        yield {
            "layer": layer,
            "distance": np.mean(distance),
            "distance_relative": np.mean(distance) / UNIFORM[grid],
            "distance_per_head": distance,
            "entropy": np.mean(entropy),
            "special_token_mass": np.mean(mass),
            "cls_dispersion": np.mean(spread) if has_cls else None,
        }


def attention_of(seed, grid=(8, 8), layers=5, untrained=0, has_cls=True, patch_px=4):
    rng = np.random.default_rng(seed)
    side, other = grid
    maps = [
        {
            "index": 17 + i,
            "label": f"label ${i}$",
            "image": rng.integers(0, 256, (6, 6, 3)).tolist(),
            "prefix_token": "cls" if has_cls else None,
            "layers": [0, 2, 4],
            "weights": rng.dirichlet(np.ones(side * other), 3).reshape(3, side, other).tolist(),
        }
        for i in range(2)
    ]
    start = None
    if untrained is not None:
        section = attention_layers(np.random.default_rng(1000 + untrained), grid, layers, 3, has_cls)
        start = {"seed": untrained, "layers": list(section)}
    return {
        "grid": list(grid),
        "patch_size_px": [patch_px, patch_px],
        "num_prefix_tokens": 2 if has_cls else 0,
        "uniform_distance": UNIFORM[grid],
        "layers": list(attention_layers(rng, grid, layers, 3, has_cls)),
        "untrained": start,
        "maps": maps,
    }


def cka_of(seed, name, rows=5, columns=3, teacher="teacher"):
    values = np.random.default_rng(seed).uniform(0, 1, (2, rows, rows + columns))
    sides = [{"name": name, "layers": list(range(rows))}, {"name": teacher, "layers": list(range(1, 2 * columns, 2))}]
    matrices = [
        {"rows": sides[0], "columns": side, "linear": values[0][:, cut].tolist(), "rbf": values[1][:, cut].tolist()}
        for side, cut in zip(sides, (slice(rows), slice(rows, None)), strict=True)
    ]
    return {"matrices": matrices[: 1 if teacher is None else 2]}


def hessian_of(seed, extent=1.0, loss="cross_entropy", converged=True):
    eigenvalues = np.linspace(-0.2 * extent, 1.1 * extent, 60)
    density = np.exp(-np.abs(eigenvalues) * (10 + seed) / extent)
    density[-1] = 0
    return {
        "loss": loss,
        "num_parameters": 1000,
        "trace": 12.345 + seed,
        "trace_standard_error": 0.678,
        "converged": converged,
        "largest_eigenvalue": extent,
        "smallest_eigenvalue": -0.1 * extent,
        "density": {"eigenvalues": eigenvalues.tolist(), "density": density.tolist(), "sigma": 0.01 * extent},
    }


def analyses_of(count, **kwargs):
    return {
        f"student {i}": {
            "model": {"name": f"student {i}"},
            "attention": attention_of(i, **kwargs),
            "cka": cka_of(i, f"student {i}"),
            "hessian": hessian_of(i),
        }
        for i in range(count)
    }


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn_series_of(line):
    return list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))


def drawn_series(axis):
    return [drawn_series_of(line) for line in axis.lines]


def series_of(section, key):
    layers = section["layers"]
    return [float(layer["layer"]) for layer in layers], [float(layer[key]) for layer in layers]


OF_ANALYSES = {
    attention_distance_plot: "attention",
    attention_statistics_plot: "attention",
    cka_heatmaps: "cka",
    eigenvalue_density_plot: "hessian",
}


def confusion_of_three(analyses, path):
    confusion_matrix_plot([[9, 1, 0], [0, 0, 0], [1, 2, 1]], list(analyses), path)


def map_of_the_first(analyses, path):
    attention_map_plot(next(iter(analyses.values())), path)


@pytest.mark.parametrize("plot", [*OF_ANALYSES, confusion_of_three, map_of_the_first])
def test_a_picture_is_a_readme_wide_and_the_same_every_time(tmp_path, plot):
    for name in ("one.png", "two.png"):
        plot(analyses_of(3), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width == 1196
        assert np.asarray(image).std() > 10


@pytest.mark.parametrize(("plot", "section"), OF_ANALYSES.items())
@pytest.mark.parametrize("drop", [True, False])
def test_an_analysis_without_the_section_is_refused_by_name(tmp_path, plot, section, drop):
    analyses = analyses_of(2)
    analyses["student 1"][section] = None
    if drop:
        del analyses["student 1"][section]
    with pytest.raises(ValueError, match=rf"^analysis of 'student 1' has no section '{section}', found \[.*'model'\]$"):
        plot(analyses, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="no analysis was given"):
        plot({}, tmp_path / "plot.png")


@pytest.mark.parametrize("plot", [attention_distance_plot, attention_statistics_plot, eigenvalue_density_plot])
def test_no_two_of_nine_students_look_the_same(draw, plot):
    axis = draw(plot, analyses_of(9)).axes[0]
    students = [line for line in axis.lines if line.get_color() in COLORS and len(line.get_xdata()) > 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in students}) == len(students) == 9


# ---- Names ----


def test_names_are_shortened_in_the_middle_and_stay_different():
    long = [f"outputs/{'x' * 50}-seed{i}" for i in range(3)] + [f"outputs/{i}{'y' * 60}" for i in range(3)]
    hidden = [f"outputs/{'z' * 30}{i}{'z' * 30}" for i in range(3)]
    assert list(short_names(["short", *long], 20).values()) == [
        "short",
        *(f"outputs/xx…xxx-seed{i}" for i in range(3)),
        *(f"outputs/{i}y…yyyyyyyyy" for i in range(3)),
    ]
    texts = short_names(hidden, 20)
    assert len(set(texts.values())) == 3
    assert all("…" in text for text in short_names(hidden[:1], 20).values())
    assert short_names(["a\n b\t c"]) == {"a\n b\t c": "a b c"}
    assert short_names([]) == {}


def test_names_are_drawn_as_they_are(draw):
    """Dollar signs are no mathematics, and an underscore in front does not hide a name from the legend."""
    names = ["$x_1$ and $\\frac{$", "_hidden", "50 % of #1 & {b}"]
    analyses = dict(zip(names, analyses_of(3).values(), strict=True))
    figure = draw(attention_distance_plot, analyses)
    texts = legend_of(figure)
    assert texts[:3] == [r"\$x_1\$ and \$\frac{\$", "\u200b_hidden", names[2]]
    assert not any(is_math_text(text) for text in texts)


# ---- Attention distance ----


def test_distance_lines_show_the_json_and_the_reference_its_uniform_value(draw):
    analyses = analyses_of(2)
    figure = draw(attention_distance_plot, analyses)
    (axis,) = figure.axes
    drawn = drawn_series(axis)
    for analysis in analyses.values():
        assert series_of(analysis["attention"], "distance") in drawn
    untrained = [s for s in drawn if s == series_of(analyses["student 0"]["attention"]["untrained"], "distance")]
    assert len(untrained) == 1  # both students start from it
    levels = [set(line.get_ydata()) for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [{UNIFORM[8, 8]}]
    assert legend_of(figure) == ["student 0", "student 1", "untrained", "uniform attention (4.14 patches)"]
    assert axis.get_ylabel() == "patches"
    low, top = axis.get_ylim()
    heads = [h for a in analyses.values() for layer in a["attention"]["layers"] for h in layer["distance_per_head"]]
    assert low < min(heads)
    assert top > max(*heads, UNIFORM[8, 8])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_bands_reach_from_the_lowest_to_the_highest_head(draw, count):
    """In one panel for two students, in a panel each for more."""
    analyses = analyses_of(count)
    figure = draw(attention_distance_plot, analyses)
    panels = figure.axes[:1] * count if count <= 2 else figure.axes[1:]
    bands = [band for axis in figure.axes for band in axis.collections]
    assert len(panels) == len(bands) == count
    for (name, analysis), panel, band in zip(analyses.items(), panels, bands, strict=True):
        assert band in panel.collections
        vertices = band.get_paths()[0].vertices
        for layer in analysis["attention"]["layers"]:
            at = vertices[vertices[:, 0] == layer["layer"], 1]
            heads = layer["distance_per_head"]
            assert (at.min(), at.max()) == (min(heads), max(heads))
        line = next(li for li in panel.lines if drawn_series_of(li) == series_of(analysis["attention"], "distance"))
        assert to_rgba(line.get_color())[:3] == tuple(band.get_facecolor()[0][:3])
        if count > 2:
            assert panel.get_title() == name
            assert series_of(analysis["attention"]["untrained"], "distance") in drawn_series(panel)
    assert len({axis.get_ylim() for axis in figure.axes}) == 1


def test_students_of_different_grids_are_drawn_relative_to_uniform(draw):
    analyses = {**analyses_of(2), "other": {"attention": attention_of(5, grid=(4, 4), untrained=3)}}
    figure = draw(attention_distance_plot, analyses)
    main, *panels = figure.axes
    for name, panel in zip(analyses, panels, strict=True):
        expected = series_of(analyses[name]["attention"], "distance_relative")
        assert expected in drawn_series(main)
        assert expected in drawn_series(panel)
        vertices = panel.collections[0].get_paths()[0].vertices
        first = analyses[name]["attention"]["layers"][0]
        at = vertices[vertices[:, 0] == 0, 1] * analyses[name]["attention"]["uniform_distance"]
        assert at.max() == pytest.approx(max(first["distance_per_head"]), rel=1e-12)
    assert [line.get_ydata()[0] for line in main.lines if list(line.get_xdata()) == [0, 1]] == [1.0]
    assert main.get_ylabel() == "relative to uniform attention"
    assert main.child_axes == []
    assert legend_of(figure)[3:] == ["untrained: 2 students", "untrained: other", "uniform attention"]


@pytest.mark.parametrize(("patch_px", "factor"), [((4, 4), 4), ((14, 14), 14), ((4, 2), None)])
def test_pixels_stand_beside_patches_where_one_factor_does(draw, patch_px, factor):
    analyses = {**analyses_of(1, patch_px=patch_px[0]), "b": {"attention": attention_of(1, patch_px=patch_px[1])}}
    figure = draw(attention_distance_plot, analyses)
    FigureCanvasAgg(figure).draw()
    (axis,) = figure.axes
    assert [child.get_ylabel() for child in axis.child_axes] == ([] if factor is None else ["pixels"])
    for child in axis.child_axes:
        assert child.get_ylim() == pytest.approx([factor * y for y in axis.get_ylim()])


def test_each_untrained_network_is_drawn_once_and_none_where_there_is_none(draw):
    analyses = {f"{i}": {"attention": attention_of(i, untrained=start)} for i, start in enumerate((0, 1, 0, None))}
    figure = draw(attention_distance_plot, analyses)
    assert legend_of(figure)[4:-1] == ["untrained: 2 students", "untrained: 1"]
    starts = [series_of(analyses[name]["attention"]["untrained"], "distance") for name in "01"]
    for axis, expected in zip(figure.axes, ([1, 1], [1, 0], [0, 1], [1, 0], [0, 0]), strict=True):
        assert [drawn_series(axis).count(start) for start in starts] == expected


# ---- A number of each layer ----


def lines_of(analyses, path):
    lines = {name: series_of(analysis["attention"], "entropy") for name, analysis in analyses.items()}
    layer_lines_plot(lines, path, title="Entropy", y_label="nats")


def test_a_line_shows_the_number_of_each_layer_and_a_gap_where_there_is_none(draw):
    analyses = analyses_of(2)
    figure = draw(lines_of, analyses)
    (axis,) = figure.axes
    assert drawn_series(axis) == [series_of(analysis["attention"], "entropy") for analysis in analyses.values()]
    assert (axis.get_title(), axis.get_ylabel()) == ("Entropy", "nats")
    assert legend_of(figure) == list(analyses)
    figure = draw(layer_lines_plot, {"a": ([0, 1, 2], [1.0, None, 3.0])}, title="t", y_label="u")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [1, np.nan, 3])
    with pytest.raises(ValueError, match="no analysis was given"):
        draw(layer_lines_plot, {}, title="t", y_label="u")


@pytest.mark.parametrize("count", [1, 5])
def test_layer_lines_are_a_readme_wide_and_the_same_every_time(tmp_path, count):
    for name in ("one.png", "two.png"):
        lines_of(analyses_of(count), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width == 1196


# ---- Attention statistics ----


def test_statistics_show_the_json_and_uniform_attention(draw):
    analyses = analyses_of(2)
    figure = draw(attention_statistics_plot, analyses)
    uniform = {
        "distance_relative": 1,
        "entropy": math.log(64),
        "special_token_mass": 2 / 66,
        "cls_dispersion": 10.5,
    }
    units = ["relative to uniform", "nats", "share", "patches²"]
    for axis, unit, (key, level) in zip(figure.axes, units, uniform.items(), strict=True):
        *lines, reference = drawn_series(axis)
        assert lines == [series_of(analysis["attention"], key) for analysis in analyses.values()]
        assert reference[1] == pytest.approx([level, level])
        assert axis.get_ylabel() == unit
    assert legend_of(figure) == [*analyses, "uniform attention"]


@pytest.mark.parametrize("plot", [attention_distance_plot, attention_statistics_plot])
def test_differences_of_a_hundredth_are_drawn_small(draw, plot):
    """Heads of equal distances: the axis keeps a tenth of its height around them."""
    analyses = analyses_of(1)
    for section in (analyses["student 0"]["attention"], analyses["student 0"]["attention"]["untrained"]):
        for i, layer in enumerate(section["layers"]):
            layer["distance"] = UNIFORM[8, 8] * (1 + 0.001 * (i % 2))
            layer["distance_relative"] = layer["distance"] / UNIFORM[8, 8]
            layer["distance_per_head"] = [layer["distance"]] * 2
    low, top = draw(plot, analyses).axes[0].get_ylim()
    assert top - low == pytest.approx(0.104 * top, rel=0.05)


def test_a_student_without_a_cls_token_has_no_spread(draw):
    analyses = {**analyses_of(1), "without": {"attention": attention_of(1, has_cls=False)}}
    figure = draw(attention_statistics_plot, analyses)
    assert [len(axis.lines) for axis in figure.axes] == [3, 3, 2, 2]  # no one level of special tokens
    assert legend_of(figure) == [*analyses, "uniform attention"]
    del analyses["student 0"]
    figure = draw(attention_statistics_plot, analyses)
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]


def test_uniform_attention_of_different_grids_is_drawn_where_it_is_the_same(draw):
    analyses = {**analyses_of(1), "other": {"attention": attention_of(5, grid=(4, 4))}}
    figure = draw(attention_statistics_plot, analyses)
    assert [len(axis.lines) for axis in figure.axes] == [3, 2, 2, 2]


# ---- Attention maps ----


def test_maps_show_the_image_and_the_weights_of_each_layer_on_one_scale(draw):
    analysis = analyses_of(1)["student 0"]
    figure = draw(attention_map_plot, analysis)
    maps = analysis["attention"]["maps"]
    *axes, bar = figure.axes
    images = [axis.images[0] for axis in axes]
    assert len(images) == 2 * 4
    highest = max(np.max(entry["weights"]) for entry in maps)
    for entry, row in zip(maps, (images[:4], images[4:]), strict=True):
        np.testing.assert_array_equal(row[0].get_array(), entry["image"])
        for image, weights in zip(row[1:], entry["weights"], strict=True):
            np.testing.assert_array_equal(image.get_array(), weights)
            assert (image.norm.vmin, image.norm.vmax) == (0, highest)
    assert [axis.get_title() for axis in axes] == ["image", "layer 0", "layer 2", "layer 4", "", "", "", ""]
    assert [axis.get_ylabel() for axis in axes[::4]] == ["label \\$0\\$\n#17", "label \\$1\\$\n#18"]
    assert bar.get_xlabel().startswith("attention of the cls token, mean over heads (share, square-root scale;")
    assert bar.lines[-1].get_xdata()[0] == 1 / 64


def test_layers_of_a_map_are_chosen_and_missing_ones_refused(draw, tmp_path):
    analysis = analyses_of(1, has_cls=False)["student 0"]
    figure = draw(attention_map_plot, analysis, layers=[4, 0])
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "layer 4", "layer 0"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), analysis["attention"]["maps"][0]["weights"][2])
    assert "of all patches, mean" in figure.axes[-1].get_xlabel()
    with pytest.raises(ValueError, match=r"image 17 has no layer 3, found \[0, 2, 4\]"):
        attention_map_plot(analysis, tmp_path / "plot.png", layers=[0, 3])
    analysis["attention"]["maps"] = []
    with pytest.raises(ValueError, match="'student 0' has no attention maps"):
        attention_map_plot(analysis, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="has no section 'attention'"):
        attention_map_plot({"model": {"name": "a"}}, tmp_path / "plot.png")


# ---- CKA ----


@pytest.mark.parametrize(("count", "kernel"), [(1, "linear"), (2, "rbf"), (5, "linear")])
def test_heatmaps_show_every_matrix_with_its_layers(draw, count, kernel):
    analyses = analyses_of(count)
    *axes, bar = draw(cka_heatmaps, analyses, kernel=kernel).axes
    matrices = [matrix for analysis in analyses.values() for matrix in analysis["cka"]["matrices"]]
    shown = [axis for axis in axes if axis.get_visible()]
    assert len(shown) == 2 * count
    for axis, matrix in zip(shown, matrices, strict=True):
        (image,) = axis.images
        np.testing.assert_array_equal(image.get_array(), matrix[kernel])
        assert (image.norm.vmin, image.norm.vmax, image.origin) == (0, 1, "lower")
        for side, drawn in (("columns", axis.xaxis), ("rows", axis.yaxis)):
            texts = [label.get_text() for label in drawn.get_ticklabels()]
            assert texts == [str(layer) for layer in matrix[side]["layers"]]
            assert drawn.get_label_text() == f"layer of {matrix[side]['name'].split('/')[-1]}"
        written = [text.get_text() for text in axis.texts]
        assert written == [f"{value:.2f}" for row in matrix[kernel] for value in row]
    assert bar.get_ylabel() == f"debiased CKA, {kernel} kernel"


def test_undefined_cells_are_masked_and_negative_ones_widen_the_scale_of_all(draw):
    analyses = analyses_of(1)
    values = analyses["student 0"]["cka"]["matrices"][1]["linear"]
    values[1][2], values[3][0] = None, -0.125
    first, second, bar = draw(cka_heatmaps, analyses).axes
    mask = np.ma.getmaskarray(second.images[0].get_array())
    assert np.argwhere(mask).tolist() == [[1, 2]]
    (cross,) = second.lines
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([2], [1])
    assert len(second.texts) == 14
    assert first.images[0].norm.vmin == second.images[0].norm.vmin == -0.125
    assert "grey: undefined" in bar.get_ylabel()
    assert second.images[0].cmap.get_bad().tolist() == list(to_rgba("0.8"))


def test_layers_are_thinned_and_values_left_out_of_large_matrices(draw):
    analyses = {f"{i}": {"cka": cka_of(i, f"{i}", rows=24, columns=12)} for i in range(3)}
    for axis in draw(cka_heatmaps, analyses).axes[:6]:
        for drawn in (axis.xaxis, axis.yaxis):
            assert 4 <= len(drawn.get_ticklabels()) <= 8
        assert [text.get_text() for text in axis.yaxis.get_ticklabels()][:2] == ["0", "4"]
        assert not axis.texts


def test_models_are_called_what_they_are_called_here_and_others_by_the_end_of_their_name(draw):
    analyses = {"first": {"cka": cka_of(0, "hub/a", teacher="hub/t")}, "b": {"cka": cka_of(1, "c/b", teacher=None)}}
    labels = [(axis.get_ylabel(), axis.get_xlabel()) for axis in draw(cka_heatmaps, analyses).axes[:3]]
    first = "layer of first"
    assert labels == [(first, first), (first, "layer of t"), ("layer of b", "layer of b")]


def test_an_unknown_kernel_or_no_matrix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'student 0' has no kernel 'cosine', found"):
        cka_heatmaps(analyses_of(1), tmp_path / "plot.png", kernel="cosine")
    with pytest.raises(ValueError, match="no CKA matrix"):
        cka_heatmaps({"a": {"cka": {"matrices": []}}}, tmp_path / "plot.png")


# ---- Hessian ----


def test_the_density_and_both_ends_of_the_spectrum_are_the_json(draw):
    analyses = analyses_of(2)
    analyses["student 1"]["hessian"].update(converged=False, trace=None, trace_standard_error=None)
    figure = draw(eigenvalue_density_plot, analyses)
    density, extent = figure.axes
    for line, ends, analysis in zip(density.lines, extent.lines, analyses.values(), strict=True):
        section = analysis["hessian"]
        assert list(line.get_xdata()) == section["density"]["eigenvalues"]
        values = np.array(section["density"]["density"])
        np.testing.assert_array_equal(line.get_ydata(), np.where(values > 0, values, np.nan))
        assert list(ends.get_xdata()) == [section["smallest_eigenvalue"], section["largest_eigenvalue"]]
        assert ends.get_color() == line.get_color()
    assert [text.get_text() for text in extent.texts] == ["1", "1"]
    assert (density.get_yscale(), density.get_xscale()) == ("log", "linear")
    bottom, top = density.get_ylim()
    assert bottom == pytest.approx(0.1 / (1000 * 0.01 * math.sqrt(2 * math.pi)))
    assert top == pytest.approx(3 * max(max(a["hessian"]["density"]["density"]) for a in analyses.values()))
    assert legend_of(figure) == ["student 0: trace 12.35 ± 0.68", "student 1: trace nan ± nan (not converged)"]
    assert density.get_title() == "Eigenvalues of the Hessian of the cross_entropy"


@pytest.mark.parametrize(
    ("trace", "error", "text"),
    [
        (18890.3, 270.4, "18890 ± 270"),
        (12.0, 9.0, "12.0 ± 9.0"),
        (0.0123456, 0.00012, "0.01235 ± 0.00012"),
        (5.0, 0.0, "5 ± 0"),
        (1.5e12, 3.2e10, "1.5e+12 ± 3.2e+10"),
        (-1.25e-9, 2.5e-10, "-1.25e-09 ± 2.5e-10"),
    ],
)
def test_the_trace_has_the_digits_of_its_error(draw, trace, error, text):
    analysis = {"hessian": {**hessian_of(0), "trace": trace, "trace_standard_error": error}}
    assert legend_of(draw(eigenvalue_density_plot, {"a": analysis})) == [f"a: trace {text}"]


def test_spectra_of_very_different_extent_share_an_axis_that_is_linear_in_the_narrowest(draw):
    analyses = {f"{extent}": {"hessian": hessian_of(0, extent)} for extent in (0.5, 2.0, 200.0)}
    density, extent = draw(eigenvalue_density_plot, analyses).axes
    assert density.get_xscale() == extent.get_xscale() == "symlog"
    assert density.xaxis.get_transform().linthresh == 0.5


def test_different_losses_are_named_beside_each_student(draw):
    analyses = {loss: {"hessian": hessian_of(0, loss=loss)} for loss in ("a", "b")}
    figure = draw(eigenvalue_density_plot, analyses)
    assert [text.rsplit(", ", 1)[1] for text in legend_of(figure)] == ["a", "b"]
    assert figure.axes[0].get_title() == "Eigenvalues of the Hessian"


# ---- Confusion matrix ----


def test_colours_are_shares_of_the_true_class_and_cells_hold_counts(draw):
    confusion = [[90, 10, 0], [0, 0, 0], [1, 2, 1]]
    axis, bar = draw(confusion_matrix_plot, confusion, ["cat", "$dog$", "cat"]).axes
    (image,) = axis.images
    np.testing.assert_array_equal(image.get_array()[[0, 2]], [[0.9, 0.1, 0], [0.25, 0.5, 0.25]])
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert (image.origin, image.norm.vmin, image.norm.vmax) == ("upper", 0, 1)
    texts = {tuple(map(int, text.get_position())): text for text in axis.texts}
    assert {(y, x): text.get_text() for (x, y), text in texts.items()} == {
        (i, j): str(confusion[i][j]) for i in (0, 2) for j in range(3)
    }
    assert (texts[0, 0].get_color(), texts[2, 0].get_color()) == ("white", "black")
    for drawn in (axis.xaxis, axis.yaxis):
        assert [label.get_text() for label in drawn.get_ticklabels()] == ["cat", r"\$dog\$", "cat"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert "grey: no image of the class" in bar.get_ylabel()


@pytest.mark.parametrize(("classes", "labels", "texts"), [(20, 20, 400), (21, 21, 0), (100, 25, 0)])
def test_a_large_matrix_has_no_text_and_every_few_labels(draw, classes, labels, texts):
    names = [f"class {i}" for i in range(classes)]
    axis = draw(confusion_matrix_plot, np.eye(classes, dtype=int).tolist(), names).axes[0]
    assert len(axis.texts) == texts
    for drawn in (axis.xaxis, axis.yaxis):
        assert [label.get_text() for label in drawn.get_ticklabels()] == names[:: classes // labels]
        assert list(drawn.get_ticklocs()) == list(range(0, classes, classes // labels))


def test_counts_stay_inside_their_cells(draw):
    counts = np.full((20, 20), 123456)
    figure = draw(confusion_matrix_plot, counts.tolist(), [f"{i}" for i in range(20)])
    FigureCanvasAgg(figure).draw()
    cell = figure.axes[0].get_window_extent().width / 20
    assert all(text.get_window_extent().width < cell for text in figure.axes[0].texts)


@pytest.mark.parametrize("confusion", [[[1, 2]], [[1, 2, 3], [4, 5, 6]], []])
def test_a_matrix_that_does_not_fit_the_labels_is_refused(tmp_path, confusion):
    with pytest.raises(ValueError, match="must be 2 x 2"):
        confusion_matrix_plot(confusion, ["a", "b"], tmp_path / "plot.png")


# ---- Legibility ----


@pytest.mark.parametrize("plot", OF_ANALYSES)
def test_text_is_10_px_high_in_a_readme_and_inside_the_picture(draw, plot):
    figure = draw(plot, {f"{'long name ' * 6}{i}": v for i, v in enumerate(analyses_of(5).values())})
    FigureCanvasAgg(figure).draw()
    readme = 830 / (figure.get_figwidth() * 72)
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text()):
        assert text.get_fontsize() * readme >= 10
    outside = [text for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        outside += [axis.title, axis.xaxis.label, axis.yaxis.label]
    for extent in (text.get_window_extent() for text in outside if text.get_text() and text.get_visible()):
        assert -1 <= extent.x0 <= extent.x1 <= figure.bbox.width + 1
        assert -1 <= extent.y0 <= extent.y1 <= figure.bbox.height + 1
