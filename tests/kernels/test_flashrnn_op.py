"""Recurrent networks with heads: the op against its token-by-token reference and against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from kernels.triton_interpreter import run_interpreted
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.kernels.flashrnn import flashrnn, reference
from tersor.kernels.flashrnn_cells import CELLS

each_cell = pytest.mark.parametrize("function", list(CELLS))


def arguments(
    function: str,
    B: int = 2,
    T: int = 7,
    N: int = 3,
    D: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wx, R, b, states."""
    cell = CELLS[function]
    Wx = torch.randn(B, T, cell.input_gates, N, D, dtype=dtype, device=device)
    R = torch.randn(cell.recurrent_gates, N, D, D, dtype=dtype, device=device) * D**-0.5
    b = torch.randn(cell.gates, N, D, dtype=dtype, device=device)
    return Wx, R, b, torch.rand(cell.states, B, 1, N, D, dtype=dtype, device=device) + 0.5


@each_cell
@pytest.mark.parametrize("with_states", [True, False])
def test_equals_the_reference_with_its_gradients(function: str, with_states: bool) -> None:
    torch.manual_seed(0)
    inputs = [each.requires_grad_() for each in arguments(function)[: 4 if with_states else 3]]
    results = []
    for form in (reference, flashrnn):
        states, last = form(*inputs, function=function)
        weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view(states.shape)
        gradients = torch.autograd.grad((states * weights).sum() + last.square().sum(), inputs)
        results.append((states, last, *gradients))
    torch.testing.assert_close(results[1], results[0])


@each_cell
def test_gradients_are_those_of_finite_differences(function: str) -> None:
    torch.manual_seed(1)
    inputs = [each.requires_grad_() for each in arguments(function, 2, 3, 2, 2)]
    assert torch.autograd.gradcheck(lambda *each: flashrnn(*each, function=function), inputs)


def test_the_op_is_well_registered() -> None:
    function = "gru"  # the one whose gates of x, of h and of b are different ones
    Wx, R, b, states = arguments(function)
    inputs = (Wx.permute(1, 3, 0, 2, 4), R.permute(1, 3, 0, 2), b.transpose(0, 1), states[:, :, 0].transpose(1, 2))
    leaves = [each.contiguous().requires_grad_() for each in inputs]
    torch.library.opcheck(torch.ops.tersor.flashrnn, (*leaves, function, False))


@each_cell
def test_step_by_step_equals_the_whole(function: str) -> None:
    torch.manual_seed(0)
    Wx, R, b, _ = arguments(function, dtype=torch.float32)
    whole, last = flashrnn(Wx, R, b, function=function)
    pieces, state = [], None
    for t in range(Wx.shape[1]):
        piece, state = flashrnn(Wx[:, t : t + 1], R, b, state, function=function)
        pieces.append(piece)
    torch.testing.assert_close((torch.cat(pieces, 2), state), (whole, last), rtol=1e-5, atol=1e-5)


@each_cell
def test_heads_do_not_mix(function: str) -> None:
    torch.manual_seed(0)
    Wx, R, b, states = arguments(function)
    before, _ = flashrnn(Wx, R, b, states, function=function)
    Wx[:, :, :, 0] += 1
    after, _ = flashrnn(Wx, R, b, states, function=function)
    assert torch.equal(before[:, :, :, 1:], after[:, :, :, 1:])
    assert not torch.allclose(before[:, :, :, 0], after[:, :, :, 0])


def test_one_head_is_torchs_lstm_and_gru() -> None:
    torch.manual_seed(0)
    x, D = torch.randn(2, 9, 6, dtype=torch.float64), 5
    lstm = nn.LSTM(6, D, batch_first=True).double()
    Wx = (x @ lstm.weight_ih_l0.t()).view(2, 9, 4, 1, D)
    R, b = lstm.weight_hh_l0.view(4, 1, D, D), (lstm.bias_ih_l0 + lstm.bias_hh_l0).view(4, 1, D)
    states, last = flashrnn(Wx, R, b, function="lstm")  # both: i f z o
    h, (_, c) = lstm(x)
    torch.testing.assert_close((states[0, :, :, 0], last[1, :, 0, 0]), (h, c[0]))

    gru = nn.GRU(6, D, batch_first=True).double()
    Wx = (x @ gru.weight_ih_l0.t()).view(2, 9, 3, 1, D)  # r z n
    R_r, R_z, R_n = gru.weight_hh_l0.view(3, 1, D, D)
    r, z, n = gru.bias_ih_l0.view(3, 1, D)
    r_h, z_h, n_h = gru.bias_hh_l0.view(3, 1, D)
    b = torch.stack((n_h, r + r_h, z + z_h, n))
    states, _ = flashrnn(Wx, torch.stack((R_n, R_r, R_z)), b, function="gru")
    torch.testing.assert_close(states[0, :, :, 0], gru(x)[0])


