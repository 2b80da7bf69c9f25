"""Train an image classifier on labels: a CNN teacher, or a student without a teacher (the matched control).

accelerate launch scripts/train.py recipes/resnet18.json [--seed 1] [--num_train_epochs 30]
"""

from transformers import set_seed

from hf_ihb.access import pin_revisions
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.config.recipe import parse_recipe, recipe_path
from hf_ihb.config.run import RunArguments
from hf_ihb.data import open_image_data
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.run import open_run, run_script, run_training
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments

ARGUMENTS = (RunArguments, DataArguments, AugmentationArguments, ModelArguments, SupervisedTrainingArguments)


def main(argv: list[str]) -> None:
    """Recipe -> run folder."""
    parsed = parse_recipe(argv, *ARGUMENTS, description=__doc__)
    run_args, data_args, augmentation, model_args, args = parsed
    open_run(args, run_args, recipe_path(argv))
    pin_revisions(parsed)

    set_seed(args.seed)
    source = open_image_data(data_args)
    train = source.train
    model, processor = build_student(model_args, train.label_names, train.image_size, *train.statistics())
    data = source.decoded(pixel_format(processor).geometry)
    trainer = SupervisedTrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        augmentation=augmentation,
    )
    run_training(trainer, data, recipe_path(argv), parsed)


if __name__ == "__main__":
    run_script(main)
