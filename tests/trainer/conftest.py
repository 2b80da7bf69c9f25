import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import ImageSplit
from hf_ihb.models.processing import PixelFormat, pixel_format, student_processor
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments

LABELS = ["red", "green", "blue", "dark"]
CROP = AugmentationArguments(random_crop_padding=2, horizontal_flip=0.5)
MEAN, STD, SIZE = [0.5] * 3, [0.25] * 3, (16, 16)


def make_split(count: int, seed: int) -> ImageSplit:
    """Noise with one brighter channel a class (none for the last): learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(LABELS)
    images = torch.randint(0, 160, (count, 3, *SIZE), generator=generator)
    images += 90 * torch.nn.functional.one_hot(labels, 4)[:, :3, None, None]
    return ImageSplit(images.clamp(0, 255).to(torch.uint8), labels, LABELS)


@pytest.fixture(scope="session")
def train_split():
    return make_split(128, seed=0)


@pytest.fixture(scope="session")
def eval_split():
    return make_split(70, seed=1)


@pytest.fixture(scope="session")
def processor():
    return student_processor(MEAN, STD, SIZE)


@pytest.fixture
def make_student():
    def make(architecture="deit", drop_path_rate=0.0, seed=0, **options):
        set_seed(seed)
        args = ModelArguments(
            architecture=architecture, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
            drop_path_rate=drop_path_rate, **options,
        )  # fmt: skip
        return build_student(args, LABELS, SIZE, MEAN, STD)[0]

    return make


@pytest.fixture(scope="session")
def trained_cnn(train_split, tmp_path_factory):
    set_seed(0)
    model, processor = build_student(ModelArguments(architecture="resnet18_cifar_w16"), LABELS, SIZE, MEAN, STD)
    args = SupervisedTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("teacher")), max_steps=20, per_device_train_batch_size=32,
        learning_rate=3e-3, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    SupervisedTrainer(model, args, train_dataset=train_split, processing_class=processor).train()
    model.save_pretrained(args.output_dir)
    return args.output_dir, processor


@pytest.fixture
def make_teacher(trained_cnn):
    def make(names=LABELS):
        path, processor = trained_cnn
        model = TimmWrapperForImageClassification.from_pretrained(path)
        return Teacher(model, pixel_format(processor), names)

    return make


@pytest.fixture
def make_vit_classifier(processor):
    """A teacher with attention between all patches, and random weights that look somewhere."""

    def make(patch_size=4):
        shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        config = ViTConfig(
            image_size=16, patch_size=patch_size, initializer_range=0.3, id2label=dict(enumerate(LABELS)), **shape
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return Teacher(ViTForImageClassification(config), pixel_format(processor), LABELS)

    return make


@pytest.fixture
def make_args(tmp_path):
    def make(arguments_class, **overrides):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 32,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return arguments_class(**{**defaults, **overrides})

    return make


@pytest.fixture
def make_vit():
    def make(seed=5, side=16):
        set_seed(seed)
        config = Dinov2Config(
            image_size=side, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        return Teacher(Dinov2Model(config), PixelFormat((0.5,) * 3, (0.25,) * 3, (side, side)))

    return make


@pytest.fixture
def make_several(make_student, make_args, train_split, eval_split, processor, tmp_path):
    def make(teachers, student=None, augmentation=CROP, **keys):
        keys = {"teacher_cache": "off", "teacher_cache_dir": str(tmp_path / "caches"), "max_steps": 2,
                "teacher_statistics_samples": 64, "distilled_heads": "both"} | keys  # fmt: skip
        return DistillationTrainer(
            student or make_student(), make_args(DistillationTrainingArguments, **keys), train_dataset=train_split,
            eval_dataset=eval_split, processing_class=processor, augmentation=augmentation, teacher_model=teachers,
        )  # fmt: skip

    return make
