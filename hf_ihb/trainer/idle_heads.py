"""Heads that no loss moves: the optimizer leaves them as they are."""

from typing import Any

from transformers import Trainer, TrainerCallback

from hf_ihb.models.module import StudentModule


class IdleHeads(TrainerCallback):
    """Takes the gradients off heads whose losses weigh nothing in this step, before the optimizer sees them.

    Such a gradient is 0, because every parameter gets one: DDP waits for it. An optimizer that is given a gradient of 0
    decays the weights, and Adam counts the step and lets its averages fade, so that the first steps of a loss after a
    warm-up are several times the learning rate. Without a gradient the head stays as it is, as where its loss was never
    computed. Under FSDP and DeepSpeed nothing is changed: they read a checkpoint back only if it has the optimizer's
    state of every parameter.

    Args:
        trainer: Its `moved_heads` says which are not idle at the weights of the step; without it, labels say so.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._handle: Any = None
        self._moved = getattr(trainer, "moved_heads", self._moved_by_labels)

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Looks the module up once (unwrapping it in every step takes long), and asks to be called before each step."""
        self._module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        self._heads = {} if sharded else {**self._module.heads, **self._module.class_heads}
        inner = getattr(optimizer, "optimizer", optimizer)
        if self._heads and hasattr(inner, "register_step_pre_hook"):
            self._handle = inner.register_step_pre_hook(self._rest)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Is not called any more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _rest(self, *args: Any) -> None:
        moved = self._moved(self._module)
        for name in self._heads.keys() - moved:
            for parameter in self._heads[name].parameters():
                parameter.grad = None

    def _moved_by_labels(self, module: StudentModule) -> set[str]:
        return set(module.inference_heads if self.trainer.compute_loss_func is None else module.class_heads)
