import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_ihb.analysis import analysis_table, analyze
from hf_ihb.config.measure import AnalysisArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import DataError, ModelLoadError
from hf_ihb.functional.attention import attention_distance
from hf_ihb.functional.similarity import linear_cka
from hf_ihb.models.features import extract_features
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import PixelFormat

NAMES = ["cat", "dog", "owl"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
SHAPE = {"image_size": 12, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (12, 12))
DATA = {"name": "noise", "revision": None}


@pytest.fixture
def split(generator):
    images = torch.randint(0, 256, (24, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(24) % 3, NAMES)


def subject(model, pixels=PIXELS):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Pretrained(model.eval(), pixels, type(model).__name__, None)


@pytest.fixture
def student():
    return subject(DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, intermediate_size=8, **LABELS)))


@pytest.fixture
def cnn():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic", **LABELS)
    return subject(ResNetForImageClassification(config))


def measure(student, split, metrics, teacher=None, previous=None, keep=lambda result: None, **kwargs):
    defaults = {"max_probes": 3, "lanczos_steps": 4, "lanczos_starts": 2, "hessian_dtype": "float64", "num_maps": 2}
    args = AnalysisArguments(metrics=metrics, **(defaults | kwargs))
    return analyze(student, split, args, data=DATA, teacher=teacher, previous=previous, keep=keep)


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
    whole, parts = (
        measure(student, split, "attention,cka,hessian", cnn, batch_size=size, rows_per_batch=8)
        for size in (24, batch_size)
    )
    for result in (whole, parts):
        result.pop("seconds")
    assert_close(parts, whole)


def test_attention_is_that_of_the_models_own_maps(student, split):
    found = measure(student, split, "attention")["attention"]
    student.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = student.model(PIXELS.apply(split.images.float() / 255), output_attentions=True).attentions
    expected = [attention_distance(m, (3, 3), 2).double().mean(0) for m in maps]
    assert [layer["distance_per_head"] for layer in found["layers"]] == [pytest.approx(e.tolist()) for e in expected]
    assert found["mean_distance"] == pytest.approx(torch.stack(expected).mean().item())
    assert found["num_prefix_tokens"] == 2
    assert found["grid"] == [3, 3]
    assert found["patch_size_px"] == [4, 4]


def test_the_untrained_twin_is_measured_beside_the_model(student, split):
    found = measure(student, split, "attention")["attention"]
    assert found["untrained"]["mean_distance"] != found["mean_distance"]
    assert found["untrained"]["mean_distance"] == pytest.approx(found["uniform_distance"], abs=0.02)
    again = copy.deepcopy(student)
    with torch.no_grad():
        again.model.deit.layernorm.weight.mul_(2)  # another model, the same architecture
    assert measure(again, split, "attention")["attention"]["untrained"] == found["untrained"]
    assert measure(student, split, "attention", untrained_reference=False)["attention"]["untrained"] is None


def test_maps_are_those_of_the_images_they_name(student, split):
    grouped = split.select(torch.arange(24).reshape(8, 3).T.flatten())  # by class: 8 of each
    maps = measure(student, grouped, "attention", num_maps=4)["attention"]["maps"]
    assert [m["index"] for m in maps] == [0, 8, 16, 1]
    assert [m["label"] for m in maps] == [*NAMES, NAMES[0]]
    for m in maps:
        assert torch.equal(torch.tensor(m["image"]).permute(2, 0, 1), grouped.images[m["index"]].long())
        assert [sum(map(sum, w)) for w in m["weights"]] == [pytest.approx(1, abs=1e-5)] * 2


def test_cka_is_that_of_pooled_block_outputs(student, cnn, split):
    found = measure(student, split, "cka", cnn)["cka"]
    pixels = PIXELS.apply(split.images.float() / 255)
    with torch.no_grad():
        x, y = (
            [f.patch_tokens.mean(1).double() for f in extract_features(s.model, pixels, None)[1]]
            for s in (student, cnn)
        )
    own, cross = found["matrices"]
    assert own["rows"] == own["columns"] == {"name": student.name, "layers": [0, 1]}
    assert cross["columns"] == {"name": cnn.name, "layers": [0, 1, 2]}
    for matrix, columns in ((own, x), (cross, y)):
        expected = [[linear_cka(a, b, "debiased").item() for b in columns] for a in x]
        assert torch.tensor(matrix["linear"]).numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-4)


