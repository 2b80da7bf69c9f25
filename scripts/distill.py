"""Distil a student from a frozen teacher, or several, by any set of methods.

accelerate launch scripts/distill.py recipes/cka.json [--seed 1] [--num_train_epochs 30]
"""

from transformers import set_seed

from hf_ihb.access import pin_revisions
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.recipe import parse_recipe, recipe_path
from hf_ihb.config.run import RunArguments
from hf_ihb.config.teachers import teachers_of
from hf_ihb.data import open_image_data
from hf_ihb.methods import methods_of
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import load_teacher
from hf_ihb.run import open_run, run_script, run_training
from hf_ihb.trainer import DistillationTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments

COMMON = (RunArguments, DataArguments, AugmentationArguments, ModelArguments, TeacherArguments)


def main(argv: list[str]) -> None:
    """Recipe -> run folder."""
    parsed = parse_recipe(argv, *COMMON, DistillationTrainingArguments, description=__doc__)
    run_args, data_args, augmentation, model_args, teacher_args, args = parsed
    open_run(args, run_args, recipe_path(argv))
    teachers = teachers_of(teacher_args, args.teacher_models)
    pin_revisions(parsed if args.teacher_models is None else [*parsed, *teachers])
    args.pin_teachers(teachers)

    set_seed(args.seed)
    source = open_image_data(data_args)
    train, statistics = source.train, source.train.statistics()
    loaded = [
        load_teacher(
            teacher,
            train.label_names,
            any(method.needs.logits for method in methods_of(own)),
            seed=args.seed,
            dataset_statistics=statistics,
        )
        for teacher, own in zip(teachers, args.of_each_teacher(), strict=True)
    ]
    student, processor = build_student(model_args, train.label_names, train.image_size, *statistics)
    data = source.decoded(pixel_format(processor).geometry)
    trainer = DistillationTrainer(
        student,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        augmentation=augmentation,
        teacher_model=loaded,
    )
    run_training(trainer, data, recipe_path(argv), parsed)


if __name__ == "__main__":
    run_script(main)
