"""What a training asks of its evaluations, checked before it begins."""

from transformers import Trainer

from hf_ihb.errors import RecipeError

_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def check_metrics(trainer: Trainer) -> None:
    """Sees that what is selected by will be measured; what a user's `compute_metrics` returns is not known before.

    Raises:
        RecipeError: If not, with the metrics there are.
    """
    args, users = trainer.args, trainer.compute_metrics.users
    if args.prediction_loss_only and users is not None:
        raise RecipeError(
            "key 'prediction_loss_only' contradicts `compute_metrics`, which would never be called; expected false, or "
            "no `compute_metrics`"
        )
    name = args.metric_for_best_model
    if args.eval_strategy == "no" or name is None or (users is not None and not args.prediction_loss_only):
        return
    measured = ["loss"] if args.prediction_loss_only else ["loss", *_metrics_of_ours(trainer)]
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    if sets is not None:
        measured = [f"{key}_{metric}" for key in sets for metric in measured]
    wanted = name.removeprefix("eval_")
    if wanted not in measured and not wanted.endswith(_SPEED):
        because = " with 'prediction_loss_only'" if args.prediction_loss_only else ""
        raise RecipeError(
            f"key 'metric_for_best_model': expected one of {', '.join(measured)}{because}, found '{name}'"
        )


def _metrics_of_ours(trainer: Trainer) -> list[str]:
    heads = trainer.accelerator.unwrap_model(trainer.model).class_heads
    scored = getattr(trainer, "lessons", ()) if getattr(trainer, "teacher_scores", None) is not None else ()
    agreement = [lesson.named("teacher_agreement") for lesson in scored if lesson.teacher_scores is not None]
    return ["accuracy", *(f"{head}_accuracy" for head in heads), *agreement]
