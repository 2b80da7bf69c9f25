"""See what a model's attention, layers and loss surface look like, beside an untrained twin and other models.

python scripts/analyze.py outputs/cka [--teacher_model facebook/dinov2-small] [--metrics attention,cka,hessian]
python scripts/analyze.py --compare outputs/ce_only outputs/cka outputs/gram [--output_dir outputs/comparison]

Writes analysis.json and plots/ into the model's folder (a model of the Hub: outputs/<name>; or --output_dir). Comparing
writes comparison.json and plots/ into --output_dir alone, and reads what the models' folders hold where it fits. The
data set is that of the recipe beside the (first) model, unless it is given.
"""

from typing import Any

from hf_ihb.analysis import AnalysisArguments, analysis_table, analyze, draw_analyses
from hf_ihb.config.data import DataArguments
from hf_ihb.config.recipe import parse_models
from hf_ihb.data import load_image_split
from hf_ihb.models.pretrained import Pretrained, data_defaults, load_pretrained
from hf_ihb.run import run_script
from hf_ihb.runs.environment import default_device
from hf_ihb.runs.files import write_json
from hf_ihb.runs.folder import ANALYSIS_FILE, COMPARISON_FILE, PLOTS_FOLDER, distinct_names, output_folder, read_record


def main(argv: list[str]) -> None:
    """Model(s) -> JSON and plots."""
    model, data_args, args = parse_models(
        argv, DataArguments, AnalysisArguments, defaults=data_defaults, description=__doc__
    )
    names = [model, *args.compare] if model else args.compare
    output_dir = (args.output_dir or "outputs/comparison") if args.compare else args.output_dir
    folder = output_folder(output_dir, names[0])
    file = folder / (COMPARISON_FILE if args.compare else ANALYSIS_FILE)
    subjects = {
        short: load_pretrained(name, args.model_revision if name == model else None, needs_logits=None)
        for name, short in zip(names, distinct_names(names), strict=True)
    }
    teacher = _teacher(args)
    device = default_device(args.device)
    split, revision = load_image_split(data_args, args.split, next(iter(subjects.values())).pixels.geometry)
    data = {"name": data_args.dataset_name, "revision": revision}

    folder.mkdir(parents=True, exist_ok=True)
    found = read_record(file) if file.is_file() else {}
    analyses: dict[str, Any] = {}
    for short, subject in subjects.items():

        def keep(result: dict[str, Any], short: str = short) -> None:
            analyses[short] = result
            write_json(file, analyses if args.compare else result)

        own = output_folder(None, subject.name) / ANALYSIS_FILE
        earlier = (read_record(own) if own.is_file() else found.get(short)) if args.compare else found
        teacher = teacher and teacher.to(device)
        keep(analyze(subject.to(device), split, args, data=data, teacher=teacher, previous=earlier, keep=keep))
    draw_analyses(read_record(file) if args.compare else {short: read_record(file)}, folder / PLOTS_FOLDER)
    print(analysis_table(analyses))
    print(f"numbers and plots are in {folder}")


def _teacher(args: AnalysisArguments) -> Pretrained | None:
    if args.teacher_model is None:
        return None
    teacher = load_pretrained(args.teacher_model, args.teacher_revision, needs_logits=None, role="teacher")
    if args.teacher_image_size is None:
        return teacher
    return teacher._replace(pixels=teacher.pixels.whole((args.teacher_image_size,) * 2))


if __name__ == "__main__":
    run_script(main)
