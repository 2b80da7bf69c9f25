"""Evaluate a classifier on a split of a data set: every head, and what it has of a teacher and over a baseline.

python scripts/evaluate_model.py outputs/cka [--teacher_model T --baseline_model B] [--split test] [--batch_size 256]

MODEL is the folder of a run or of any image classifier, or a Hub id. Where recipe.json lies beside it, the data set is
the recipe's unless the command line says otherwise. Prints a table; writes metrics.json and plots/confusion_matrix.png.
"""

from dataclasses import fields

from hf_ihb.config.data import DataArguments
from hf_ihb.config.measure import EvaluationArguments
from hf_ihb.config.model import TeacherArguments
from hf_ihb.config.recipe import parse_models
from hf_ihb.data import load_image_split
from hf_ihb.evaluation import evaluate_model, metrics_table
from hf_ihb.models.pretrained import data_defaults, load_pretrained
from hf_ihb.models.teacher import Teacher, load_teacher
from hf_ihb.plots import confusion_matrix_plot
from hf_ihb.run import run_script
from hf_ihb.runs.files import write_json
from hf_ihb.runs.folder import METRICS_FILE, PLOTS_FOLDER, output_folder


def teacher_of(args: EvaluationArguments, label_names: list[str]) -> Teacher | None:
    """The teacher of the command line."""
    if args.teacher_model is None:
        return None
    names = {field.name for field in fields(TeacherArguments)} & {field.name for field in fields(args)}
    return load_teacher(TeacherArguments(**{name: getattr(args, name) for name in names}), label_names, True)


def main(argv: list[str]) -> None:
    """Model -> metrics.json, a plot and a table."""
    name, data_args, args = parse_models(
        argv, DataArguments, EvaluationArguments, defaults=data_defaults, description=__doc__
    )
    folder = output_folder(args.output_dir, name)
    model = load_pretrained(name, args.model_revision)
    split, revision = load_image_split(data_args, args.split, model.pixels.geometry)
    results = evaluate_model(
        model,
        split,
        teacher=teacher_of(args, split.label_names),
        baseline=args.baseline_model and load_pretrained(args.baseline_model, role="baseline"),
        batch_size=args.batch_size,
        device=args.device,
        data={"name": data_args.dataset_name, "revision": revision, "split": args.split},
    )
    (folder / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / METRICS_FILE, results)
    confusion = next(iter(results["heads"].values()))["confusion_matrix"]
    confusion_matrix_plot(confusion, split.label_names, folder / PLOTS_FOLDER / "confusion_matrix.png")
    print(metrics_table(results))
    print(f"\n{len(split):,} images ({args.split}) of {data_args.dataset_name}; results are in {folder}")


if __name__ == "__main__":
    run_script(main)
