"""Every method has a row in the table of methods."""

from benchmarks.method_table import ROWS, best, standard_error, table, verdict
from hf_ihb.methods import METHODS


def run(accuracy):
    return {"accuracy": accuracy, "train_seconds": 1.0}


def test_every_method_is_a_row():
    switched_on = {key for row in ROWS.values() for key, value in row.keys.items() if value not in (0, "0")}
    # distillation of class scores is what its recipe switches on
    assert {f"{method.name}_weight" for method in METHODS} - {"kd_weight"} <= switched_on


def test_broken_teachers_are_tried_with_the_best_methods_from_features_that_ran():
    runs = {"labels|0|none": run(0.5), "KD|0|none": run(0.9), "CKA|0|none": run(0.6), "Gram|0|none": run(0.7)}
    assert best(runs | {"token|0|none": {"failed": "..."}}, 5) == ["Gram", "CKA"]
    assert best(runs, 1) == ["Gram"]


def test_a_teacher_that_knows_nothing_is_named_where_it_helps_as_much():
    runs = {"labels|0|none": run(0.30), "CKA|0|none": run(0.36), "CKA|0|untrained": run(0.36)}
    assert verdict(runs, "CKA") == "the untrained teacher helps as much"
    assert verdict(runs | {"CKA|0|untrained": run(0.31)}, "CKA") == "more than an untrained teacher"
    assert verdict(runs | {"CKA|0|none": run(0.301)}, "CKA") == "no difference to labels alone"
    assert verdict(runs | {"CKA|0|none": run(0.25)}, "CKA") == "worse than labels alone"
    assert abs(standard_error(0.5) - 0.5 * (2 / 10_000) ** 0.5) < 1e-12
    assert any("36.00 (+6.00)" in line and line.startswith("| CKA |") for line in table(runs))
