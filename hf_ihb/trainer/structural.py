"""Distillation by the structure of features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from packaging import version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from hf_ihb.errors import DataError, RecipeError
from hf_ihb.functional.augment import identity_affine
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import pool_tokens, resampling_matrix, standardize_tokens
from hf_ihb.losses import StructuralLoss, TokenPair, warmup_factor
from hf_ihb.models.features import FeatureMap, extract_features, first_block
from hf_ihb.models.heads import PairedHeads
from hf_ihb.models.module import StudentModule, StudentOutput
from hf_ihb.teacher_cache import Kind, Layout, TeacherCache
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments
from hf_ihb.trainer.collectives import stack_over_processes, sum_over_processes
from hf_ihb.trainer.distillation import DistillationTrainer, spread
from hf_ihb.trainer.supervised import compiled
from hf_ihb.views import Views

logger = logging.get_logger(__name__)


class Resampler:
    """Brings the teacher's tokens to where the student's look; a matrix is made once for all layers of a grid.

    Args:
        affine: ``(B, 2, 3)``, from the student's to the teacher's coordinates; None where they are the same.
    """

    def __init__(self, affine: Tensor | None) -> None:
        self.affine = affine
        self._matrices: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Tensor, Tensor]] = {}

    def __call__(self, tokens: Tensor | TokenGram, grid: tuple[int, int], output_grid: tuple[int, int]) -> Any:
        """The tokens, and ``(B, M)`` bool, true where they lie inside the teacher's image."""
        first = tokens.centered if isinstance(tokens, TokenGram) else tokens
        if self.affine is None and grid == output_grid:
            return tokens, torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        if (grid, output_grid) not in self._matrices:
            affine = identity_affine(len(first), first.device) if self.affine is None else self.affine
            self._matrices[grid, output_grid] = resampling_matrix(affine, grid, output_grid)
        matrix, inside = self._matrices[grid, output_grid]
        return (tokens.resampled(matrix) if isinstance(tokens, TokenGram) else matrix @ tokens), inside


def structural_loss(args: StructuralDistillationTrainingArguments) -> Callable[..., dict[str, Tensor]]:
    """The losses of a run, over all of its processes, compiled where `torch_compile` asks for it and it is right.

    Before torch 2.14 a compiled collective is differentiated wrongly, without a sign: the losses are the same, the
    gradient of pooled CKA is 0, that of others off by a quarter. They are left as they are then.
    """
    if args.world_size == 1:
        return compiled(StructuralLoss.from_arguments(args).__call__, args)
    loss = StructuralLoss.from_arguments(args, reduce=sum_over_processes, gather=stack_over_processes)
    if not args.torch_compile or version.parse(torch.__version__).release >= (2, 14):
        return compiled(loss.__call__, args)
    logger.warning_once(
        f"torch {torch.__version__}: structural losses of several processes are not compiled, since their gradients "
        "would be wrong before torch 2.14"
    )
    return loss.__call__


