"""What several machines of a training must have in common."""

import os
import socket
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from hf_ihb.errors import CheckpointError
from hf_ihb.storage.lock import last_holder

_PATIENCE_S = 30.0  # that a network's file system may take to show what another machine has written


def check_shared(args: TrainingArguments, patience_s: float | None = None) -> None:
    """Sees that all machines write to one output folder, which the main process holds.

    A checkpoint has a part of each process, and is read by all.

    Args:
        args: Of the training.
        patience_s: Seconds after which a folder that does not hold what the main process wrote is another one; 30, or
            half of `ddp_timeout`, if None.

    Raises:
        CheckpointError: If one does not, on every process.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    if here >= args.world_size or args.save_strategy == "no" or args.save_only_model or args.save_on_each_node:
        return
    if patience_s is None:  # the others wait for this one
        patience_s = min(_PATIENCE_S, args.ddp_timeout / 2)
    folder, until = Path(args.output_dir), time.monotonic() + patience_s
    wanted = broadcast_object_list([last_holder(folder)])[0]
    while last_holder(folder) != wanted and time.monotonic() < until:
        time.sleep(0.2)
    hosts = [socket.gethostname()] if last_holder(folder) != wanted else []
    if others := sorted(set(gather_object(hosts))):
        raise CheckpointError(
            "key 'output_dir': expected a folder that all machines see, since a checkpoint has a part of each process, "
            f"found another {args.output_dir} on {', '.join(others)}; give one on a shared disk, or --save_strategy no"
        )
