"""The fused kernels against the definition in float64: Triton (interpreted where there is no GPU) and the CPU's blocks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.kernels import bce_dice, cpu_bce_dice, kernel_for, region_bits, region_sums, triton_bce_dice

HAS_GPU = torch.cuda.is_available()
KERNELS = {"cpu": (cpu_bce_dice, "cpu"), "triton": (triton_bce_dice, "cuda" if HAS_GPU else "cpu")}
BITS = region_bits({"lung": (1, 2), "infection": (2,), "of three runs": (0, 40, 42), "wide": (62, 3)})
# Relative error of a gradient in that dtype; Triton's interpreter cuts bfloat16 off where others round.
HALF = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
Case = tuple[torch.Tensor, torch.Tensor]


def random_case(shape: tuple[int, ...], n_regions: int, dtype: torch.dtype, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    logits = (torch.randn(batch, n_regions, height, width, generator=generator) * 5).to(dtype)
    labels = torch.tensor([0, 1, 2, 3, 40, 62, 200, 255], dtype=torch.uint8)
    return logits, labels[torch.randint(0, len(labels), shape, generator=generator)]


def check(kernel: str, logits: torch.Tensor, label: torch.Tensor) -> None:
    """Sums and gradient of a kernel are those of the definition; the gradient has the dtype and the layout of logits."""
    module, device = KERNELS[kernel]
    bits = BITS[: logits.shape[1]]
    exact = logits.double().requires_grad_()
    expected = bce_dice.region_sums(exact, label, bits)
    grad_sums = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad_sums.double())
    sums = module.forward(logits.to(device), label.to(device), bits).cpu()
    torch.testing.assert_close(sums.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    grad = module.backward(logits.to(device), label.to(device), bits, grad_sums.to(device)).cpu()
    assert grad.dtype == logits.dtype and grad.stride() == logits.stride()
    assert exact.grad is not None
    torch.testing.assert_close(grad.double(), exact.grad, rtol=HALF[logits.dtype] + 1e-5, atol=2e-6)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("n_regions", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 41, 401)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_dtype_and_layout(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], n_regions: int, channels_last: bool
) -> None:
    logits, label = random_case(shape, n_regions, dtype)
    check(kernel, logits.contiguous(memory_format=torch.channels_last) if channels_last else logits, label)


@pytest.mark.parametrize("content", [0, 2, 255], ids=["all empty", "all full", "all ignored"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_labels_that_are_all_alike(kernel: str, content: int) -> None:
    logits, _ = random_case((2, 16, 16), 2, torch.float32)
    check(kernel, logits, torch.full((2, 16, 16), content, dtype=torch.uint8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99), st.booleans())
def test_any_size_is_that_of_the_definition(b: int, r: int, height: int, width: int, seed: int, last: bool) -> None:
    logits, label = random_case((b, height, width), r, torch.float32, seed)
    check("cpu", logits.contiguous(memory_format=torch.channels_last) if last else logits, label)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 59))
def test_samples_and_rows_add_up(height: int, width: int, cut: int) -> None:
    logits, label = random_case((1, height + cut, width), 2, torch.float32)
    whole = region_sums(logits, label, BITS[:2])
    parts = region_sums(logits[:, :, :cut], label[:, :cut], BITS[:2]) + region_sums(
        logits[:, :, cut:], label[:, cut:], BITS[:2]
    )
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_logits_give_the_limits_and_nan_is_reported_unless_ignored(kernel: str) -> None:
    module, device = KERNELS[kernel]
    infinite = torch.tensor([torch.inf, -torch.inf, -torch.inf, torch.nan], device=device)
    label = torch.tensor([1, 0, 1, 255], dtype=torch.uint8, device=device)
    ones = torch.ones(1, 1, 5, device=device)
    for n_seen, bce in ((2, 0.0), (3, torch.inf)):
        logits = infinite.clone()
        logits[n_seen:3] = 0
        mask = label.clone()
        mask[n_seen:] = 255
        sums = module.forward(logits.view(1, 1, 2, 2), mask.view(1, 2, 2), (2,))
        assert sums.view(5).tolist() == [1, n_seen - 1, 1, bce, n_seen]
    grad = module.backward(infinite.view(1, 1, 2, 2), label.view(1, 2, 2), (2,), ones)
    assert grad.view(4).tolist() == [0, 0, -1, 0]
    seen = module.forward(infinite.view(1, 1, 2, 2), torch.ones_like(label).view(1, 2, 2), (2,)).view(5)
    assert seen.isnan().tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_at_full_size_is_near_float64(kernel: str) -> None:
    batch = 16 if kernel == "cpu" or HAS_GPU else 1
    logits, label = random_case((batch, 512, 512), 2, torch.float16)
    logits[0, :, :8] = 60000
    logits[0, :, 8:16] = -60000
    module, device = KERNELS[kernel]
    exact = bce_dice.region_sums(logits.double(), label, BITS[:2])
    sums = module.forward(logits.to(device), label.to(device), BITS[:2]).cpu()
    assert bool(sums.isfinite().all())
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)
    grad = module.backward(logits.to(device), label.to(device), BITS[:2], torch.ones(batch, 2, 5, device=device))
    assert bool(grad.isfinite().all())


def test_cpu_bits_do_not_depend_on_the_number_of_threads() -> None:
    logits, label = random_case((2, 700, 301), 2, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(cpu_bce_dice.forward(logits, label, BITS[:2]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checks read it
def test_the_operator_is_a_good_citizen() -> None:
    """Schema, fake, autograd and AOT dispatch, by torch's own checks."""
    logits, label = random_case((2, 6, 7), 2, torch.float32)
    sample = (logits.requires_grad_(), label, list(BITS[:2]))
    torch.library.opcheck(torch.ops.distseg.region_sums, sample)


