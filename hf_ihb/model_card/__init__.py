"""The records of a run -> its model card: no model is loaded, nothing is measured, no file is read."""

from hf_ihb.model_card.body import render_card
from hf_ihb.model_card.files import PLOTS, RunFiles, run_files
from hf_ihb.model_card.header import CardOptions, card_data

__all__ = ["PLOTS", "CardOptions", "RunFiles", "card_data", "render_card", "run_files"]
