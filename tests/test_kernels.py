"""The checks run twice: on a GPU where there is one, and anywhere in Triton's interpreter, in a process of its own.

Triton stays out of the environment of the other tests: libraries take its presence for a GPU's. It is expected in the
folder `triton` beside it, where `make venv` puts it.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grades_trl.criteria import kernels, metrics

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# In the interpreter, `gpu` would take them out of a run with -m "not gpu".
check = (
    (lambda f: f)
    if INTERPRETED
    else lambda f: pytest.mark.gpu(pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device")(f))
)


def triton_environment(**values):
    folder = Path(sys.prefix) / "triton"
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{folder}:{root}", "PYTHONWARNINGS": "ignore", **values}


def run_here(*arguments, **environment):
    """Runs tests of this file in a process that can import Triton, and returns how many of them passed."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__, *arguments],
        env=triton_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) passed", run.stdout)[1])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_checks_in_the_interpreter():
    assert run_here("-k", "not process and not interpreter", TRITON_INTERPRET="1") >= 20


@pytest.mark.skipif(kernels.triton is not None, reason="Triton can be imported in this one")
def test_compiling_in_a_process_of_its_own(tmp_path):
    assert run_here("-k", "compiles_for_gpus", TRITON_CACHE_DIR=str(tmp_path)) == 4


needs_compiler = pytest.mark.skipif(
    kernels.triton is None or INTERPRETED, reason="needs Triton, and compiles nothing in its interpreter"
)


