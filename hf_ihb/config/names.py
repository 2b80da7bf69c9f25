"""Keys that name a model or a data set, and what stands for a name that is none on the Hub."""

from typing import Literal, NamedTuple

# How the name of somebody's folder is published; what comes with a package has a name of its own.
LOCAL_PREFIX, BUILT_IN_PREFIX = "local:", "sklearn:"


class NamedThing(NamedTuple):
    """What a key names.

    Attributes:
        revision: The key beside it that holds branch, tag or commit; None where the name stands alone.
        repo_type: Kind of repo on the Hub.
        what: What errors call it.
    """

    revision: str | None
    repo_type: Literal["model", "dataset"]
    what: str


# A revision belongs to the name beside it: another name on the command line does not take over the recipe's.
NAMES = {
    "dataset_name": NamedThing("dataset_revision", "dataset", "data set"),
    "teacher_model": NamedThing("teacher_revision", "model", "teacher"),
    "model_name_or_path": NamedThing("model_revision", "model", "model"),
    "baseline_model": NamedThing(None, "model", "baseline"),
}
REVISIONS = {name: named.revision for name, named in NAMES.items() if named.revision is not None}
