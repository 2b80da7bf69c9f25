"""Distil a student from a frozen teacher.

accelerate launch scripts/distill.py recipes/cka.json [--seed 1] [--num_train_epochs 30]
"""

from transformers import set_seed

from hf_ihb.access import pin_revisions
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.recipe import parse_recipe, peek, recipe_path
from hf_ihb.config.run import RunArguments
from hf_ihb.data import load_image_data
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import load_teacher
from hf_ihb.run import open_run, run_script, run_training
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, StructuralDistillationTrainingArguments

METHODS = {
    "logits": (LogitDistillationTrainingArguments, LogitDistillationTrainer),
    "structural": (StructuralDistillationTrainingArguments, StructuralDistillationTrainer),
}
COMMON = (RunArguments, DataArguments, AugmentationArguments, ModelArguments, TeacherArguments)


def main(argv: list[str]) -> None:
    """Recipe -> run folder."""
    if argv and argv[0] in ("-h", "--help"):
        parse_recipe(argv, *COMMON, *(arguments for arguments, _ in METHODS.values()), description=__doc__)
    arguments_class, trainer_class = METHODS[peek(argv, "method", METHODS)]
    parsed = parse_recipe(argv, *COMMON, arguments_class, description=__doc__)
    run_args, data_args, augmentation, model_args, teacher_args, args = parsed
    open_run(args, run_args, recipe_path(argv))
    pin_revisions(parsed)

    set_seed(args.seed)
    data = load_image_data(data_args)
    statistics = data.train.statistics()
    teacher = load_teacher(
        teacher_args, data.label_names, trainer_class.needs_logits, seed=args.seed, dataset_statistics=statistics
    )
    student, processor = build_student(model_args, data.label_names, data.image_size, *statistics)
    trainer = trainer_class(
        student,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        augmentation=augmentation,
        teacher_model=teacher,
    )
    run_training(trainer, data, recipe_path(argv), parsed)


if __name__ == "__main__":
    run_script(main)