def compiled(function, signature, constants, capability):
    """Triton's code for a GPU, which need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype", "vector"), [(80, "bfloat16", 8), (120, "float32", 4), (90, "float16", 1)]
)
def test_reading_compiles_for_gpus_and_moves_16_bytes_at_a_time(capability, dtype, vector):
    constants = {
        "DTYPE": getattr(kernels.tl, dtype), "VECTOR": vector, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK,
    }  # fmt: skip
    signature = {"table": "*i64", "geometry": "*i64", "owners": "*i32", "partial": "*fp32"}
    signature |= {"first": "i32", "inverse_scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    code = compiled(kernels._read_chunks, signature, constants, capability)
    # A block of x and one of what it is compared with, shared among 4 warps of 32 threads
    loads = 2 * kernels.BLOCK * getattr(torch, dtype).itemsize // (4 * 32) // 16
    assert code.count("ld.global.v4.b32") == (loads if vector > 1 else 0)


@needs_compiler
def test_summing_compiles_for_gpus():
    signature = {"partial": "*fp32", "geometry": "*i64", "sums": "*fp32", "BLOCK": "constexpr"}
    assert compiled(kernels._sum_partials, signature, {"BLOCK": 1024}, 80)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def exact(x, p, scale=1.0):
    """Both sums in float64."""
    x = x.double() / scale
    return x.abs().sum().item(), (x - p.double()).abs().sum().item()


@check
def test_closed_forms():
    x = torch.tensor([[1.0, -2.0], [3.0, 0.0]], device=DEVICE)
    p = torch.tensor([[0.5, 0.0], [3.0, -1.0]], device=DEVICE)
    sums = kernels.l1_sums([x], [p])
    assert sums.tolist() == [[6.0, 3.5]]
    assert (sums.dtype, sums.shape, sums.device) == (torch.float32, (1, 2), x.device)
    assert kernels.l1_sums([x], [p], scale=4.0).tolist() == [[1.5, 4.0]]


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1000, 257), (1, 8192), (1, 8200), (128, 2048), (1031, 1)])
def test_sums_are_exact_to_1e_5(dtype, shape):
    x, p = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)
    assert kernels.l1_sums([x], [p], scale=3.0)[0].tolist() == pytest.approx(exact(x, p, scale=3.0), rel=1e-5)


@check
@pytest.mark.parametrize("shape", [(2000,), (), (3, 4, 8, 8), (5, 3, 7)])
def test_other_shapes_than_matrices(shape):
    x, p = randn(*shape, dtype=torch.bfloat16), randn(*shape, dtype=torch.bfloat16, seed=1)
    assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)
    if len(shape) == 4:  # dense, and not in order
        x = x.to(memory_format=torch.channels_last)
        assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)


@check
def test_rows_far_beyond_2_to_the_31_elements():
    memory = torch.empty(70_000, 32_768, dtype=torch.bfloat16, device=DEVICE)  # never touched, but for three rows
    x = memory[:: 69_999 // 2]
    assert x.shape[0] == 3 and x.stride(0) * 2 > 2**31
    x.copy_(randn(3, 32_768, dtype=torch.bfloat16))
    p = randn(3, 32_768, dtype=torch.bfloat16, seed=1)
    assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)


@check
@pytest.mark.skipif(INTERPRETED, reason="a quarter of a million programs")
def test_one_matrix_beyond_2_to_the_31_elements():
    x = torch.ones(65_537, 32_768, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 3.0
    p = torch.zeros_like(x)
    p[-1] = 1.0
    assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx([65_539 * 32_768, 65_538 * 32_768], rel=1e-6)


@check
@pytest.mark.parametrize("shape", [(4, 24, 40), (3, 5, 7)])  # of the second, slices begin anywhere
def test_slices_of_experts_strided_rows_and_transposes(shape):
    experts, p = randn(*shape, dtype=torch.bfloat16), randn(*shape, dtype=torch.bfloat16, seed=1)
    sums = kernels.l1_sums(list(experts)[1:], list(p)[1:])
    for e in range(1, shape[0]):
        assert sums[e - 1].tolist() == pytest.approx(exact(experts[e], p[e]), rel=1e-5)

    wide = randn(9, 48, dtype=torch.float16)
    tall = randn(3, 20_000, dtype=torch.float16)  # rows of several chunks
    for x in (
        wide[:, 8:40],
        wide[::2],
        wide[:, 3:20],
        wide[:, 5:6],
        wide.T,
        wide[:, ::2],
        tall[:, 8:17_008],
        tall[::2],
    ):
        before = randn(*x.shape, dtype=torch.float16, seed=1)
        assert kernels.l1_sums([x], [before])[0].tolist() == pytest.approx(exact(x, before), rel=1e-5)


@check
def test_many_tensors_give_the_same_sums_as_one_by_one_to_the_last_bit():
    shapes = [(1, 1), (3, 5), (24, 64), (100, 257), (17, 1000), (2, 9000), (16, 16), (33, 8)]
    tensors, previous = [], []
    for i, shape in enumerate(shapes * 2):
        x = randn(*shape, dtype=DTYPES[i % 3], seed=i)
        tensors.append(x[::2] if i % 4 == 1 else x)
        previous.append(None if i % 5 == 2 else randn(*tensors[-1].shape, dtype=DTYPES[i % 3], seed=100 + i))
    together = kernels.l1_sums(tensors, previous)
    for i, (x, p) in enumerate(zip(tensors, previous, strict=True)):
        alone = kernels.l1_sums([x], [p])[0]
        assert together[i, 0] == alone[0]
        assert torch.isnan(together[i, 1]) if p is None else together[i, 1] == alone[1]
        if p is not None:
            assert alone.tolist() == pytest.approx(exact(x, p), rel=1e-5)


@check
def test_it_is_the_fused_form_of_the_one_in_torch():
    tensors = [randn(50, 24, seed=i, dtype=DTYPES[i % 3]) for i in range(6)]
    previous = [None if i == 4 else randn(50, 24, seed=10 + i, dtype=DTYPES[i % 3]) for i in range(6)]
    for scale in (1.0, 1024.0, 0.3):
        for before in (previous, [None] * 6):
            fused, plain = kernels.l1_sums(tensors, before, scale), metrics.l1_sums(tensors, before, scale)
            assert fused.dtype == plain.dtype and fused.shape == plain.shape
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0.0, equal_nan=True)


@check
def test_without_anything_to_compare_with_the_distance_is_nan():
    x, p = randn(40, 264), randn(40, 264, seed=1)
    sums = kernels.l1_sums([x, x], [None, p])
    assert math.isnan(sums[0, 1])
    assert sums[0, 0] == sums[1, 0] == pytest.approx(exact(x, p)[0], rel=1e-5)
    assert sums[1, 1] == pytest.approx(exact(x, p)[1], rel=1e-5)
    nothing = torch.empty(0, 264, device=DEVICE)
    assert kernels.l1_sums([nothing, x], [nothing, p])[:, 0].tolist() == [0.0, sums[0, 0].item()]


@check
def test_nothing_is_written():
    whole, kept = randn(64, 264, dtype=torch.bfloat16), randn(64, 264, dtype=torch.bfloat16, seed=1)
    before = whole.clone(), kept.clone()
    kernels.l1_sums([whole[8:24], whole[32:]], [kept[8:24], None], scale=2.0)
    assert torch.equal(whole, before[0]) and torch.equal(kept, before[1])


@check
@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_and_nan_propagate_to_their_own_tensor_only(dtype):
    tensors = [randn(10, 1000, dtype=dtype, seed=i) for i in range(3)]
    tensors[0][9, 999] = -math.inf
    tensors[1][4, 4] = math.nan
    sums = kernels.l1_sums(tensors, [torch.zeros_like(x) for x in tensors])
    assert sums[0].tolist() == [math.inf, math.inf]
    assert sums[1].isnan().all()
    assert sums[2].isfinite().all()


@check
def test_memory_is_moved_16_bytes_at_a_time_only_where_all_rows_begin_and_end_so(monkeypatch):
    # A wrong hint is a misaligned address on a GPU, and nothing at all in the interpreter.
    forms = []
    layout = kernels._layout
    monkeypatch.setattr(kernels, "_layout", lambda f, device: forms.extend(f) or layout(f, device))
    buffer, kept = randn(64 * 64, dtype=torch.bfloat16), randn(64 * 64, dtype=torch.bfloat16, seed=1)
    # (height, width, stride, first element of x, of p) and whether it may
    for height, width, stride, begin, at, may in [
        (16, 32, 32, 0, 0, True),
        (16, 32, 32, 8, 16, True),
        (16, 32, 32, 4, 0, False),
        (16, 32, 32, 0, 3, False),
        (16, 5, 5, 0, 0, True),  # 80 contiguous values
        (3, 5, 5, 0, 0, False),
        (16, 32, 40, 0, 0, True),
        (16, 32, 36, 0, 0, False),
        (16, 28, 40, 0, 0, False),
    ]:
        x = buffer[begin:].as_strided((height, width), (stride, 1), begin)
        p = kept[at : at + height * width].view(height, width)
        sums = kernels.l1_sums([x], [p])
        assert (forms.pop()[1] == 8) == may, (height, width, stride, begin, at)
        assert sums[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)


@check
def test_repeated_calls_follow_the_tensors_they_get():
    for seed, shape in enumerate([(8, 16), (8, 16), (24, 40), (8, 16)]):
        x, p = randn(*shape, seed=seed), randn(*shape, seed=seed + 10)
        assert kernels.l1_sums([x], [p])[0].tolist() == pytest.approx(exact(x, p), rel=1e-5)


@check
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has nothing to wait for")
def test_nothing_waits_for_the_device():
    tensors = [randn(100, 264), randn(7, 9).T]
    kernels.l1_sums(tensors, [None, None])  # compiles
    kernels._layout.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.l1_sums(tensors, [None, None], scale=2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@check
def test_wrong_tensors_are_refused_before_memory_is_touched():
    x = torch.zeros(4, 6, device=DEVICE)
    for tensor, kept, message in [
        (x.double(), None, r"tensors\[1\].*float64.*expected bfloat16"),
        (torch.zeros(4, 6, device="meta"), None, r"tensors\[1\].*meta.*where the first"),
        (x, x[:3], r"previous\[1\].*\(3, 6\).*expected \(4, 6\)"),
        (x, x.half(), r"previous\[1\].*float16"),
        (x, torch.zeros(6, 4, device=DEVICE).T, r"previous\[1\].*contiguous"),
        (x, torch.zeros(4, 6, device="meta"), r"previous\[1\].*meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.l1_sums([x, tensor], [None, kept])
    with pytest.raises(ValueError, match="no tensors"):
        kernels.l1_sums([], [])


def test_the_torch_form_has_the_same_closed_forms():
    x, p = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[0.5, 0.0], [3.0, -1.0]])
    assert metrics.l1_sums([x, x.half()], [p, p.half()]).tolist() == [[6.0, 3.5]] * 2
    sums = metrics.l1_sums([x, x, x[0]], [None, p, p[0]], scale=4.0)
    assert sums.dtype == torch.float32 and math.isnan(sums[0, 1])
    assert sums[:, 0].tolist() == [1.5, 1.5, 0.75]
    assert sums[1:, 1].tolist() == [4.0, 0.75]
    assert metrics.l1_sums([x, x], [None, None]).isnan().tolist() == [[False, True]] * 2


def test_every_chunk_has_one_owner_and_lies_in_the_launch_of_its_kind():
    kinds = [(torch.bfloat16, 8), (torch.bfloat16, 1), (torch.float32, 1), (torch.bfloat16, 8)]
    forms = [(*kind, 3, kernels.CHUNK * i + 1, 0) for i, kind in enumerate(kinds)]
    layout = kernels._layout(tuple(forms), torch.device("cpu"))
    assert len(layout.owners) == sum(3 * (i + 1) for i in range(4))
    seen = []
    for dtype, vector, first, chunks in layout.launches:
        seen += layout.owners[first : first + chunks].tolist()
        assert {kinds[owner] for owner in seen[first:]} == {(dtype, vector)}
    assert seen == layout.owners.tolist()
    for owner, (_, _, per_row, first, chunks) in enumerate(layout.geometry.tolist()):
        assert (per_row, chunks) == (owner + 1, 3 * (owner + 1))
        assert set(layout.owners[first : first + chunks].tolist()) == {owner}


def test_expected_bytes():
    tensors = [torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(2, 4)]
    assert kernels.expected_bytes(tensors, [None, tensors[1]]) == 8 * 4 * 2 + 2 * (2 * 4 * 4)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.available()
    with pytest.raises(ValueError, match="available"):
        kernels.l1_sums([torch.zeros(1, 1)], [None])