def test_a_teacher_sees_the_images_at_its_own_size(student, split):
    shape = SHAPE | {"image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**shape))
    small, large = (subject(copy.deepcopy(model), PIXELS._replace(size=(px, px))) for px in (28, 56))
    for teacher in (small, large):
        teacher.model.load_state_dict(small.model.state_dict())
    matrices = [measure(student, split, "cka", t)["cka"]["matrices"][1]["linear"] for t in (small, large)]
    assert matrices[0] != matrices[1]


def explicit_hessian(student, split):
    model = copy.deepcopy(student.model).double()
    names, values = zip(*model.named_parameters(), strict=True)
    pixels = PIXELS.apply(split.images.double() / 255)

    def loss(*parameters):
        outputs = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (pixels,))
        return F.cross_entropy(outputs.logits, split.labels)

    model.set_attn_implementation("eager")
    gradient = torch.autograd.grad(loss(*values), values, create_graph=True)
    return torch.cat([g.flatten() for g in gradient]), values


def test_the_hessian_is_that_of_the_mean_loss(student, split):
    found = measure(student, split, "hessian", max_probes=60, lanczos_steps=30, lanczos_starts=1)["hessian"]
    gradient, values = explicit_hessian(student, split)
    size = len(gradient)
    assert found["num_parameters"] == size
    rows = []
    for i in range(size):
        row = torch.autograd.grad(gradient[i], values, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    eigenvalues = torch.linalg.eigvalsh(torch.stack(rows))
    assert abs(found["trace"] - eigenvalues.sum().item()) < 3.5 * found["trace_standard_error"]
    assert found["largest_eigenvalue"] == pytest.approx(eigenvalues[-1].item(), rel=1e-6)
    assert found["smallest_eigenvalue"] == pytest.approx(eigenvalues[0].item(), rel=1e-3)
    squared = sum(v.square().sum().item() for v in values)
    assert found["trace_times_squared_norm"] == pytest.approx(found["trace"] * squared)
    density = found["density"]
    area = torch.trapezoid(torch.tensor(density["density"]), torch.tensor(density["eigenvalues"]))
    assert area == pytest.approx(1, abs=1e-3)


def test_each_end_of_the_spectrum_is_the_furthest_of_all_starts(student, split):
    found = measure(student, split, "hessian", lanczos_steps=3, lanczos_starts=4)["hessian"]
    assert len(found["nodes"]) == 4
    assert found["smallest_eigenvalue"] == min(map(min, found["nodes"]))
    assert found["largest_eigenvalue"] == max(map(max, found["nodes"]))
    assert found["smallest_residual"] > 0 < found["largest_residual"]


def test_the_order_of_a_models_classes_does_not_matter(student, split):
    order = [2, 0, 1]
    names = [NAMES[i] for i in order]
    other = copy.deepcopy(student)
    other.model.config.id2label, other.model.config.label2id = (
        dict(enumerate(names)),
        {n: i for i, n in enumerate(names)},
    )
    with torch.no_grad():
        for head in (other.model.cls_classifier, other.model.distillation_classifier):
            head.weight.copy_(head.weight[order])
            head.bias.copy_(head.bias[order])
    one, two = (measure(s, split, "hessian", max_probes=2, lanczos_steps=40)["hessian"] for s in (student, other))
    # probes meet the heads' rows in another order; the spectrum is the same
    assert two["largest_eigenvalue"] == pytest.approx(one["largest_eigenvalue"], rel=1e-6)


def test_measuring_leaves_the_model_as_it_was(student, split):
    student.model.requires_grad_(False)
    before = copy.deepcopy(student.model.state_dict())
    measure(student, split, "attention,cka,hessian")
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


def test_a_teacher_is_part_of_the_similarity_alone(student, cnn, split):
    first = measure(student, split, "attention,cka", cnn)
    later = measure(student, split, "hessian", previous=first)
    assert later["cka"] is first["cka"]
    assert later["teacher"] == first["teacher"]
    other = measure(student, split, "hessian", student, previous=first)
    assert "cka" not in other
    assert other["attention"] is first["attention"]
    assert len(measure(student, split, "cka", previous=first)["cka"]["matrices"]) == 1


def test_the_table_shows_what_all_models_share(student, cnn, split):
    vit = measure(student, split, "attention,cka,hessian", max_probes=2)
    assert f"{vit['attention']['mean_distance']:.3f}" in analysis_table({"a": vit})
    both = analysis_table({"a": vit, "b": measure(cnn, split, "cka,hessian", max_probes=2)})
    assert "Hessian trace" in both
    assert "distance" not in both
    assert "not converged" in both
