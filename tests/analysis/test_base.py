import copy
import json
from dataclasses import fields

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from hf_ihb.analysis import ANALYSES, Analysis, AnalysisArguments, analyses_in, analysis_table, draw_analyses
from hf_ihb.analysis.base import SharedArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import DataError, ModelLoadError
from hf_ihb.hub import run_card
from hf_ihb.model_card import PLOTS
from tests.analysis.conftest import SHAPE, measure, subject
from tests.model_card.records import records

ALL = ",".join(ANALYSES)


def assert_close(found, expected, tolerance=1e-5):
    """Nested numbers are the same up to rounding, everything else exactly."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for name in found:
            assert_close(found[name], expected[name], tolerance)
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert found == expected


@pytest.mark.parametrize("batch_size", [1, 7])
def test_results_do_not_depend_on_the_batch_size(batch_size, student, cnn, split):
    whole, parts = (measure(student, split, ALL, cnn, batch_size=size, rows_per_batch=8) for size in (24, batch_size))
    for result in (whole, parts):
        result.pop("seconds")
    assert_close(parts, whole)


def test_measuring_leaves_the_model_as_it_was(student, split):
    student.model.requires_grad_(False)
    before = copy.deepcopy(student.model.state_dict())
    measure(student, split, ALL)
    assert all(torch.equal(v, before[k]) for k, v in student.model.state_dict().items())
    assert not student.model.training
    assert not any(p.requires_grad for p in student.model.parameters())
    assert student.model.dtype == torch.float32


def test_images_are_chosen_by_class_and_seed_alone(student, split):
    one, again, other = (measure(student, split, "cka", max_images=12, analysis_seed=s)["data"] for s in (0, 0, 1))
    assert one == again
    assert one["indices"] != other["indices"]
    assert one["num_images"] == 12
    assert torch.bincount(split.labels[one["indices"]]).tolist() == [4, 4, 4]
    assert measure(student, split, "cka", max_images=99)["data"]["indices"] == list(range(24))
    tiny = split.select(torch.arange(9))
    with pytest.raises(DataError, match="key 'max_images', test: cannot be split by class"):
        measure(student, ImageSplit(tiny.images, torch.arange(9), [str(i) for i in range(9)]), "cka", max_images=8)


def test_an_analysis_that_fails_leaves_the_others_and_the_reason(cnn, split):
    kept = []
    with pytest.raises(ModelLoadError, match="ResNetForImageClassification: expected a ViT") as error:
        measure(cnn, split, "attention,cka", keep=lambda result: kept.append(copy.deepcopy(result)))
    assert kept[-1]["failed"] == {"attention": str(error.value)}
    headless = subject(Dinov2Model(Dinov2Config(**SHAPE)))
    with pytest.raises(ModelLoadError, match=r"expected a classifier .* found Dinov2Model; leave hessian out"):
        measure(headless, split, "attention,hessian", keep=lambda result: kept.append(copy.deepcopy(result)))
    assert "attention" in kept[-1]
    assert kept[-1]["failed"].keys() == {"hessian"}


def test_an_earlier_result_stands_where_nothing_it_depends_on_has_changed(student, cnn, split):
    first = measure(student, split, "attention,cka", cnn)

    def is_read(metrics="attention,cka", teacher=cnn, model=student, **kwargs):
        return measure(model, split, metrics, teacher, previous=first, compare=["others"], **kwargs) is first

    assert is_read()
    assert is_read("cka")
    assert is_read(batch_size=3)
    assert is_read(max_probes=9)
    assert not is_read("attention,cka,hessian")
    assert not is_read(teacher=None)
    assert not is_read(max_images=12)
    assert not is_read(rows_per_batch=8)
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.model.deit.layernorm.weight[0] += 1
    assert not is_read(model=other)
    # a model on its own is measured anew
    assert measure(student, split, "attention,cka", cnn, previous=first) is not first


def test_parts_that_are_not_asked_for_are_kept_while_they_are_true(student, split):
    first = measure(student, split, "attention,hessian")
    first["attention"]["mean_distance"] = first["hessian"]["trace"] = 42.0  # to be told from what is made anew
    second = measure(student, split, "attention,cka", previous=first)
    assert {"attention", "cka", "hessian"} <= second.keys()
    assert second["hessian"]["trace"] == 42.0
    assert second["attention"]["mean_distance"] != 42.0
    assert second["seconds"].keys() == second["settings"].keys() == {"attention", "cka", "hessian"}
    assert "hessian" not in measure(student, split, "cka", previous=first, max_images=12)


def test_the_table_shows_what_all_models_share(student, cnn, split):
    vit = measure(student, split, "attention,cka,hessian", max_probes=2)
    assert f"{vit['attention']['mean_distance']:.3f}" in analysis_table({"a": vit})
    both = analysis_table({"a": vit, "b": measure(cnn, split, "cka,hessian", max_probes=2)})
    assert "Hessian trace" in both
    assert "distance" not in both
    assert "not converged" in both


# ---- The list ----


def test_the_default_is_what_it_was_when_there_were_three():
    assert AnalysisArguments().analyses == ["attention", "cka", "hessian"]


def test_every_setting_belongs_to_one_analysis_and_is_a_key():
    own = [f.name for analysis in ANALYSES.values() for f in fields(analysis)]
    shared = [f.name for f in fields(SharedArguments)]
    keys = [f.name for f in fields(AnalysisArguments)]
    assert sorted(keys) == sorted([*shared, "metrics", *own])
    assert len(set(keys)) == len(keys)
    defaults = AnalysisArguments()
    for analysis in ANALYSES.values():
        assert analysis.of(defaults) == analysis()
        assert set(analysis.deciding_settings()) <= set(keys)
        assert set(analysis.free_settings) <= {f.name for f in fields(analysis)}
        assert set(analysis.shared_settings) <= set(shared)


def test_settings_are_checked_where_an_analysis_is_made_by_hand():
    with pytest.raises(ValueError, match="key 'num_maps': expected a number >= 0, found -1"):
        ANALYSES["attention"](num_maps=-1)


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_is_whole(name, student, cnn, split, tmp_path):
    """What it computes can be written, read, drawn, put into a table and told."""
    analysis = ANALYSES[name]
    assert issubclass(analysis, Analysis)
    assert analysis.name == name
    assert f"{analysis.summary}" in next(f for f in fields(AnalysisArguments) if f.name == "metrics").metadata["help"]
    made = measure(student, split, name, cnn)
    result = json.loads(json.dumps(made, allow_nan=False))
    assert result == made
    assert analyses_in(result) == [analysis]
    drawn = draw_analyses({"a": result}, tmp_path)
    assert [path.stem for path in drawn] == list(analysis.plots)
    assert all(path.is_file() and f"plots/{path.name}" in PLOTS for path in drawn)
    assert analysis.card_plot is None or analysis.card_plot[0] in analysis.plots
    assert {path.stem for path in draw_analyses({"a": result, "b": result}, tmp_path)} <= set(analysis.plots)
    header, _, row = analysis_table({"a": result}).splitlines()
    assert [title.strip() for title in header.split("|")[2:-1]] == list(analysis.columns())
    assert len(row.split("|")) == len(analysis.columns()) + 3
    assert analysis.card_text(result)


def test_plots_of_two_analyses_are_never_one_file():
    names = [name for analysis in ANALYSES.values() for name in analysis.plots]
    assert len(set(names)) == len(names)
    assert list(PLOTS) == [f"plots/{name}.png" for name in [*names, "confusion_matrix"]]


def test_an_analysis_that_is_not_on_the_list_is_refused_wherever_it_is_met(student, split, tmp_path):
    with pytest.raises(ValueError, match=r"key 'metrics': expected some of attention,cka,hessian.*, found 'ckb'"):
        AnalysisArguments(metrics="cka,ckb")
    result = measure(student, split, "cka")
    result["settings"]["ckb"], result["ckb"] = {}, {"matrices": []}
    for use in (
        analyses_in,
        lambda r: draw_analyses({"a": r}, tmp_path),
        lambda r: analysis_table({"a": r}),
        lambda r: measure(student, split, "attention", previous=r),
    ):
        with pytest.raises(DataError, match=f"analysis of '{student.name}': expected some of .*, found 'ckb'"):
            use(result)
    assert not list(tmp_path.iterdir())


def test_a_plot_that_no_run_folder_would_keep_is_refused(student, split, tmp_path, monkeypatch):
    monkeypatch.setattr(ANALYSES["cka"], "plots", {"cka_linear": "CKA"})
    with pytest.raises(ValueError, match="expected a plot among \\['cka_linear'\\], found 'cka_rbf'"):
        draw_analyses({"a": measure(student, split, "cka")}, tmp_path)


def test_a_card_has_a_section_for_each_analysis_and_refuses_one_that_is_not_on_the_list(tmp_path):
    files = records()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    text = run_card(tmp_path)
    assert len(analyses_in(files["analysis.json"])) == 3
    for analysis in analyses_in(files["analysis.json"]):
        assert f"\n## {analysis.title}\n\n{analysis.card_text(files['analysis.json'])}\n\n" in text
    content = files["analysis.json"] | {"settings": {"ckb": {}}, "ckb": {}}
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"analysis of .*: expected some of attention, cka, hessian.*, found 'ckb'"):
        run_card(tmp_path)
