"""Runs a script as a user would; with KILL_AT_STEP set, every process dies by SIGKILL after that step, the first time.

With TERM_AT_STEP set, the last process, and no other, is told to end after that step; with KILL_IN_SAVE set it dies by
SIGKILL in the save of that step, before it has left its part.
"""

import os
import runpy
import signal
import sys

from transformers import Trainer

from hf_ihb.trainer import callbacks


def _die(self, args, state, control, **kwargs):
    if state.global_step == int(os.environ["KILL_AT_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)


def _end(self, args, state, control, **kwargs):
    if state.global_step == int(os.environ["TERM_AT_STEP"]) and args.process_index == args.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _die_saving(self, folder, save=Trainer._save_rng_state):
    if (
        self.state.global_step == int(os.environ["KILL_IN_SAVE"])
        and self.args.process_index == self.args.world_size - 1
    ):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)


if "KILL_AT_STEP" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    callbacks.Hooks.on_step_end = _die
if "TERM_AT_STEP" in os.environ:
    callbacks.Hooks.on_step_end = _end
if "KILL_IN_SAVE" in os.environ:
    Trainer._save_rng_state = _die_saving
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
