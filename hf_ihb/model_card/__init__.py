"""A run folder -> its model card, from the folder's JSON files alone: no model is loaded, nothing is measured."""

from hf_ihb.model_card.body import render_card
from hf_ihb.model_card.files import PLOTS
from hf_ihb.model_card.header import CardOptions, card_data

__all__ = ["PLOTS", "CardOptions", "card_data", "render_card"]
