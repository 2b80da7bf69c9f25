"""Run folders that are not what they should be."""

import pytest

from hf_ihb.errors import DataError
from hf_ihb.hub import run_card
from tests.model_card.records import records


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"recipe\.json: expected a JSON file"):
        run_card(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.json", "{", r"recipe\.json: expected a JSON file"),
        ("recipe.json", "[]", r"recipe\.json: expected an object in JSON, found list"),
        ("recipe.json", '{"keys": {}}', r"recipe\.json: expected 'dataset', found keys"),
        ("training_history.json", "{}", r"training_history\.json: expected a list in JSON, found dict"),
        ("metrics.json", '{"model": {"weights_sha256": "aa"}}', r"metrics\.json: expected 'data', found model"),
        (
            "metrics.json",
            '{"model": {"weights_sha256": "bb"}, "data": {}, "heads": {}}',
            r"of the same weights, found different ones",
        ),
    ],
)
def test_files_that_are_something_else_are_one_line(make_run, file, content, message):
    folder = make_run(records())
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        run_card(folder)
    assert "\n" not in str(caught.value)
