"""Keys of a run folder and of publishing it."""

from dataclasses import dataclass

from hf_ihb.config.fields import Checked, key


@dataclass
class RunArguments(Checked):
    """What may happen to the run folder, and what its model card says."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = key(False, "Replace an earlier run of ours in output_dir (checkpoints included).")
    license: str = key("apache-2.0", "License of the trained model, by the Hub's identifier, for its card.")
    baseline_model: str | None = key(
        None,
        "Hub id or folder of the matched control, trained without a teacher; metrics and card show the gain over it.",
    )
    analyses_after_training: str = key(
        "attention",
        "Analyses of the trained student, with commas, by the defaults of analyze.py: attention (where it has some), "
        "cka (with the teacher's layers too), hessian; or none. Pushing changes nothing about it.",
    )


@dataclass
class PublishArguments(Checked):
    """Where a finished run goes on the Hub."""

    _argument_group_name = "publishing"

    hub_model_id: str | None = key(None, "Repo to push to, such as me/deit-tiny-cka; made where there is none.")
    private: bool = key(
        False, "Make the repo private when it is made; otherwise the owner's default holds. An existing one stays."
    )
    revision: str | None = key(None, "Branch to push to, made where there is none; the main branch if not given.")
    create_pr: bool = key(False, "Open a pull request instead of committing to the branch.")
    commit_message: str = key("Student, card and evidence", "Message of the commit.")
    dry_run: bool = key(False, "Render everything into a folder, print what would be pushed, and send nothing.")
    output_dir: str | None = key(None, "Folder of a dry run; RUN/hub if not given.")
    license: str | None = key(None, "License of the model, by the Hub's identifier; the run's if not given.")
    overwrite: bool = key(False, "Push into a repo that holds something other than a run of ours.")
