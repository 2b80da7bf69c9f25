"""See what a model's attention, layers and loss surface look like, beside an untrained twin and other models.

python scripts/analyze.py outputs/cka [--teacher_model facebook/dinov2-small] [--metrics attention,cka,hessian]
python scripts/analyze.py --compare outputs/ce_only outputs/cka outputs/gram [--output_dir outputs/comparison]

Writes analysis.json and plots/ into the model's folder (a model of the Hub: outputs/<name>; or --output_dir). The data
set is that of the recipe beside the (first) model, unless it is given.
"""

from typing import Any

from hf_ihb.analysis import analysis_table, analyze
from hf_ihb.arguments import AnalysisArguments, DataArguments
from hf_ihb.data import load_image_split
from hf_ihb.models.pretrained import Pretrained, data_defaults, load_pretrained
from hf_ihb.plots import draw_analyses
from hf_ihb.recipe import parse_models
from hf_ihb.records import ANALYSIS_FILE, default_device, distinct_names, output_folder, read_json, write_json
from hf_ihb.run import run_script


def main(argv: list[str]) -> None:
    """Model(s) -> analysis.json and plots."""
    model, data_args, args = parse_models(
        argv, DataArguments, AnalysisArguments, defaults=data_defaults, description=__doc__
    )
    names = [model, *args.compare] if model else args.compare
    together = output_folder(args.output_dir or "outputs/comparison", "")
    subjects, folders = {}, {}
    for name, short in zip(names, distinct_names(names), strict=True):
        folders[short] = output_folder(None if args.compare else args.output_dir, name)
        revision = args.model_revision if name == model else None
        subjects[short] = load_pretrained(name, revision, needs_logits=None)
    teacher = _teacher(args)
    device = default_device(args.device)
    split, revision = load_image_split(data_args, args.split)
    data = {"name": data_args.dataset_name, "revision": revision}

    analyses: dict[str, Any] = {}
    for short, subject in subjects.items():
        folder, path = folders[short], folders[short] / ANALYSIS_FILE
        folder.mkdir(parents=True, exist_ok=True)
        analyses[short] = analyze(
            subject.to(device),
            split,
            args,
            data=data,
            teacher=teacher and teacher.to(device),
            previous=read_json(path) if path.is_file() else None,
            keep=lambda result, path=path: write_json(path, result),
        )
        draw_analyses({short: read_json(path)}, folder / "plots")
    print(analysis_table(analyses))
    if args.compare:
        folder = together
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", analyses)
        draw_analyses(read_json(folder / "comparison.json"), folder / "plots")
    print(f"numbers and plots are in {folder}")


def _teacher(args: AnalysisArguments) -> Pretrained | None:
    if args.teacher_model is None:
        return None
    teacher = load_pretrained(args.teacher_model, args.teacher_revision, needs_logits=None, role="teacher")
    if args.teacher_image_size is None:
        return teacher
    return teacher._replace(pixels=teacher.pixels._replace(size=(args.teacher_image_size,) * 2))


if __name__ == "__main__":
    run_script(main)
