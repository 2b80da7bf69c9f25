"""What a trainer sends to the Hub: the student that is evaluated, its card and its evidence, and nothing else."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_ihb.config.names import LOCAL_PREFIX
from hf_ihb.config.secrets import is_token_key
from hf_ihb.config.teachers import TEACHER_KEYS
from hf_ihb.errors import HfIhbError, HubPushError
from hf_ihb.hub import again, push_staged, run_card, stage_run
from hf_ihb.methods.teachers import OF_EACH_TEACHER
from hf_ihb.models.classes import class_names
from hf_ihb.runs.environment import environment
from hf_ihb.runs.files import write_json
from hf_ihb.runs.folder import CARD_FILE, HISTORY_FILE, RECIPE_FILE

logger = logging.get_logger(__name__)


def resolved_recipe(
    trainer: Trainer,
    arguments: Sequence[Any],
    *,
    recipe: Path | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every key with its value, what names resolved to, and where the run happens: the content of ``recipe.json``.

    Args:
        trainer: The trainer of the run.
        arguments: Every dataclass of the run.
        recipe: The recipe's path, where there is one.
        dataset: What is known of the data set: ``name``, ``revision``, ``label_names``, images in each split.
    """
    keys: dict[str, Any] = {}
    for instance in arguments:
        own = instance.to_dict() if isinstance(instance, TrainingArguments) else vars(instance)
        keys |= {f.name: own.get(f.name) for f in fields(instance) if not is_token_key(f.name)}
    taught = [_teacher_record(lesson) for lesson in getattr(trainer, "lessons", ())]
    return {
        "recipe": None if recipe is None else str(recipe),
        "keys": keys,
        "dataset": dataset,
        "teacher": taught[0] if taught else None,
        **_entries(trainer, taught, keys),
        "environment": environment(
            trainer.args.device, num_processes=trainer.args.world_size, mixed_precision=trainer.args.mixed_precision
        ),
    }


def _teacher_record(lesson: Any) -> dict[str, Any]:
    """What a teacher's name resolved to, and what of its image processor was left out."""
    about = {"name": lesson.teacher.name, "revision": lesson.teacher.revision}
    return about | {"crop_left_out": True} if lesson.teacher_side.leaves_crop_out else about


def _entries(trainer: Trainer, taught: Sequence[Mapping[str, Any]], keys: Mapping[str, Any]) -> dict[str, Any]:
    """For each entry of `teacher_models` what its name resolved to, and the keys whose values are not the run's."""
    if (entries := getattr(trainer.args, "teacher_models", None)) is None:
        return {}
    found = []
    for lesson, record, entry in zip(trainer.lessons, taught, entries, strict=True):
        of_teacher = {name: value for name, value in entry.items() if name in TEACHER_KEYS}
        own = of_teacher | {name: getattr(lesson.args, name) for name in sorted(OF_EACH_TEACHER)}
        found.append({**record, "keys": {name: own[name] for name in sorted(own) if own[name] != keys.get(name)}})
    return {"teachers": found}


class Publishing:
    """Renders and pushes a trainer's run; keeps an eye on pushes in the background.

    Args:
        trainer: Its `output_dir` is the run, its `hub_model_id` the repo.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._background = HfApi()  # one thread: pushes keep their order
        self._card: dict[str, Any] = {}

    @property
    def _run(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def write_card(self, **card: Any) -> None:
        """Brings the run's records up to date, and its card with them.

        Args:
            **card: Options of the card; they hold for later pushes as well.
        """
        trainer, run = self.trainer, self._run
        run.mkdir(parents=True, exist_ok=True)
        if not (run / RECIPE_FILE).is_file():  # a trainer that no script has made
            known = (trainer.args, trainer.augmentation)
            write_json(run / RECIPE_FILE, resolved_recipe(trainer, known, dataset=self._dataset()))
        write_json(run / HISTORY_FILE, trainer.state.log_history)
        self._card = card
        (run / CARD_FILE).write_text(run_card(run, repo_id=trainer.hub_model_id, **card), "utf-8")

    def _dataset(self) -> dict[str, Any]:
        """What a trainer knows of data that was handed to it."""
        trainer = self.trainer
        splits = {"train": trainer.train_dataset, "validation": trainer.eval_dataset, "test": None}
        sizes = {name: len(split) if hasattr(split, "__len__") else 0 for name, split in splits.items()}
        labels = class_names(trainer.student.config)
        return {"name": f"{LOCAL_PREFIX}unnamed", "revision": None, "label_names": labels, **sizes}

    def push(
        self,
        *,
        commit_message: str,
        blocking: bool,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        weights: Path | None = None,
    ) -> Any:
        """Stages the run as it is now, and pushes it in one commit.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for it.
            token: To push with; the one in force if None.
            private: Whether a new repo is private.
            revision: Branch; the main one if None.
            weights: Folder of the student's files; the run if None.

        Returns:
            The commit, or a `Future` of it.

        Raises:
            HubPushError: If it fails; in the background, the future does.
        """
        repo_id, staged = self.trainer.hub_model_id, Path(tempfile.mkdtemp(prefix="hf_ihb_push_"))
        where = {"private": private, "revision": revision}

        def send() -> Any:
            try:
                return push_staged(staged, repo_id, token=token, commit_message=commit_message, **where)
            except HubPushError as error:
                command = again(self._run, repo_id, **where)
                raise HubPushError(f"{error}; the run is kept; to push it again: {command}") from error
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        try:
            stage_run(self._run, staged, repo_id=repo_id, weights=weights, card=self._card, token=token)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return send() if blocking else self._background.run_as_future(send)

    def report_failures(self, jobs: Sequence[Future]) -> None:
        """Says which pushes in the background have failed; training goes on."""
        for job in jobs:
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                reason = str(error) if isinstance(error, HfIhbError) else f"{type(error).__name__}: {error}"
                logger.warning(f"a push during training failed, and the run went on: {' '.join(reason.split())}")
