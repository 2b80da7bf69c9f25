"""What a trainer does when `Trainer` would talk to the Hub."""

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_ihb.hub import ensure_repo
from hf_ihb.trainer.publishing import Publishing


class HubCalls:
    """Makes the repo, and pushes the run: at the end, or in the background while training goes on.

    Args:
        trainer: Its `output_dir` is the run, its `hub_model_id` the repo.
        publishing: Renders and sends what is pushed.
    """

    def __init__(self, trainer: Trainer, publishing: Publishing) -> None:
        self.trainer, self.publishing = trainer, publishing

    def make_repo(self, token: str | None, private: bool | None) -> None:
        """Makes the repo where it is not there, and sees that it may be written to.

        Raises:
            HubPushError: If not, in one line.
        """
        trainer = self.trainer
        if trainer.is_world_process_zero():
            trainer.hub_model_id = ensure_repo(
                trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name,
                private=trainer.args.hub_private_repo if private is None else private,
                token=token or trainer.args.hub_token,
            )
            trainer.push_in_progress = None

    def make_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Renders the card from the run's files, which know task and splits by themselves.

        Args:
            language: Of the data, where it has one.
            license: Of the model; that of the run if None.
            tags: Added to the card's own.
            model_name: Title of the card.
            finetuned_from: What the run started from, if None.
            tasks: Not used.
            dataset_tags: Hub ids of data sets, where no recipe names one.
            dataset: Likewise, where there are no `dataset_tags`.
            dataset_args: Not used.
        """
        if not self.trainer.is_world_process_zero():
            return
        self.publishing.write_card(
            language=language,
            license=license,
            tags=_listed(tags),
            model_name=model_name,
            base_model=finetuned_from,
            datasets=_listed(dataset_tags) or _listed(dataset),
        )

    def push(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Saves the student, renders its card, and pushes the run in one commit.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for it.
            token: To push with; the one in force if None.
            revision: Branch; `hub_revision` if None.
            private: Whether a repo that has to be made is private; `hub_private_repo` if None.
            **card: What `make_card` takes.

        Returns:
            The commit, a `Future` of it if not `blocking`; None on other processes than the main one.

        Raises:
            HubPushError: If it fails; the run is where it was, and the message says how to push again.
        """
        trainer, args = self.trainer, self.trainer.args
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        token = token or args.hub_token
        if trainer.hub_model_id is None:
            self.make_repo(token, private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        self.make_card(**card)
        self.finish()
        return self.publishing.push(
            commit_message=commit_message or "End of training",
            blocking=blocking,
            token=token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
        )

    def push_checkpoint(self, folder: str) -> None:
        """Pushes in the background what was evaluated at a checkpoint, unless an earlier push is still on its way.

        Args:
            folder: The checkpoint.
        """
        trainer, args = self.trainer, self.trainer.args
        if args.hub_strategy == HubStrategy.END or not trainer.is_world_process_zero():
            return
        running = trainer.push_in_progress
        if running is not None and running.is_done():
            self.finish()
        elif running is not None and not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        trainer.create_model_card()
        job = self.publishing.push(
            commit_message=f"Training in progress, step {trainer.state.global_step}",
            blocking=False,
            token=args.hub_token,
            revision=args.hub_revision,
            weights=trainer.checkpoints.evaluated(Path(folder)),
        )
        trainer.push_in_progress = trainer.push_in_progress or PushInProgress([])
        trainer.push_in_progress.jobs.append(job)

    def finish(self) -> None:
        """Waits for pushes in the background, and says how they ended, which stock `Trainer` never looks at."""
        trainer = self.trainer
        Trainer._finish_current_push(trainer)
        if getattr(trainer, "push_in_progress", None) is not None:
            self.publishing.report_failures(trainer.push_in_progress.jobs)
            trainer.push_in_progress = None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
