import copy

import pytest
import torch
import torch.nn.functional as F

from hf_ihb.analysis.hessian import HessianAnalysis
from tests.analysis.conftest import NAMES, PIXELS, measure


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


def test_a_result_tells_the_settings_that_its_numbers_depend_on():
    assert set(HessianAnalysis.deciding_settings()) == {
        "hessian_images",
        "max_probes",
        "trace_tolerance",
        "lanczos_steps",
        "lanczos_starts",
        "hessian_dtype",
    }
