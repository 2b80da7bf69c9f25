"""The YAML header of a card: what the Hub files a model under, and its results as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from huggingface_hub import EvalResult, ModelCardData

from hf_ihb.analysis import analyses_in
from hf_ihb.config.names import LOCAL_PREFIX
from hf_ihb.errors import DataError
from hf_ihb.markdown import is_number
from hf_ihb.model_card.files import RunFiles, is_hub_id

TASK = "image-classification"


class CardOptions(TypedDict, total=False):
    """What a card says beside what the files of the run folder say.

    Attributes:
        repo_id: Where the model is on the Hub; without it, the usage example loads it by the folder's name.
        license: The Hub's identifier, in place of the recipe's.
        tags: Beside those that the files give.
        model_name: Title, in place of the repo's or the folder's name.
        base_model: Hub id of the weights that training started from, in place of the recipe's.
        datasets: Hub ids of data sets, beside the recipe's.
        language: Of the card, by the Hub's identifier.
    """

    repo_id: str | None
    license: str | None
    tags: Sequence[str]
    model_name: str | None
    base_model: str | None
    datasets: Sequence[str]
    language: str | None


def card_data(
    run: RunFiles,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    model_name: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: str | None = None,
) -> ModelCardData:
    """The header of a run's card.

    Args:
        run: What its files say.
        repo_id: See `CardOptions`, and so for the others.
        license: See there.
        tags: See there.
        model_name: See there.
        base_model: See there.
        datasets: See there.
        language: See there.

    Returns:
        With one model-index entry where there are results: the accuracy of the head that the model answers with, and
        the mean attention distance of each layer, in patches; floats as they stand in the JSON files.

    Raises:
        DataError: If an option is not the Hub id it should be.
    """
    if wrong := [name for name in (base_model, *datasets) if name is not None and not is_hub_id(name)]:
        raise DataError(f"model card: expected Hub ids as base_model and datasets, found '{wrong[0]}'")
    started_from = run.keys["model_name_or_path"]
    base_model = base_model or (started_from if started_from and is_hub_id(started_from) else None)
    trained_on = [run.dataset["name"]] if run.dataset["revision"] is not None else []
    results = _results(run)
    content = {
        "language": language,
        "license": license or run.keys["license"],
        "library_name": "hf_ihb" if run.needs_us else "transformers",
        "pipeline_tag": TASK,
        "tags": [*_tags(run), *tags],
        "datasets": list(dict.fromkeys([*trained_on, *datasets])),
        "metrics": ["accuracy"],
        "base_model": base_model,
        "base_model_relation": base_model and "finetune",
        "teacher_model": _of_teachers(run, "name"),
        "teacher_revision": _of_teachers(run, "revision"),
        "eval_results": results,
        "model_name": results and title_of(run, repo_id=repo_id, model_name=model_name),
    }
    return ModelCardData(**{name: value or None for name, value in content.items()})  # an empty list is nothing either


def title_of(run: RunFiles, *, repo_id: str | None = None, model_name: str | None = None, **_: Any) -> str:
    """What the model is called."""
    return model_name or (run.name if repo_id is None else repo_id.rpartition("/")[2])


def _of_teachers(run: RunFiles, name: str) -> Any:
    """What the record of the teacher says, or the list of what those of several do."""
    values = [taught.teacher[name] for taught in run.taught]
    return values if len(values) > 1 and any(value is not None for value in values) else next(iter(values), None)


def _tags(run: RunFiles) -> list[str]:
    taught = [] if run.teacher is None else ["distillation", "knowledge-distillation"]
    return [TASK, "hf_ihb", *taught, *["custom_code"] * run.is_custom_code]


def answering_accuracy(run: RunFiles) -> tuple[float, dict[str, Any]] | None:
    """Accuracy of the head that the model answers with, and name, revision and split of the data it is of."""
    if run.metrics is not None:
        return next(iter(run.metrics["heads"].values()))["accuracy"], run.metrics["data"]
    if run.evaluation is not None:
        test = run.evaluation["test"]
        return test["accuracy"], run.dataset | {"split": "test", "num_images": test["num_images"]}
    return None


def _results(run: RunFiles) -> list[EvalResult]:
    found = []
    if (answer := answering_accuracy(run)) is not None and is_number(answer[0]):
        accuracy, data = answer
        found.append(_result(run, data, metric_type="accuracy", metric_value=float(accuracy), metric_name="Accuracy"))
    for analysis in analyses_in(run.analysis):
        metrics = analysis.card_metrics(run.analysis[analysis.name])
        found += [_result(run, run.analysis["data"], **metric) for metric in metrics]
    return found


def _result(run: RunFiles, data: Mapping[str, Any], **metric: Any) -> EvalResult:
    is_own = data["name"] == run.dataset["name"]
    return EvalResult(
        task_type=TASK,
        task_name="Image Classification",
        dataset_type=data["name"],
        dataset_name=data["name"].removeprefix(LOCAL_PREFIX).rpartition("/")[2],
        dataset_config=run.keys["dataset_config_name"] if is_own else None,
        dataset_split=data["split"],
        dataset_revision=data["revision"],
        **metric,
    )
