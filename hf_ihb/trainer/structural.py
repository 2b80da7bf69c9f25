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
from hf_ihb.functional.tokens import resample_tokens, standardize_tokens
from hf_ihb.losses import StructuralLoss, TokenPair, warmup_factor
from hf_ihb.models.features import FeatureMap, extract_features, first_block
from hf_ihb.models.heads import PairedHeads
from hf_ihb.models.module import StudentModule, StudentOutput
from hf_ihb.trainer.collectives import stack_over_processes, sum_over_processes
from hf_ihb.trainer.distillation import DistillationTrainer, spread
from hf_ihb.views import Views


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
        shared = {"reduce": sum_over_processes, "gather": stack_over_processes} if args.world_size > 1 else {}
        self._structural_loss = StructuralLoss.from_arguments(args, **shared)
        students, teachers, final = self._probe(student, args)
        for layer, feature_map in zip(self._teacher_layers, teachers, strict=True):
            if feature_map.grid == (1, 1) and args.cka_scope == "tokens":
                raise RecipeError(f"key 'teacher_layers': expected several tokens, found one in block {layer}")
        self._grids = [m.grid for m in students]
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `SupervisedTrainer.train`; takes the teacher's feature statistics first where a loss needs them."""
        if any(self._preparation(name) != "plain" for name in self._token_losses):
            self._statistics = self._teacher_statistics()
        return super().train(*args, **kwargs)

    def _preparation(self, loss: str) -> str:
        """What is done to the teacher's tokens before a loss compares them."""
        if loss == "token":
            return "plain" if self.args.teacher_projector == "trainable" else "standardized"
        return "centered" if self.args.center_positions else "plain"

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

    def _teacher_tokens(self, inputs: dict[str, Any], views: Views | None) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """For each loss and layer the teacher's tokens where the student's look, and which lie inside its image."""
        maps = self._teacher_features(inputs, views)
        affine = views.affine if views is not None and self.args.teacher_view == "shared" else None
        if affine is None:
            affine = identity_affine(len(maps[0].tokens), maps[0].tokens.device)

        def prepared(layer: int, preparation: str) -> Tensor:
            tokens = maps[layer].patch_tokens
            if preparation == "plain":
                return tokens
            mean, std = self._statistics[layer]
            return tokens - mean if preparation == "centered" else standardize_tokens(tokens, mean, std)

        resampled = {
            preparation: [
                resample_tokens(prepared(layer, preparation), feature_map.grid, affine, self._grids[layer])
                for layer, feature_map in enumerate(maps)
            ]
            for preparation in {self._preparation(name) for name in self._token_losses}
        }
        tokens = {name: resampled[self._preparation(name)] for name in self._token_losses}
        if "relation" in self._losses:
            deepest = maps[self._teacher_layers.index(max(self._teacher_layers))]
            deepest = deepest if self.args.teacher_norm else self.teacher.normed(deepest)
            tokens["relation"] = [resample_tokens(deepest.patch_tokens, deepest.grid, affine, self._final_grid)]
        return tokens

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
