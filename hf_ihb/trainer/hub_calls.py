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

    def push(
        self, commit_message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None
    ) -> Any:
        """Pushes the run as it lies in its folder, on the main process.

        Returns:
            The commit, a `Future` of it if not `blocking`.
        """
        args = self.trainer.args
        self.finish()
        return self.publishing.push(
            commit_message=commit_message,
            blocking=blocking,
            token=token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
        )

    def push_checkpoint(self, weights: Path) -> None:
        """Pushes in the background what was evaluated at a checkpoint, unless an earlier push is still on its way.

        Args:
            weights: Folder of the student's files.
        """
        trainer, args = self.trainer, self.trainer.args
        if args.hub_strategy == HubStrategy.END:
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
            weights=weights,
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
