"""A model -> its analyses, one after the other, keeping what is true already."""

import time
from collections.abc import Callable
from typing import Any

from hf_ihb.analysis.arguments import AnalysisArguments
from hf_ihb.analysis.registry import ANALYSES, analyses_in
from hf_ihb.data import StoredSplit, stratified_sample
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.runs.environment import environment


def analyze(
    subject: Pretrained,
    split: StoredSplit,
    args: AnalysisArguments,
    *,
    data: dict[str, Any],
    teacher: Pretrained | None = None,
    previous: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda analysis: None,
) -> dict[str, Any]:
    """Makes every analysis that `args` names.

    Args:
        subject: The model, on the device to work on.
        split: Images to take `max_images` of.
        args: What is measured, and how.
        data: ``name`` and ``revision`` of the data set.
        teacher: A second model, on the same device, for what compares the two.
        previous: An earlier result. Where it is of the same weights and images, its parts stand as they are: those that
            are not asked for, and with `compare` those that are, if their settings are the same too.
        keep: Called with all there is after each analysis, and before an error leaves; the place to write a file.

    Returns:
        ``model``, ``teacher``, ``data``, ``settings``, ``environment``, ``seconds``, and a section for each of
        `ANALYSES`, by its name, as far as it was asked for or stands: dictionaries of plain numbers. The environment is
        that of what was made last.

    Raises:
        ModelLoadError: If an analysis does not apply to the model, such as attention to a CNN.
        DataError: If the images are too few to hold every class, or `previous` holds an analysis that there is none of.
        NumericsError: If a loss or a product with its Hessian is not finite.
    """
    rows = stratified_sample(split, args.max_images, args.analysis_seed, f"key 'max_images', {args.split}")
    result: dict[str, Any] = {
        "model": subject.summary(),
        "teacher": None if teacher is None else teacher.summary(),
        "data": {**data, "split": args.split, "num_images": len(rows), "seed": args.analysis_seed}
        | {"indices": rows.tolist()},
        "settings": {
            part: {name: getattr(args, name) for name in ANALYSES[part].deciding_settings()} for part in args.analyses
        },
        "environment": environment(subject.model.device),
        "seconds": {},
    }
    standing = _standing(previous or {}, result, args)
    for part in standing:
        for section in ("settings", "seconds"):
            result[section][part] = previous[section][part]
        result[part] = previous[part]
    if any(ANALYSES[part].compares_teacher for part in standing):
        result["teacher"] = previous["teacher"]
    is_whole = standing == set(ANALYSES) & set(previous or {}) and "failed" not in (previous or {})
    if is_whole and standing >= set(args.analyses):
        return previous  # with the environment that it was made in
    for name in (name for name in args.analyses if name not in standing):
        start = time.perf_counter()
        try:
            result[name] = ANALYSES[name].of(args).compute(subject, split, rows, args, teacher)
        except Exception as error:
            result["failed"] = {name: " ".join(str(error).split())}
            keep(result)
            raise
        result["seconds"][name] = round(time.perf_counter() - start, 2)
        keep(result)
    return result


def _standing(previous: dict[str, Any], wanted: dict[str, Any], args: AnalysisArguments) -> set[str]:
    """Parts of an earlier result that are still true and are not to be made again."""

    def digest(result: dict[str, Any], role: str) -> str | None:
        return (result.get(role) or {}).get("weights_sha256")

    if digest(previous, "model") != digest(wanted, "model") or previous.get("data") != wanted["data"]:
        return set()
    analyses_in(previous)  # refuses what it does not know, and would drop
    made = {part for part in ANALYSES if all(part in previous.get(s, {}) for s in ("settings", "seconds"))}
    kept = made - set(args.analyses)
    if args.compare:
        kept |= {part for part in made if previous["settings"][part] == wanted["settings"].get(part)}
    # what is of two models: another teacher ends it, none leaves it alone unless it is asked for
    before, now = digest(previous, "teacher"), digest(wanted, "teacher")
    if before != now:
        kept -= {p for p in kept if ANALYSES[p].compares_teacher and (now is not None or p in args.analyses)}
    return kept
