"""GatedLinear and PackedLinear as stand-ins for the modules they replace."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, token_ids
from torch import nn

import gatepack as gp
from gatepack.gates import GateSet, GateSpec
from gatepack.modules import (
    base_linear,
    gate_linear,
    is_conv1d,
    is_gated,
    operands_of,
    ungate_linear,
    why_not_sliced,
)
from gatepack.sites import Site

K, N, LANES = 24, 16, 4


def gates_for(noise=0.0, seed=0, **config):
    specs = {
        "in:heads": GateSpec("heads", K // LANES, LANES),
        "out:channels": GateSpec("channels", N),
    }
    gates = GateSet(gp.GateConfig(noise=noise, **config), specs)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        gates.logits.copy_(torch.randn(gates.logits.shape, generator=generator) * 0.8 - 0.2)
    values = gates.deterministic_values()
    assert (values == 0).any() and ((values > 0) & (values < 1)).any()
    return gates


def plain(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def gated_twin(linear, in_gate=None, out_gate=None):
    gated = gp.GatedLinear(
        K,
        N,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        in_gate=in_gate,
        out_gate=out_gate,
    )
    gated.load_state_dict(linear.state_dict(), strict=True)
    return gated


def tokens(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (3, 5)), K, generator=torch.Generator().manual_seed(1)).to(dtype)


def masked(linear, x, z_in, z_out):
    y = linear(x if z_in is None else x * z_in.repeat_interleave(LANES).to(x.dtype))
    return y if z_out is None else y * z_out.to(y.dtype)


class TestDropIn:
    def test_is_an_nn_linear_with_its_state_dict(self):
        gates = gates_for()
        linear, gated = (
            plain(),
            gp.GatedLinear(K, N, in_gate=gates["in:heads"], out_gate=gates["out:channels"]),
        )
        assert isinstance(gated, nn.Linear)
        assert list(gated.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
        assert [name for name, _ in gated.named_parameters()] == ["weight", "bias"]
        assert gated.load_state_dict(linear.state_dict(), strict=True).missing_keys == []
        back = nn.Linear(K, N)
        back.load_state_dict(gated.state_dict(), strict=True)
        assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)
        assert repr(gated) == repr(linear).replace("Linear", "GatedLinear")
        assert list(gp.GatedLinear(K, N, bias=False).state_dict()) == ["weight"]

    def test_initialises_as_nn_linear(self):
        torch.manual_seed(3)
        linear = nn.Linear(K, N)
        torch.manual_seed(3)
        assert torch.equal(gp.GatedLinear(K, N).weight, linear.weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_without_gates_the_same_bits(self, dtype):
        linear = plain(dtype)
        gated, x = gated_twin(linear), tokens(dtype).requires_grad_()
        got, expected = gated(x), linear(x)
        assert torch.equal(got, expected)
        upstream = torch.randn_like(got)
        mine = torch.autograd.grad(got, (x, *gated.parameters()), upstream)
        theirs = torch.autograd.grad(expected, (x, *linear.parameters()), upstream)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gates_of_one_give_f_linear_exactly(self, dtype, grad):
        gates = gates_for()
        with torch.no_grad():
            gates.logits.fill_(2.0)
        linear = plain(dtype)
        gated = gated_twin(linear, gates["in:heads"], gates["out:channels"])
        with torch.set_grad_enabled(grad):
            x = tokens(dtype, 5, 27)  # more than gatepack._C multiplies itself
            assert torch.equal(gated(x), F.linear(x, linear.weight, linear.bias))

    def test_dtype_and_device_follow_to(self):
        gates = gates_for()
        gated = gated_twin(plain(), gates["in:heads"])
        assert gated.to(torch.bfloat16)(tokens(torch.bfloat16)).dtype == torch.bfloat16
        assert gates.logits.dtype == torch.float32
        assert gp.GatedLinear(K, N, device="meta").weight.is_meta
        assert gp.GatedLinear(K, N, dtype=torch.float64).weight.dtype == torch.float64

    @pytest.mark.parametrize("gated", [True, False])
    def test_autocast_gives_what_nn_linear_gives(self, gated):
        gates = gates_for()
        linear = plain()
        module = gated_twin(linear, gates["in:heads"] if gated else None)
        x = tokens().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            got, dense = module(x), linear(x)
        assert got.dtype == dense.dtype == torch.bfloat16
        z = gates["in:heads"].values() if gated else None
        expected = masked(linear, x, z, None)
        if not gated:
            assert torch.equal(got, dense)
        assert (got - expected).abs().max() <= 2 * (dense - linear(x)).abs().max()
        upstream = torch.randn_like(got)
        grads = torch.autograd.grad(got, (x, module.weight, module.bias), upstream)
        truth = torch.autograd.grad(expected, (x, linear.weight, linear.bias), upstream.float())
        for mine, theirs in zip(grads, truth, strict=True):
            assert mine.dtype == torch.float32
            assert (mine - theirs).norm() <= 0.01 * theirs.norm()

    def test_autocast_leaves_fp64_alone(self):
        gates = gates_for()
        linear = plain(torch.float64)
        module = gated_twin(linear, gates["in:heads"])
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                module(tokens(torch.float64)).dtype
                == linear(tokens(torch.float64)).dtype
                == torch.float64
            )

    def test_deepcopy(self):
        gates = gates_for()
        gated = gated_twin(plain(), gates["in:heads"], gates["out:channels"])
        expected = gated(tokens())
        twin = copy.deepcopy(gated)
        assert torch.equal(twin(tokens()), expected)
        with torch.no_grad():
            twin.weight.zero_()
            twin.site.in_gate._set.logits.fill_(-2.0)
        assert torch.equal(gated(tokens()), expected)


@pytest.mark.parametrize("state", ["gated", "packed", "adapted"])
@pytest.mark.parametrize("units", [("heads", "channels"), ("rows", "columns")])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_models_pickle_and_copy(model_type, units, state):
    model = tiny_model(model_type, torch.float32)
    gates = gp.attach(model, gp.GateConfig(units=units, target=0.5, noise=0.0, width_multiple=1))
    gates.snap()
    if state != "gated":
        gp.pack(model)
    if state == "adapted":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    expected = model.eval()(token_ids()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert [type(module) for module in twin.modules()] == [
            type(module) for module in model.modules()
        ]
        assert torch.equal(twin(token_ids()).logits, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(token_ids()).logits, expected)


class TestGates:
    @pytest.mark.parametrize("shape", [(), (7,), (0,), (2, 3)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("which", ["in", "out", "both"])
    def test_equals_the_masked_linear(self, which, bias, shape):
        gates = gates_for()
        in_gate = gates["in:heads"] if which != "out" else None
        out_gate = gates["out:channels"] if which != "in" else None
        linear = plain(torch.float64, bias)
        gated = gated_twin(linear, in_gate, out_gate)
        x = torch.randn(*shape, K, dtype=torch.float64).requires_grad_()
        flat = gates.deterministic_values().detach().double().requires_grad_()
        z = gates.split(flat)
        expected = masked(
            linear, x, z["in:heads"] if in_gate else None, z["out:channels"] if out_gate else None
        )
        got = gated(x)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=0, atol=1e-14)
        upstream = torch.randn_like(got)
        got.backward(upstream)
        mine = [x.grad, *(p.grad for p in gated.parameters()), gates.value_grads()]
        theirs = torch.autograd.grad(expected, (x, *linear.parameters(), flat), upstream)
        open_units = flat > 0
        for a, b in zip(mine[:-1], theirs[:-1], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)
        assert torch.allclose(
            mine[-1][open_units].double(), theirs[-1][open_units], rtol=1e-5, atol=1e-6
        )

    def test_closed_rows_are_exact_zeros(self):
        gates = gates_for()
        gates.close("out:channels", [0, 7])
        y = gated_twin(plain(), None, gates["out:channels"])(tokens())
        assert (y[..., [0, 7]] == 0).all() and (
            y[..., gates["out:channels"].values() > 0] != 0
        ).any()

    @pytest.mark.parametrize("unit", ["in:heads", "out:channels"])
    def test_all_closed(self, unit):
        gates = gates_for()
        gates.close(unit, range(gates[unit].size))
        linear = plain()
        gated = gated_twin(linear, **{unit.split(":")[0] + "_gate": gates[unit]})
        expected = linear.bias.expand(3, 5, N) if unit == "in:heads" else torch.zeros(3, 5, N)
        assert torch.equal(gated(tokens()), expected)

    def test_standalone_use_follows_the_logits(self):
        gates = gates_for()
        linear = plain(torch.float64)
        gated = gated_twin(linear, gates["in:heads"], gates["out:channels"])
        optimizer = torch.optim.SGD(gates.parameters(), lr=0.5)
        x = tokens(torch.float64)
        for _ in range(2):
            optimizer.zero_grad()
            y = gated(x)
            z = gates.split(gates.deterministic_values())
            assert torch.allclose(
                y, masked(linear, x, z["in:heads"], z["out:channels"]), rtol=0, atol=1e-14
            )
            y.backward(torch.randn_like(y))
            assert gates.logits.grad.abs().max() > 0
            optimizer.step()

    def test_gate_must_cover_the_features(self):
        gates = gates_for()
        with pytest.raises(
            ValueError, match="in_gate must cover 20 features, got 6 units of 4 lanes: 'in:heads'"
        ):
            gp.GatedLinear(20, N, in_gate=gates["in:heads"])
        with pytest.raises(
            ValueError, match="out_gate must cover 15 features, got 16 units of 1 lanes"
        ):
            gp.GatedLinear(K, 15, out_gate=gates["out:channels"])

    def test_wrong_x_is_refused(self):
        gates = gates_for()
        with pytest.raises(ValueError, match=r"x must have 24 features, got shape \(2, 7\)"):
            gated_twin(plain(), gates["in:heads"])(torch.randn(2, 7))


class TestSwapping:
    def test_gate_and_ungate_share_parameters_hooks_and_training_mode(self):
        linear = plain().eval()
        linear.note = "kept"
        calls = []
        linear.register_forward_hook(lambda *_: calls.append(1))
        gated = gate_linear(linear, Site())
        assert type(gated) is gp.GatedLinear and is_gated(gated) and not is_gated(linear)
        assert gated.weight is linear.weight and gated.note == "kept" and not gated.training
        gated(tokens())
        assert calls == [1]
        back = ungate_linear(gated)
        assert (
            type(back) is nn.Linear and back.weight is linear.weight and not hasattr(back, "site")
        )

    def test_subclasses_keep_their_class(self):
        class Special(nn.Linear):
            pass

        gated = gate_linear(Special(K, N), Site())
        assert isinstance(gated, Special) and is_gated(gated)
        assert type(gated) is type(gate_linear(Special(K, N), Site()))
        assert type(ungate_linear(gated)) is Special

    def test_conv1d(self):
        conv = tiny_model("gpt2").transformer.h[0].mlp.c_fc
        assert is_conv1d(conv) and not is_conv1d(plain())
        gated = gate_linear(conv, Site())
        x = torch.randn(3, 48, dtype=torch.float64)
        assert isinstance(gated, type(conv))
        assert torch.allclose(gated(x), conv(x), rtol=0, atol=1e-13)
        assert type(ungate_linear(gated)) is type(conv)

    def test_replaced_forward_is_refused(self):
        linear = plain()
        linear.forward = lambda x: x
        with pytest.raises(ValueError, match="forward of a Linear has been replaced"):
            gate_linear(linear, Site())

    def test_operands(self):
        linear = plain()
        assert operands_of(linear).w is linear.weight and operands_of(linear).adapters == ()
        assert base_linear(linear) is linear and why_not_sliced(linear) == ""
        assert operands_of(nn.Identity()) == "Identity is not a linear that gatepack can take apart"

        class Quantized(nn.Parameter):
            pass

        linear.weight = Quantized(torch.zeros(N, K))
        assert operands_of(linear) == why_not_sliced(linear) == "its weight is a Quantized"


class TestPackedLinear:
    def test_repr_and_shape(self):
        linear = plain()
        packed = gp.PackedLinear.from_linear(
            linear, nn.Parameter(torch.ones(8, 10)), nn.Parameter(torch.zeros(8))
        )
        assert repr(packed) == (
            "PackedLinear(in_features=10, out_features=8, bias=True, packed from 24 -> 16)"
        )
        assert packed.dense_shape == (N, K) and linear.weight.shape == (N, K)
        assert torch.equal(packed(torch.ones(2, 10)), torch.full((2, 8), 10.0))
        again = gp.PackedLinear.from_linear(packed, nn.Parameter(torch.ones(4, 10)), None)
        assert again.dense_shape == (N, K) and again.bias is None
