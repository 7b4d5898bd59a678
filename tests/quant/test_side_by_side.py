import threading
import time

import pytest
import torch

from moe_compress.quant import gptq as gptq_module
from moe_compress.quant.gptq import gptq
from moe_compress.quant.grid import Grid
from moe_compress.quant.side_by_side import side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_run_at_the_same_time_with_one_thread_each(two_threads):
    both = threading.Barrier(2)

    def work(part):
        both.wait(timeout=30)  # breaks unless two are here at once
        return part, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    done = side_by_side(work, range(4), 2)
    assert [part for part, *_ in done] == [0, 1, 2, 3]
    assert len({thread for _, thread, _, _ in done}) == 2
    assert {(threads, learns) for _, _, threads, learns in done} == {(1, False)}
    assert torch.get_num_threads() == 2
    # No more at once than is allowed, still one thread each; a single part has them all.
    assert side_by_side(lambda part: (part, torch.get_num_threads()), range(2), 0) == [(0, 1), (1, 1)]
    assert side_by_side(lambda part: (part, torch.get_num_threads()), [5], 2) == [(5, 2)]
    assert torch.get_num_threads() == 2


def test_the_first_part_that_fails_is_the_one_to_hear_of(two_threads):
    first, begun = threading.Event(), []

    def work(part):
        begun.append(part)
        if part == 1:
            first.set()
            raise ValueError("part 1")
        if part == 0:
            assert first.wait(timeout=30)
            raise ValueError("part 0")
        time.sleep(0.02)  # 20 seconds of them on two threads, if nobody stopped

    with pytest.raises(ValueError, match="part 0"):
        side_by_side(work, range(2_000), 2)
    assert len(begun) < 1_000
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(2, 32, symmetric=False)])
def test_gptq_gives_the_same_bytes_on_one_thread_and_on_two(grid, two_threads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight_EOK = torch.randn(5, 96, 128, generator=generator)
    tokens_ETK = torch.randn(5, 200, 128, generator=generator)
    hessian_EKK = tokens_ETK.transpose(1, 2) @ tokens_ETK
    monkeypatch.setattr(gptq_module, "CHUNK_WEIGHTS", 2 * 96 * 128)
    used, chunk = [], gptq_module._gptq_chunk

    def watched(*arguments):
        used.append((threading.get_ident(), len(arguments[0])))
        return chunk(*arguments)

    monkeypatch.setattr(gptq_module, "_gptq_chunk", watched)
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        used.clear()
        found[threads] = gptq(weight_EOK, hessian_EKK, grid, sweeps=1)
        assert sorted(count for _, count in used) == [1, 2, 2]
        assert (threading.get_ident() in {thread for thread, _ in used}) == (threads == 1)
    one, two = (found[threads] for threads in (1, 2))
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.quantized.scale, two.quantized.scale)
    assert torch.equal(one.error_E, two.error_E)
    assert torch.equal(one.rtn_error_E, two.rtn_error_E)
    if not grid.symmetric:
        assert torch.equal(one.quantized.zero, two.quantized.zero)
