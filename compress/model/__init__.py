"""The one view of every Mixture-of-Experts family."""

from .above import EXPERTS_KINDS
from .block import MoEBlock
from .experts import Experts, ExpertWeights, FusedExperts
from .model import Layer, MoEModel
from .opening import read_config
from .router import Routing
from .routes import experts_per_token
from .tap import GradientTap, Tap, observe

__all__ = [
    "EXPERTS_KINDS",
    "ExpertWeights",
    "Experts",
    "FusedExperts",
    "GradientTap",
    "Layer",
    "MoEBlock",
    "MoEModel",
    "Routing",
    "Tap",
    "experts_per_token",
    "observe",
    "read_config",
]
