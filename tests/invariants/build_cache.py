"""A worker: builds caches and looks at folders together with other processes, and writes down how that ended for it."""

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments

import hf_ihb.trainer.teacher_cache as module
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import CacheError, CheckpointError
from hf_ihb.run import goes_on_by_itself, run_script
from hf_ihb.storage import folder_lock
from hf_ihb.trainer.cache_rows import Layout
from hf_ihb.trainer.machines import check_shared
from hf_ihb.trainer.teacher_cache import TeacherCache

ROWS = 21


def build(root, broken_row=None, **description):
    asked = []

    def compute(batches):
        for batch in batches:
            asked.extend(batch)
            yield torch.stack([torch.full((6,), 1e6 if n == broken_row else float(n)) for n in batch])

    cache = TeacherCache(root, {"teacher": "one", **description}, Layout("tokens", ((2, 3),)), ROWS)
    try:
        cache.open(compute, 3, tolerance=1e-2, show=False)
    except CacheError as error:
        return str(error)
    return {"asked": asked, "read": cache(torch.arange(ROWS))[0][:, 0, 0].tolist()}


def look(folder):
    """At the folder that the first process holds, as one of two machines."""
    args = TrainingArguments(str(folder), use_cpu=True, save_strategy="steps")
    PartialState().wait_for_everyone()
    with folder_lock(folder, takes=args.process_index == 0):
        try:
            check_shared(args, patience_s=1.0)
        except CheckpointError as error:
            return str(error)


def again(folder, machine):
    """Whether a run goes on by itself that left a checkpoint, if the launcher of one machine has started it again."""
    args, run_args = TrainingArguments(str(folder), use_cpu=True), RunArguments()
    with folder_lock(folder, takes=args.process_index == 0):
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        PartialState().wait_for_everyone()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1" if args.process_index == machine else "0"
    return goes_on_by_itself(args, run_args)


def main(argv):
    root = Path(argv[0])
    state = PartialState(cpu=True)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    module.BLOCK_ROWS = 4
    ended = {
        "together": build(root / "together"),
        "broken": build(root / "broken", broken_row=5),  # in the second block: of the second process
        "different": build(root / "different", seen_by=state.process_index),
        "world": state.num_processes,
        "one folder": look(root / "one"),
        "again": [again(root / "again", machine) for machine in (0, 1, None)],
        "two folders": look(root / f"own{state.process_index}"),
    }
    (root / f"{state.process_index}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    run_script(main)
