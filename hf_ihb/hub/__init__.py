"""To the Hub: what of a run is pushed, and one commit that holds all of it."""

from hf_ihb.hub.pushing import Patience, again, check_push, ensure_repo, push_run, push_staged
from hf_ihb.hub.staging import card_files, render_folder, run_card, stage_run

__all__ = [
    "Patience",
    "again",
    "card_files",
    "check_push",
    "ensure_repo",
    "push_run",
    "push_staged",
    "render_folder",
    "run_card",
    "stage_run",
]