def test_compiled_code_has_no_graph_break() -> None:
    logits, label = random_case((2, 6, 7), 2, torch.float32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return region_sums(x * 2, label, BITS[:2], "fused")[..., 3].sum()

    gradients = []
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        x = logits.clone().requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_auto_is_fused_where_there_is_a_kernel_and_the_definition_elsewhere() -> None:
    assert kernel_for(torch.device("cpu")) == "cpu" and kernel_for(torch.device("cuda")) == "triton"
    assert kernel_for(torch.device("cpu"), torch.float64) == kernel_for(torch.device("meta")) == "definition"
    assert kernel_for(torch.device("cpu"), wanted="definition") == "definition"
    with pytest.raises(ValueError, match="got fused for torch.float64 on cpu"):
        kernel_for(torch.device("cpu"), torch.float64, "fused")


def test_any_strides_are_read_right() -> None:
    logits, label = random_case((2, 12, 16), 2, torch.float32)
    strided, strided_label = logits.transpose(2, 3), label.transpose(1, 2)
    expected = bce_dice.region_sums(logits, label, BITS[:2])
    torch.testing.assert_close(region_sums(strided, strided_label, BITS[:2]), expected)


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int32), torch.zeros(1, 4, 4, dtype=torch.uint8)),
    ],
)
def test_misfits_are_refused_by_name(logits: torch.Tensor, label: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="region sums: got .*; .* must be"):
        region_sums(logits, label, BITS[:2])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements() -> None:
    logits = torch.zeros(1, 3, 26800, 26800, dtype=torch.float16, device="cuda")
    label = torch.zeros(1, 26800, 26800, dtype=torch.uint8, device="cuda")
    logits[0, 2, -1, -1], label[0, -1, -1] = 30000, 2
    assert logits.numel() > 2**31
    sums = triton_bce_dice.forward(logits, label, (2, 2, 4))[0].cpu()
    assert sums[2, 1] == 1 and sums[2, 2] == 1 and sums[0, 1] == 0
    grad = triton_bce_dice.backward(logits, label, (2, 2, 4), torch.ones(1, 3, 5, device="cuda"))
    assert grad[0, 2, -1, -1] == 0 and grad[0, 2, -1, -2] == 0.75
