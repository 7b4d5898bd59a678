"""Everything that runs on a GPU runs on a device that refuses what a GPU refuses (pretended.py)."""

import json

import pytest
from families import discover
from on_device import MEMORY, STREAMED
from running import python

from moe_compress.model import families

TOUCH = """
import torch
from pretended import DEVICE, pretended

def assert_refused(work):
    try:
        work()
    except RuntimeError:
        return True
    return False

with pretended():
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device=DEVICE).view(2, 3)
    view = there[0]
    view.mul_(2)
    print(there.tolist(), (there @ here.T.to(DEVICE)).sum().item(), there.device.type, here.device.type)
    print((there * 2).device == (there * torch.tensor(2.0)).device == there[:, torch.tensor([0, 2])].device == DEVICE)
    print(
        assert_refused(lambda: there + here),
        assert_refused(lambda: here @ there.T),
        assert_refused(lambda: here[torch.tensor([0], device=DEVICE)]),
        assert_refused(lambda: torch.where(there > 0, there, here)),
        assert_refused(lambda: there.index_add_(0, torch.tensor([0]), there[:1])),
        assert_refused(lambda: here.copy_(there)),
    )
"""


def test_the_device_refuses_what_a_gpu_does():
    values, placed, refused = python("-c", TOUCH).splitlines()
    assert values == "[[0.0, 2.0, 4.0], [3.0, 4.0, 5.0]] 102.0 pretended cpu"
    assert placed == "True"
    assert refused == "True True True True True False"


QUICK = (
    *("rotated", "ternary, fisher", "refitted", "gram", "heapr", "merged", "latent", "healed", "skipped", *STREAMED),
    *("gpt_oss", "nemotron_h"),
)
SUPPORTED = [name for name in discover() if families.refusal(name) is None]
# Those that aren't quick take many times as long, and find little more.
CASES = [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in (*MEMORY, *STREAMED, *SUPPORTED)]


@pytest.mark.parametrize("case", CASES)
def test_on_a_device(case, tmp_path):
    """Nothing meets across devices, everything ends there, and the model is what it is on the CPU.

    But for the order of some sums: where that turns a rounding or a tie, logits differ by up to a tenth.
    """
    found = json.loads(python("on_device.py", tmp_path, case).splitlines()[-1])
    assert "error" not in found, found["error"]
    assert found["devices"] == ["pretended"]
    assert found["differs"] < 0.2
