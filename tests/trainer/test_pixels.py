"""What student and teacher are shown of stored images, and of a user's own: their image processors' own steps."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import DeiTImageProcessor, Dinov2Config, Dinov2ForImageClassification, ViTImageProcessor

from hf_ihb.data import ImageSplit
from hf_ihb.errors import DataError, ModelLoadError, TeacherMismatchError
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments
from hf_ihb.trainer.publishing import resolved_recipe

SIDE = {"height": 16, "width": 16}
PADS = {"do_pad": True, "pad_size": {"height": 20, "width": 20}}
LABELS = ["red", "green", "blue", "dark"]


def crops():
    return DeiTImageProcessor(size={"height": 24, "width": 24}, crop_size=SIDE)


def pictures(images):
    return [Image.fromarray(np.array(image.permute(1, 2, 0))) for image in images]


class Floats(Dataset):
    """A user's own images, normalised."""

    def __init__(self, count=16, **more):
        self.count, self.more = count, more

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 4, **self.more}


@pytest.fixture
def stored():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, 20, 28), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(24) % 4, LABELS)


def test_stored_images_are_evaluated_through_the_processors_own_steps(make_student, make_args, stored, tmp_path):
    processor = crops()
    trainer = SupervisedTrainer(
        make_student("vit"), make_args(SupervisedTrainingArguments), eval_dataset=stored, processing_class=processor
    )
    expected = processor(pictures(stored.images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = trainer.student.eval()(pixel_values=expected).logits
    torch.testing.assert_close(torch.from_numpy(trainer.predict(stored).predictions), logits, rtol=1e-4, atol=1e-5)
    trainer.save_model(str(tmp_path))
    assert pixel_format(DeiTImageProcessor.from_pretrained(tmp_path)) == pixel_format(processor)


def test_images_that_are_trained_on_are_whole(make_student, make_args, stored):
    trainer = SupervisedTrainer(
        make_student("vit"), make_args(SupervisedTrainingArguments), train_dataset=stored, processing_class=crops()
    )
    batch = stored.__getitems__(range(24))
    shown = trainer.prepare(batch, train=True).pixel_values
    torch.testing.assert_close(shown, pixel_format(crops()).whole().apply(stored.images))
    assert not torch.allclose(shown, trainer.prepare(batch, train=False).pixel_values, atol=0.1)


def test_stored_images_are_refused_where_the_processor_cannot_be_followed(make_student, make_args, stored):
    args, processor = make_args(SupervisedTrainingArguments), ViTImageProcessor(size=SIDE, **PADS)
    for given in ({"train_dataset": stored}, {"eval_dataset": stored}, {"eval_dataset": {"a": stored}}):
        with pytest.raises(ModelLoadError, match=r"ViTImageProcessor: expected steps that .* found 'do_pad'"):
            SupervisedTrainer(make_student("vit"), args, processing_class=processor, **given)
    with pytest.raises(ModelLoadError, match=r"expected images of 16 x 16 px, .* found 224 x 224 px"):
        SupervisedTrainer(make_student("vit"), args, train_dataset=stored, processing_class=ViTImageProcessor())
    with pytest.raises(DataError, match="expected a 'processing_class'"):
        SupervisedTrainer(make_student("vit"), args, train_dataset=stored)
    trainer = SupervisedTrainer(make_student("vit"), args, train_dataset=Floats(64), processing_class=processor)
    assert trainer.train().global_step == args.max_steps  # normalised pixels need nothing of it


# ---- Teachers ----


def classifier(size=16):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    return Dinov2ForImageClassification(Dinov2Config(image_size=size, **shape, **labels))


@pytest.fixture
def make(make_student, make_args, processor):
    def make(dataset, teacher_processor=None, teacher=None, **overrides):
        keys = {"teacher_cache": "off", "teacher_logits_view": "clean", "per_device_train_batch_size": 8}
        return DistillationTrainer(
            make_student("vit"),
            make_args(DistillationTrainingArguments, **(keys | overrides)),
            train_dataset=dataset,
            processing_class=processor,
            teacher_model=teacher or classifier(),
            teacher_processor=teacher_processor,
        )

    return make


def shown_to_the_teacher(trainer, inputs, monkeypatch):
    seen, forward = [], trainer.teacher.model.forward

    def record(*args, **kwargs):
        seen.append(kwargs["pixel_values"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.teacher.model, "forward", record)
    trainer.prepare(inputs, train=True)
    return seen


LOGITS, FEATURES = {"alpha": 0.5}, {"cka_weight": 1.0, "student_layers": [0, 1], "teacher_layers": [0, 1]}


@pytest.mark.parametrize("methods", [LOGITS, FEATURES, LOGITS | FEATURES], ids=["logits", "features", "both"])
def test_a_teacher_of_scores_sees_a_crop_and_one_of_features_whole_images(methods, make, stored, monkeypatch, capsys):
    trainer = make(stored, crops(), **methods)
    trainer.prepare_teacher()
    (seen,) = shown_to_the_teacher(trainer, stored.__getitems__(range(8)), monkeypatch)
    cropped = crops()(pictures(stored.images[:8]), return_tensors="pt")["pixel_values"]
    whole = pixel_format(crops()).whole().apply(stored.images[:8])
    is_whole = "cka_weight" in methods
    torch.testing.assert_close(seen, whole if is_whole else cropped, rtol=0, atol=1e-5)
    said = "shown whole images, brought to 16 x 16 px without the crop of its image processor"
    assert (said in capsys.readouterr().out) == is_whole
    record = resolved_recipe(trainer, (trainer.args,), dataset={})["teacher"]
    assert record.get("crop_left_out", False) == is_whole


def test_pixels_that_are_made_otherwise_are_in_another_cache(make, stored, tmp_path):
    teacher = classifier()
    whole = DeiTImageProcessor(size=SIDE, do_center_crop=False)
    named = {}
    for name, chosen, methods in (
        ("crop", crops(), LOGITS),
        ("whole", whole, LOGITS),
        ("crop, features", crops(), FEATURES),
        ("bilinear", DeiTImageProcessor(size=SIDE, do_center_crop=False, resample=2), LOGITS),
    ):
        cache = {"teacher_cache": "auto" if methods is FEATURES else "logits", "teacher_cache_dir": str(tmp_path)}
        trainer = make(stored, chosen, teacher, **methods, **cache, num_train_epochs=9, max_steps=-1)
        trainer.prepare_teacher()
        named[name] = trainer.teacher_cache.key
    assert len(set(named.values())) == len(named)


def test_normalised_images_of_the_student_are_no_teachers(make, processor):
    """A teacher of another size, or of other means, would learn nothing of it."""
    for chosen in (crops(), ViTImageProcessor(size={"height": 32, "width": 32})):
        trainer = make(Floats(), chosen, **LOGITS)
        with pytest.raises(TeacherMismatchError, match="expected 'teacher_pixel_values' beside them"):
            trainer.train()
    own = make(Floats(teacher_pixel_values=torch.zeros(3, 16, 16)), crops(), **LOGITS)
    inputs = own.data_collator([own.train_dataset[i] for i in range(4)])
    assert own.prepare(inputs, train=True).teacher.logits.shape == (4, 4)
    for chosen in (processor, None):  # the student's own, or one that nobody has named
        trainer = make(Floats(), chosen, **LOGITS)
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        expected = trainer.teacher.logits(inputs["pixel_values"])
        assert torch.equal(trainer.prepare(inputs, train=True).teacher.logits, expected)


def test_a_teacher_that_resizes_nothing_has_no_crop_to_leave_out(make, stored):
    teacher = Teacher(classifier(), pixel_format(ViTImageProcessor(do_resize=False)), LABELS)
    assert not make(stored, teacher=teacher, **FEATURES).teacher_side.leaves_crop_out
