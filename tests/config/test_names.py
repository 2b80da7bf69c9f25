from dataclasses import fields

from hf_ihb.analysis import AnalysisArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.measure import EvaluationArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.names import NAMES, REVISIONS
from hf_ihb.config.run import RunArguments

CLASSES = (RunArguments, DataArguments, ModelArguments, TeacherArguments, EvaluationArguments, AnalysisArguments)
KEYS = [{field.name for field in fields(arguments)} for arguments in CLASSES]


def test_the_table_holds_keys_that_there_are_and_every_revision():
    keys = set().union(*KEYS)
    assert keys >= NAMES.keys()
    assert {name for name in keys if name.endswith("_revision")} == set(REVISIONS.values())


def test_a_revision_is_of_one_class_with_its_name():
    for name, revision in REVISIONS.items():
        assert all(revision in keys for keys in KEYS if name in keys)
