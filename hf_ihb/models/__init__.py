"""Students, teachers and how to read them; our own models are registered with transformers' auto classes here."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_ihb.models.adaptive_cnn import AdaptiveCNNConfig, AdaptiveCNNForImageClassification, AdaptiveCNNModel
from hf_ihb.models.deit import FlexibleDeiTConfig, FlexibleDeiTForImageClassification, FlexibleDeiTModel

# not in the models' own files: the copies that saved folders carry must not take the place of ours
for _config, _model, _classifier in (
    (AdaptiveCNNConfig, AdaptiveCNNModel, AdaptiveCNNForImageClassification),
    (FlexibleDeiTConfig, FlexibleDeiTModel, FlexibleDeiTForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
