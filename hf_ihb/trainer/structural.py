"""Distillation by the structure of features."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments

from hf_ihb.arguments import StructuralDistillationTrainingArguments
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.functional.augment import identity_affine
from hf_ihb.functional.tokens import resample_tokens
from hf_ihb.losses import TokenPair, structural_losses, warmup_factor
from hf_ihb.models.features import FeatureMap, extract_features
from hf_ihb.models.module import StudentModule, StudentOutput
from hf_ihb.trainer.distillation import DistillationTrainer, spread
from hf_ihb.views import Views


class StructuralDistillationTrainer(DistillationTrainer):
    """Distillation by the structure of features: CKA, Gram and token losses between chosen blocks.

    ``loss = w_task * CE + w_cka * (1 - CKA) + w_gram * Gram distance + w_token * (1 - cosine)``, each a mean over
    layers. Nothing trainable stands on the teacher's side; CKA and Gram use no projection at all. Every head that is
    averaged at inference is trained on the labels.

    Under the ``shared`` view the teacher sees the stored image and its tokens are resampled by the student's crop and
    flip; images that were mixed with another take no part in the structural losses then.
    """

    arguments_class = StructuralDistillationTrainingArguments

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        super()._module(student, args)
        self._teacher_layers = args.teacher_layers or args.student_layers
        students, teachers = self._probe(student, args)
        for layer, feature_map in zip(self._teacher_layers, teachers, strict=True):
            if feature_map.grid == (1, 1) and args.cka_scope == "tokens":
                raise RecipeError(f"key 'teacher_layers': expected several tokens, found one in block {layer}")
        self._grids = [m.grid for m in students]
        self._statistics: list[tuple[Tensor, Tensor]] | None = None
        projections = []
        if args.token_weight > 0:
            # a stream of its own: the student's initialisation must not depend on the losses that are on
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)
                projections = [
                    nn.Linear(s.tokens.shape[-1], t.tokens.shape[-1]) for s, t in zip(students, teachers, strict=True)
                ]
        return StudentModule(student, args.student_layers, projections)

    @torch.no_grad()
    def _probe(self, student: PreTrainedModel, args: TrainingArguments) -> tuple[list[FeatureMap], list[FeatureMap]]:
        """Feature maps of both models for one image: widths and grids, and whether the layers exist."""
        dataset, collate = self._probe_source
        if dataset is None:
            raise DataError("expected a train_dataset or eval_dataset to read the image size off, found none")
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        batch = collate([dataset[0]])
        device = next(student.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        pixel_values, _ = self._student_view(batch, train=False)
        training, _ = student.training, student.eval()
        try:
            _, students = extract_features(student, pixel_values, args.student_layers)
        except ValueError as error:
            raise RecipeError(f"key 'student_layers': {error}") from error
        finally:
            student.train(training)
        teacher_pixels = self._teacher_pixels(batch, None).to(self.teacher.model.device)
        return students, self.teacher.features(teacher_pixels, self._teacher_layers, args.teacher_norm)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `SupervisedTrainer.train`; takes the teacher's feature statistics first where a loss needs them."""
        if self.args.token_weight > 0 or self.args.center_positions:
            self._statistics = self._teacher_statistics()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _teacher_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the mean of each position ``(N, D)`` and the standard deviation of each channel ``(D,)``."""
        subset = spread(self.train_dataset, self.args.teacher_statistics_samples)
        loader = DataLoader(subset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        sums: list[list[Any]] = [[0, 0] for _ in self._teacher_layers]
        count = 0
        for inputs in tqdm(loader, desc="Teacher statistics", disable=self._quiet):
            inputs = self._prepare_inputs(inputs)
            # float64 on the CPU: not every accelerator has it, and this is done once
            tokens = [m.patch_tokens.cpu().double() for m in self._teacher_features(inputs, None)]
            sums = [[a + t.sum(0), b + t.square().sum(0)] for (a, b), t in zip(sums, tokens, strict=True)]
            count += len(tokens[0])
        statistics = []
        for first, second in sums:
            mean = first / count
            variance = (second / count - mean.square()).clamp_min(0).mean(dim=0)
            # a channel that never varies must not be divided by its rounding noise
            floor = 1e-6 * variance.max().sqrt().clamp_min(1e-12)
            std = variance.sqrt().clamp_min(floor)
            statistics.append((mean.float().to(self.args.device), std.float().to(self.args.device)))
        return statistics

    def _teacher_features(self, inputs: dict[str, Any], views: Views | None) -> list[FeatureMap]:
        pixels = self._teacher_pixels(inputs, views)
        with torch.no_grad(), self.accelerator.autocast():
            maps = self.teacher.features(pixels, self._teacher_layers, self.args.teacher_norm)
        return [m._replace(tokens=m.tokens.float()) for m in maps]

    def _pairs(self, outputs: StudentOutput, inputs: dict[str, Any], views: Views | None) -> list[TokenPair]:
        """Student and teacher tokens of each layer, looking at the same places."""
        affine = views.affine if views is not None and self.args.teacher_view == "shared" else None
        if affine is None:
            affine = identity_affine(len(outputs.logits), outputs.logits.device)
        pairs = []
        for layer, feature_map in enumerate(self._teacher_features(inputs, views)):
            tokens, grid, standardized = feature_map.patch_tokens, feature_map.grid, None
            if self._statistics is not None:
                mean, std = self._statistics[layer]
                centered, mask = resample_tokens(tokens - mean, grid, affine, self._grids[layer])
                standardized = centered / std
            if self.args.center_positions:
                tokens = centered
            else:
                tokens, mask = resample_tokens(tokens, grid, affine, self._grids[layer])
            projected = outputs.projected[layer] if outputs.projected is not None else None
            pairs.append(TokenPair(outputs.features[layer], tokens, mask, projected, standardized))
        return pairs

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        args = self.args
        task = self._task_loss(outputs.heads, outputs, targets, inputs)
        weight = torch.ones(len(targets), device=targets.device)
        if views is not None and args.teacher_view != "identical":
            weight = views.unmixed
        losses = structural_losses(
            self._pairs(outputs, inputs, views),
            weight,
            cka=args.cka_weight > 0,
            gram=args.gram_weight > 0,
            token=args.token_weight > 0,
            cka_scope=args.cka_scope,
            cka_estimator=args.cka_estimator,
            center=args.center_positions,
        )
        loss = args.task_loss_weight * task
        for name in ("cka", "gram", "token"):
            if f"{name}_loss" in losses:
                warmup = warmup_factor(
                    self._epoch, getattr(args, f"{name}_warmup_epochs"), args.distillation_warmup_type
                )
                # a zero weight multiplies, so that every parameter has a gradient
                loss = loss + getattr(args, f"{name}_weight") * warmup * losses[f"{name}_loss"]
        return loss, {"task_loss": task, **losses}