class StructuralDistillationTrainer(DistillationTrainer):
    """Distillation by the structure of features: CKA, Gram, token and relation losses between chosen blocks.

    ``loss = w_task * CE + w_cka * (1 - CKA) + w_gram * Gram distance + w_token * (1 - cosine) + w_relation * KL``;
    CKA, Gram and token losses are means over layers. The relation loss compares how alike images are: the mean tokens
    of the student's last block after its final norm, and of the deepest of `teacher_layers` after the teacher's final
    norm (as it is where the teacher has none). What is a statistic of the batch is one of the batch of all processes.

    Nothing trainable stands on the teacher's side, CKA and Gram use no projection at all, and every head that is
    averaged at inference is trained on the labels, unless `teacher_projector` and `task_heads` ask for what the
    published study did.

    Under the ``shared`` view the teacher sees the stored image and its tokens are resampled by the student's crop and
    flip; images that were mixed with another take no part in the structural losses then.
    """

    arguments_class = StructuralDistillationTrainingArguments

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        super()._module(student, args)
        self._teacher_layers = args.teacher_layers or args.student_layers
        self._losses = [n for n in ("cka", "gram", "token", "relation") if getattr(args, f"{n}_weight") > 0]
        self._token_losses = [n for n in self._losses if n != "relation"]
        self._structural_loss = structural_loss(args)
        self._aligned = compiled(self._align, args)
        students, teachers, final = self._probe(student, args)
        for layer, feature_map in zip(self._teacher_layers, teachers, strict=True):
            if feature_map.grid == (1, 1) and args.cka_scope == "tokens":
                raise RecipeError(f"key 'teacher_layers': expected several tokens, found one in block {layer}")
        self._grids = [m.grid for m in students]
        answers = [(m, grid) for m, grid in zip(teachers, self._grids, strict=True)]
        if "relation" in self._losses:
            answers.append((teachers[self._teacher_layers.index(max(self._teacher_layers))], self._final_grid))
        pooled = [pool_tokens(m.patch_tokens, m.grid, grid) for m, grid in answers]
        self._teacher_grids = [grid for _, grid in pooled]
        self._teacher_shapes = tuple(tuple(tokens.shape[1:]) for tokens, _ in pooled)
        self._statistics: list[tuple[Tensor, Tensor]] | None = None
        widths = [[m.tokens.shape[-1] for m in maps] for maps in (students, teachers)]
        projections, paired_heads = [], None
        # a stream of its own: the student's initialisation must not depend on the losses that are on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            if args.teacher_projector == "trainable":
                paired_heads = PairedHeads(self._token_losses, *widths)
            elif "token" in self._losses:
                projections = [nn.Linear(s, t) for s, t in zip(*widths, strict=True)]
        return StudentModule(student, args.student_layers, projections, paired_heads, final)

    @torch.no_grad()
    def _probe(
        self, student: PreTrainedModel, args: TrainingArguments
    ) -> tuple[list[FeatureMap], list[FeatureMap], int | None]:
        """Feature maps of both models for one image: widths and grids, and whether the layers exist.

        The third is the student's last block, where the relation loss needs it.
        """
        dataset, collate = self._probe_source
        if dataset is None:
            raise DataError("expected a train_dataset or eval_dataset to read the image size off, found none")
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        batch = collate([dataset[0]])
        device = next(student.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        pixel_values, _ = self._student_view(batch, train=False)
        training, _ = student.training, student.eval()
        final = None
        try:
            outputs, students = extract_features(student, pixel_values, args.student_layers)
            if "relation" in self._losses:
                final = len(outputs.hidden_states) - first_block(student, len(outputs.hidden_states)) - 1
                self._final_grid = extract_features(student, pixel_values, [final])[1][0].grid
        except ValueError as error:
            raise RecipeError(f"key 'student_layers': {error}") from error
        finally:
            student.train(training)
        teacher_pixels = self._teacher_pixels(batch, None).to(self.teacher.model.device)
        return students, self.teacher.features(teacher_pixels, self._teacher_layers, args.teacher_norm), final

    def _take_statistics(self, cache: TeacherCache | None) -> None:
        self._statistics = None
        if all(self._preparation(name) == "plain" for name in self._token_losses):
            return
        found = self._teacher_statistics() if cache is None else cache.statistics(self._teacher_statistics)
        found = {name: tensor.to(self.args.device) for name, tensor in found.items()}
        layers = range(len(self._teacher_layers))
        self._statistics = [(found[f"mean.{layer}"], found[f"std.{layer}"]) for layer in layers]

    def _preparation(self, loss: str) -> str:
        """What is done to the teacher's tokens before a loss compares them."""
        if loss == "token":
            return "plain" if self.args.teacher_projector == "trainable" else "standardized"
        return "centered" if self.args.center_positions else "plain"

    @torch.no_grad()
    def _teacher_statistics(self) -> dict[str, Tensor]:
        """For each layer the mean of each position ``(N, D)``, pooled like the tokens, and the channels' deviations.

        The deviations ``(D,)`` are around the means of the teacher's own grid.
        """
        subset = spread(self.train_dataset, self.args.teacher_statistics_samples)
        loader = DataLoader(subset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        sums: list[list[Any]] = [[0, 0] for _ in self._teacher_layers]
        count = 0
        for inputs in tqdm(loader, desc="Teacher statistics", disable=self._quiet):
            inputs = self._prepare_inputs(inputs)
            maps = self._teacher_features(inputs, None)
            # float64 on the CPU: not every accelerator has it, and this is done once
            tokens = [m.patch_tokens.cpu().double() for m in maps]
            sums = [[a + t.sum(0), b + t.square().sum(0)] for (a, b), t in zip(sums, tokens, strict=True)]
            count += len(tokens[0])
        statistics = {}
        for layer, ((first, second), feature_map, grid) in enumerate(zip(sums, maps, self._grids, strict=True)):
            mean = first / count
            variance = (second / count - mean.square()).clamp_min(0).mean(dim=0)
            # a channel that never varies must not be divided by its rounding noise
            floor = 1e-6 * variance.max().sqrt().clamp_min(1e-12)
            statistics[f"mean.{layer}"] = pool_tokens(mean[None], feature_map.grid, grid)[0][0].float()
            statistics[f"std.{layer}"] = variance.sqrt().clamp_min(floor).float()
        return statistics

    def _teacher_features(self, inputs: dict[str, Any], views: Views | None) -> list[FeatureMap]:
        pixels = self._teacher_pixels(inputs, views)
        with torch.no_grad(), self.accelerator.autocast():
            maps = self.teacher.features(pixels, self._teacher_layers, self.args.teacher_norm)
        return [m._replace(tokens=m.tokens.float()) for m in maps]

    def _teacher_answer(self, inputs: dict[str, Any], views: Views | None) -> list[Tensor]:
        """Patch tokens of each layer, and last those of the relation loss, where there is one; pooled."""
        maps = self._teacher_features(inputs, views)
        answer = [pool_tokens(m.patch_tokens, m.grid, g)[0] for m, g in zip(maps, self._grids, strict=True)]
        if "relation" in self._losses:
            deepest = maps[self._teacher_layers.index(max(self._teacher_layers))]
            deepest = deepest if self.args.teacher_norm else self.teacher.normed(deepest)
            answer.append(pool_tokens(deepest.patch_tokens, deepest.grid, self._final_grid)[0])
        return answer

    def _prepared(self, answer: Sequence[Tensor], layer: int, preparation: str) -> Tensor:
        tokens = answer[layer]
        if preparation == "plain":
            return tokens
        mean, std = self._statistics[layer]
        return tokens - mean if preparation == "centered" else standardize_tokens(tokens, mean, std)

    def _teacher_tokens(self, inputs: dict[str, Any], views: Views | None) -> dict[str, list[tuple[Any, Tensor]]]:
        """For each loss and layer the teacher's tokens where the student's look, and which lie inside its image.

        From a cache of inner products it is their `TokenGram`.
        """
        answer = self._cached_answer(inputs, views)
        if answer is None:
            answer = self._teacher_answer(inputs, views)
        shared = views is not None and self.args.teacher_view == "shared"
        return self._aligned(answer, views.affine if shared else None)

    def _align(self, answer: Sequence[Any], affine: Tensor | None) -> dict[str, list[tuple[Any, Tensor]]]:
        move = Resampler(affine)

        def moved(layer: int, preparation: str) -> tuple[Any, Tensor]:
            ready = isinstance(answer[layer], TokenGram)  # prepared before its inner products were taken
            tokens = answer[layer] if ready else self._prepared(answer, layer, preparation)
            return move(tokens, self._teacher_grids[layer], self._grids[layer])

        preparations = {self._preparation(name) for name in self._token_losses}
        ready = {p: [moved(layer, p) for layer in range(len(self._teacher_layers))] for p in preparations}
        tokens = {name: ready[self._preparation(name)] for name in self._token_losses}
        if "relation" in self._losses:
            tokens["relation"] = [move(answer[-1], self._teacher_grids[-1], self._final_grid)]
        return tokens

    # ---- The cache ----

    def _smallest_cache(self) -> Kind:
        return "gram" if self.args.needs_teacher_tokens() is None else "tokens"

    def _cache_reason(self, kind: Kind) -> str:
        if kind == "gram":
            return "inner products of an image's tokens are all that the losses need"
        return f"'{self.args.needs_teacher_tokens()}' needs the tokens themselves"

    def _cache_layout(self, kind: Kind) -> Layout:
        return Layout(kind, self._teacher_shapes)

    def _cache_description(self, kind: Kind) -> dict[str, Any]:
        args = self.args
        preparation = self._gram_preparation if kind == "gram" else "plain"
        taken = any(self._preparation(name) != "plain" for name in self._token_losses)
        return {
            "layers": self._teacher_layers,
            "norm": args.teacher_norm,
            "losses": {"relation": "relation" in self._losses},
            "grids": self._teacher_grids,
            "preparation": preparation,
            "statistics_samples": args.teacher_statistics_samples if taken else None,
        }

    @property
    def _gram_preparation(self) -> str:
        return "centered" if self.args.center_positions else "plain"

    def _storable(self, answer: list[Tensor], kind: Kind) -> list[Tensor]:
        if kind == "gram":
            return [self._prepared(answer, layer, self._gram_preparation) for layer in range(len(answer))]
        return answer

    def _forward_arguments(self, inputs: dict[str, Any], views: Views | None, train: bool) -> dict[str, Any]:
        if not train:
            return {}
        # asked once a step: heads on the teacher's side are a part of the module and need the answer before the losses
        self._answer = self._teacher_tokens(inputs, views)
        if self.args.teacher_projector == "none":
            return {}
        return {"teacher_tokens": {name: [t for t, _ in self._answer[name]] for name in self._token_losses}}

    def _pairs(self, outputs: StudentOutput) -> dict[str, list[TokenPair]]:
        """Student and teacher tokens as each loss compares them, looking at the same places."""
        pairs = {}
        for name, answers in self._answer.items():
            if outputs.paired is not None and name in outputs.paired:
                sides = zip(outputs.paired[name], answers, strict=True)
                pairs[name] = [TokenPair(student, teacher, mask) for (student, teacher), (_, mask) in sides]
                continue
            own = {"token": outputs.projected, "relation": (outputs.final_tokens,)}.get(name, outputs.features)
            pairs[name] = [TokenPair(student, *answer) for student, answer in zip(own, answers, strict=True)]
        return pairs

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        args, heads = self.args, outputs.heads
        if args.task_heads == "cls" and outputs.cls_logits is not None:
            heads = (outputs.cls_logits,)
        task = self._task_loss(heads, outputs, targets, inputs)
        loss = args.task_loss_weight * task
        weight = torch.ones(len(targets), device=targets.device)
        if views is not None and args.teacher_view != "identical":
            weight = views.unmixed
        losses = self._structural_loss(self._pairs(outputs), weight)
        for name in self._losses:
            warmup = warmup_factor(self._epoch, getattr(args, f"{name}_warmup_epochs"), args.distillation_warmup_type)
            # a zero weight multiplies, so that every parameter has a gradient
            loss = loss + getattr(args, f"{name}_weight") * warmup * losses[f"{name}_loss"]
        return loss, {"task_loss": task, **losses}
