"""Distillation methods, one file each; this is the only list of them."""

from typing import Any

from hf_ihb.methods.attention import AttentionTransfer
from hf_ihb.methods.base import Method, SharedKeys
from hf_ihb.methods.cka import CKA
from hf_ihb.methods.dist import DIST
from hf_ihb.methods.dkd import DKD
from hf_ihb.methods.feature_mse import FeatureMSE
from hf_ihb.methods.gram import Gram
from hf_ihb.methods.logits import LogitDistillation
from hf_ihb.methods.nkd import NKD
from hf_ihb.methods.ofa import OFA
from hf_ihb.methods.patch_similarity import PatchSimilarity
from hf_ihb.methods.pkt import PKT
from hf_ihb.methods.procrustes import Procrustes
from hf_ihb.methods.relation import Relation
from hf_ihb.methods.rkd import RKD
from hf_ihb.methods.rsd import RSD
from hf_ihb.methods.sp import SP
from hf_ihb.methods.token import Token

METHODS: tuple[type[Method], ...] = (
    LogitDistillation,
    DKD,
    NKD,
    DIST,
    OFA,
    CKA,
    Gram,
    PatchSimilarity,
    Token,
    FeatureMSE,
    Relation,
    RSD,
    SP,
    RKD,
    PKT,
    Procrustes,
    AttentionTransfer,
)


def methods_of(args: Any) -> list[Method]:
    """The methods that the arguments of a run switch on, in the order of `METHODS`."""
    return [method for kind in METHODS if (method := kind.of(args)).is_on]


__all__ = ["METHODS", "Method", "SharedKeys", "methods_of"]
