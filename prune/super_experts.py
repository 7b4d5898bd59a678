"""Super experts: the few whose outputs carry massive activations, and without which a model falls apart.

Source: "Unveiling Super Experts in Mixture-of-Experts LLMs" (arXiv 2507.23279). They are found, not listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.statistics import OutputNorms

# Of the decoder layers, the first share in which massive activations form; later outliers do no harm (section 3.1).
FORMING_SHARE = 0.75
QUANTILE = 0.995
OF_MAXIMUM = 0.1
# The paper's two conditions always name somebody: the largest of any set is above its own 99.5th percentile. An expert
# must also stand far out of the ordinary; those of the paper are hundreds of times the median, ordinary maxima a few.
OF_MEDIAN = 20.0


def measured_super_experts(profile: Profile) -> dict[int, list[int]]:
    """`super_experts` by what `OutputNorms` has measured."""
    maxima = {i: profile.of(i, OutputNorms())["maximum"] for i in profile.shape.layers}
    return super_experts(maxima, profile.decoder_layers)


def super_experts(maxima: dict[int, Tensor], decoder_layers: int) -> dict[int, list[int]]:
    """Decoder layer → its super experts.

    Args:
        maxima: decoder layer → max |f_e| over tokens and channels of each expert, [E].
        decoder_layers: number of decoder layers.
    """
    everything = torch.cat([m.double() for m in maxima.values()])
    # "lower": of a few hundred experts the interpolated percentile lies above all but one.
    quantile = float(torch.quantile(everything, QUANTILE, interpolation="lower"))
    limit = max(float(everything.max()) * OF_MAXIMUM, float(everything.median()) * OF_MEDIAN)
    last = round(FORMING_SHARE * decoder_layers)
    return {
        layer: found
        for layer, values in maxima.items()
        if layer < last and (found := ((values > limit) & (values >= quantile)).nonzero().flatten().tolist())
    }
