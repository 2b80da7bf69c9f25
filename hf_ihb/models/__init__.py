"""Students, teachers and how to read them; our own models are registered with transformers' auto classes here."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_ihb.models.adaptive_cnn import AdaptiveCNNConfig, AdaptiveCNNForImageClassification, AdaptiveCNNModel

# not in the models' files: their copies in a saved folder must not take the place of ours
AutoConfig.register(AdaptiveCNNConfig.model_type, AdaptiveCNNConfig, exist_ok=True)
AutoModel.register(AdaptiveCNNConfig, AdaptiveCNNModel, exist_ok=True)
AutoModelForImageClassification.register(AdaptiveCNNConfig, AdaptiveCNNForImageClassification, exist_ok=True)
