"""The teachers that recipes/README.md names: the keys of each, tried with a small random model of its class."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.families import FAMILIES, TIMM, TRANSFORMERS
from benchmarks.matrix_checks import Case
from hf_ihb.config.model import TeacherArguments
from hf_ihb.methods import SharedKeys
from hf_ihb.models.teacher import load_teacher

TEXT = (Path(__file__).parents[2] / "recipes" / "README.md").read_text("utf-8")
ROW = r"^\| `([\w./-]+)`(?: \(gated\))? \| `(teacher_[^`]*)` \|.*\| `(\w+/[\w-]+)` \|$"
ROWS = re.findall(ROW, TEXT, flags=re.MULTILINE)


def test_there_are_rows_each_of_a_family_of_the_matrix():
    assert len(ROWS) >= 12
    known = {f"transformers/{name}" for name in TRANSFORMERS} | {f"timm/{name}" for name in TIMM}
    assert {family for _, _, family in ROWS} <= known


@pytest.mark.parametrize(("name", "keys", "family"), [row for row in ROWS if row[2] in FAMILIES])
def test_its_keys_are_keys_and_it_takes_another_image_size(name, keys, family, tmp_path):
    known = {f.name for f in fields(SharedKeys)} | {f.name for f in fields(TeacherArguments)}
    assert set(re.findall(r"(\w+):", keys)) <= known
    size = 2 * FAMILIES[family].size
    case = Case(FAMILIES[family], tmp_path)
    args = TeacherArguments(teacher_model=str(tmp_path), teacher_image_size=size)
    teacher = load_teacher(args, case.labels, needs_logits=False)
    seen = teacher.prepare(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert seen.shape[-2:] == (size, size)
    (last,) = teacher.features(seen, [-1], apply_norm="teacher_norm: true" in keys)
    assert last.grid == (2 * FAMILIES[family].sides[-1],) * 2
    assert torch.isfinite(last.patch_tokens).all()