@each_cell
def test_axes_in_other_orders(function: str) -> None:
    torch.manual_seed(0)
    Wx, R, b, states = arguments(function)
    expected, expected_last = flashrnn(Wx, R, b, states, function=function)
    for recurrent, order in (("HGDP", (1, 0, 2, 3)), ("HPGD", (1, 3, 0, 2)), ("HPDG", (1, 3, 2, 0))):
        got, last = flashrnn(
            Wx.transpose(0, 1),
            R.permute(order),
            b.permute(1, 2, 0),
            states.transpose(1, 2),
            function=function,
            input_shape="TBGHD",
            recurrent_shape=recurrent,
            bias_shape="HDG",
            output_shape="STBHD",
        )
        torch.testing.assert_close((got.transpose(1, 2), last.transpose(1, 2)), (expected, expected_last))


def test_slstm_is_finite_for_large_gates() -> None:
    torch.manual_seed(0)
    Wx, R, b, _ = arguments("slstm", T=40, dtype=torch.float32)
    Wx[:, :, 0] = 50 * torch.sign(Wx[:, :, 0])
    Wx.requires_grad_()
    states, _ = flashrnn(Wx, R, b, function="slstm")
    states[0].sum().backward()
    assert torch.isfinite(states).all()
    assert torch.isfinite(Wx.grad).all()  # type: ignore[arg-type]


def test_half_precision_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    inputs = [each.bfloat16() for each in arguments("lstm", T=30)]
    states, last = flashrnn(*inputs, function="lstm")
    assert states.dtype == last.dtype == torch.bfloat16
    expected, _ = reference(*(each.double() for each in inputs), function="lstm")
    torch.testing.assert_close(states.double(), expected, rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    Wx, R, b, states = arguments("lstm")
    with pytest.raises(TersorError, match=r"'rnn'"):
        flashrnn(Wx, R, b, function="rnn")
    with pytest.raises(TersorError, match=r"Wx for a gru should be \[7, 3, 2, 3, 4\], not \[7, 3, 2, 4, 4\]"):
        flashrnn(Wx, R, b, function="gru")
    with pytest.raises(TersorError, match="states for a lstm"):
        flashrnn(Wx, R, b, states[:1])
    with pytest.raises(TersorError, match="input_shape"):
        flashrnn(Wx, R, b, input_shape="BTHGD")
    with pytest.raises(TersorError, match=r"fused kernels take float32 on a GPU, not .* on cpu"):
        flashrnn(Wx, R, b, fused=True)


def test_triton_interpreted() -> None:
    """Fused and, at a width that does not fit on chip, alternating; a start of zeros and one that is given."""
    run_interpreted(
        """
        from kernels.test_flashrnn_op import arguments
        from tersor.kernels import flashrnn, flashrnn_triton
        fused = flashrnn_triton.tiling
        assert fused(64, 4, 16, 12) == {"TILE": 16, "WARPS": 4}
        assert fused(64, 4, 512, 12) == {"TILE": 32, "WARPS": 8}  # fewer programs than would wait
        assert fused(768, 4, 16, 1) is fused(64, 4, 16, 12, (101376, 84)) is None
        for function, cell in flashrnn.CELLS.items():
            for fresh in (False, True):
                Wx, R, b, states = arguments(function, 3, 3, 2, 5, dtype=torch.float32)
                Wx, R, b = Wx.permute(1, 3, 0, 2, 4).contiguous(), R.permute(1, 3, 0, 2).contiguous(), b.transpose(0, 1)
                start = states[:, :, 0].transpose(1, 2) * (not fresh)
                expected = flashrnn.in_torch(Wx, R, b, start, function)
                grad = torch.randn_like(expected)
                gates = torch.randn(3, 2, 3, cell.gates, 5)
                back = flashrnn.walk_back(grad, R, expected, gates, function)
                for tiling in (fused, lambda *_: None):
                    flashrnn_triton.tiling = tiling
                    got = flashrnn_triton.forward(Wx, R, b, start, function)
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
                    got = flashrnn_triton.walk_back(grad, R, expected, gates, function)
                    torch.testing.assert_close(got, back, rtol=1e-4, atol=1e-5)
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_cell
@pytest.mark.parametrize(("B", "T", "N", "D"), [(16, 100, 3, 64), (37, 20, 2, 48), (3, 20, 1, 200)])
def test_on_a_gpu(function: str, B: int, T: int, N: int, D: int) -> None:
    torch.manual_seed(0)
    inputs = [each.cuda().requires_grad_() for each in arguments(function, B, T, N, D, dtype=torch.float32)]
    results = []
    for each in (inputs, [each.detach().cpu().double().requires_grad_() for each in inputs]):
        states, last = flashrnn(*each, function=function, fused=each[0].is_cuda)
        gradients = torch.autograd.grad(states.square().mean() + last.sin().mean(), each)
        results.append([each.cpu().double() for each in (states, last, *gradients)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
