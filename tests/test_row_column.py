"""Gates on rows and columns: exact closure, counts on zeros, packing, saving and refusals."""

import copy
import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.families import FAMILIES
from gatepack.layers import layers_of
from gatepack.modules import base_linear, linear_shape, weight_matrix
from gatepack.row_column_packing import IndexedLinear

CONFIG = gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.5)


def gated(family, dtype=torch.float64, config=CONFIG, seed=0):
    model = tiny_model(family, dtype).eval()
    gates = gp.attach(model, config)
    scatter_logits(gates, seed)
    return model, gates


def scatter_logits(gates, seed=0) -> None:
    """A quarter of the gates exactly 0, the others fractional or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gates.logits.copy_(torch.randn(gates.logits.shape, generator=generator) * 0.8)


def multiply_rows_and_columns(model, values):
    """The published computation: y = z_rows * (W (z_columns * x) + b), by hooks, at full width."""
    for name in {key.rpartition(":")[0] for key in values}:
        linear = model.get_submodule(name)
        columns, rows = values[f"{name}:columns"], values[f"{name}:rows"]

        def before(module, args, z=columns):
            return (args[0] * z.to(args[0].dtype),)

        def after(module, args, output, z=rows):
            return output * z.to(output.dtype)

        linear.register_forward_pre_hook(before)
        linear.register_forward_hook(after)
    return model


def raw_values(gates) -> dict[str, torch.Tensor]:
    """Gate values without closure across linears."""
    return gates.split(gates.estimator.values(gates.logits))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_masked_model_with_every_gradient(family):
    model, gates = gated(family)
    logits = gates.logits.detach().double().requires_grad_()
    values = gates.split(gates.estimator.values(logits))
    dense = multiply_rows_and_columns(tiny_model(family).eval(), values)
    ids = token_ids()
    ours, theirs = model(ids).logits, dense(ids).logits
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * scale)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3))
    ours.backward(upstream)
    theirs.backward(upstream)
    size = float(logits.grad.abs().max())
    torch.testing.assert_close(gates.logits.grad.double(), logits.grad, rtol=1e-4, atol=1e-6 * size)
    expected = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in expected:
            size = float(expected[name].grad.abs().max()) + 1e-9
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5 * size
            )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_closure_only_adds_and_is_stable(family):
    _, gates = gated(family)
    before = gates.estimator.values(gates.logits) > 0
    after = gates.couple(before)
    assert bool((after <= before).all()) and int(after.sum()) < int(before.sum())
    assert torch.equal(gates.couple(after), after)
    assert bool(gates.couple(torch.ones_like(before)).all())


def test_closure_of_a_channel_a_value_lane_and_a_rotated_pair():
    model = tiny_model("llama").eval()
    gates = gp.attach(model, CONFIG)
    layer = layers_of(model)[0].name
    gates.close(f"{layer}.mlp.up_proj:rows", [3])
    gates.close(f"{layer}.mlp.down_proj:columns", [5])
    gates.close(f"{layer}.self_attn.v_proj:rows", [9])  # lane 1 of key/value head 1
    gates.close(f"{layer}.self_attn.k_proj:rows", [2])  # its partner, lane 6, stays
    gates.close(f"{layer}.self_attn.k_proj:rows", [11, 15])  # a whole pair of key/value head 1
    # Lane 4 of key/value head 0 goes once the three query heads that read it have gone.
    gates.close(f"{layer}.self_attn.o_proj:columns", [4, 12, 20])
    closed = {
        name.removeprefix(f"{layer}."): (~mask).nonzero().squeeze(1).tolist()
        for name, mask in gates.open_masks().items()
        if not mask.all()
    }
    assert closed == {
        "self_attn.q_proj:rows": [24 + 3, 24 + 7, 32 + 3, 32 + 7, 40 + 3, 40 + 7],
        "self_attn.k_proj:rows": [2, 11, 15],
        "self_attn.v_proj:rows": [4, 9],
        "self_attn.o_proj:columns": [4, 12, 20, 25, 33, 41],
        "mlp.gate_proj:rows": [3, 5],
        "mlp.up_proj:rows": [3, 5],
        "mlp.down_proj:columns": [3, 5],
    }


def test_kept_fraction_counts_rows_times_columns():
    model, gates = gated("llama")
    masks = gates.open_masks()
    kept = total = 0
    for layer in layers_of(model):
        for path in layer.family.linears:
            name = f"{layer.name}.{path}"
            n, k = linear_shape(base_linear(model.get_submodule(name)))
            kept += int(masks[f"{name}:rows"].sum()) * int(masks[f"{name}:columns"].sum())
            total += n * k
    assert gates.kept_fraction() == pytest.approx(kept / total)
    ones = torch.cat([mask.float() for mask in masks.values()])
    assert float(gates.costs.expected(ones)) == pytest.approx(kept / total, rel=1e-6)


def test_expected_kept_fraction_has_the_products_gradient():
    model = tiny_model("llama", torch.float32)
    config = gp.GateConfig(units=("rows", "columns"), targets=("*.0.mlp.*", "*.1.self_attn.q*"))
    gates = gp.attach(model, config)
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(gates.logits.shape, generator=generator).requires_grad_()
    parts = gates.split(probability)
    kept = gates.costs.fixed
    for name in gates.costs.shapes:
        kept = kept + parts[f"{name}:rows"].sum() * parts[f"{name}:columns"].sum()
    upstream = 3.0
    expected = torch.autograd.grad(upstream * kept / gates.costs.total, probability)
    found = gates.costs.expected(probability)
    torch.testing.assert_close(found, (kept / gates.costs.total).detach(), check_dtype=False)
    torch.testing.assert_close(torch.autograd.grad(upstream * found, probability), expected)


def test_default_training_meets_the_budget_on_rows_and_columns():
    model = tiny_model("llama", torch.float32).train()
    gp.attach(model, gp.GateConfig(units=("rows", "columns"), target=0.6))
    training = gp.GateTraining(model, 20)
    optimizer = torch.optim.AdamW(training.weights(), lr=1e-3)
    for step in range(20):
        ids = token_ids(2, 6, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(training.finish() - 0.6) <= 0.005
    assert abs(gp.pack(model).kept_fraction - 0.6) <= 0.005


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packs_unpacks_saves_and_reloads(family, tmp_path):
    model, gates = gated(family, torch.float32)
    ids = token_ids()
    expected = model(ids).logits.detach()
    kept = gates.kept_fraction()
    masks = gates.open_masks()
    report = gp.pack(model)
    assert report.kept_fraction == pytest.approx(kept)
    packed = model(ids).logits.detach()
    scale = float(expected.abs().max())
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5 * scale)
    gp.save_pretrained(model, tmp_path)
    again = gp.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, packed)
    with pytest.raises(ValueError, match="packed by rows and columns; put it back"):
        gp.attach(again)
    kept_masks = gp.unpack(again)
    assert all(torch.equal(kept_masks[name], mask) for name, mask in masks.items())
    dense = tiny_model(family, torch.float32)
    for layer in layers_of(again):
        for path in layer.family.linears:
            linear = layer.linear(path)
            assert type(linear) is type(layers_of(dense)[0].linear(path))
            name = f"{layer.name}.{path}"
            gone = ~torch.outer(kept_masks[f"{name}:rows"], kept_masks[f"{name}:columns"])
            assert not weight_matrix(linear)[gone].any()
    torch.testing.assert_close(again(ids).logits, packed, rtol=1e-4, atol=1e-5 * scale)


def test_kernels_compute_the_same(monkeypatch):
    pytest.importorskip("triton")
    found = {}
    for path in ("folded", "triton"):
        monkeypatch.setenv("GATEPACK_BACKEND", path)
        model, gates = gated("llama", torch.float32)
        logits = model(token_ids(1, 5)).logits
        upstream = torch.Generator().manual_seed(1)
        logits.backward(torch.randn(logits.shape, generator=upstream))
        found[path] = (logits.detach(), gates.logits.grad)
    for ours, expected in zip(found["triton"], found["folded"], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * scale)


def test_mlp_hands_over_open_channels_only():
    model, _ = gated("llama", torch.float32)
    gp.pack(model)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.down_proj, IndexedLinear) and mlp.down_proj.compact == (False, True)
    seen = {}
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(width=args[0].shape[-1]))
    model(token_ids())
    assert seen["width"] == mlp.down_proj.in_features < 40


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_side_and_closed_linears(side, tmp_path):
    model = tiny_model("bert", torch.float32).eval()
    gates = gp.attach(model, gp.GateConfig(units=(side,), noise=0.0))
    scatter_logits(gates)
    for part in ("intermediate.dense", "output.dense", "attention.self.query"):
        name = f"bert.encoder.layer.0.{part}:{side}"
        gates.close(name, range(gates[name].size))
    ids = token_ids()
    expected = model(ids).logits.detach()
    gp.pack(model)
    packed = model(ids).logits.detach()
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    gp.save_pretrained(model, tmp_path)
    assert torch.equal(gp.from_pretrained(tmp_path).eval()(ids).logits, packed)


def test_lora_is_inside_the_gates():
    peft = pytest.importorskip("peft")
    model, gates = gated("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora).eval()
    ids = token_ids()
    ours = wrapped(ids).logits
    plain = tiny_model("llama")
    torch.manual_seed(0)
    plain = peft.get_peft_model(plain, lora).eval()
    merged = plain.merge_and_unload()
    dense = multiply_rows_and_columns(merged, raw_values(gates))
    torch.testing.assert_close(ours, dense(ids).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="carries an adapter. Merge it first"):
        gp.pack(wrapped)
    plain = wrapped.merge_and_unload()
    gp.pack(plain)
    torch.testing.assert_close(plain(ids).logits, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_on_packed_linears(dora, tmp_path):
    """As on the dense linears, with the factors and gradients of closed rows and columns cut."""
    peft = pytest.importorskip("peft")
    model, _ = gated("llama")
    gp.pack(model)
    dense = copy.deepcopy(model)
    gp.unpack(dense)
    if dora:  # loaded again, which must let adapters in as well
        gp.save_pretrained(model, tmp_path)
        model = gp.from_pretrained(tmp_path, dtype=torch.float64)
    indexed = model.model.layers[0].self_attn.q_proj
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], use_dora=dora)
    wrapped = peft.get_peft_model(model, lora).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids = token_ids()
    output = wrapped(ids).logits
    tuner = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    assert tuner.lora_A["default"].weight.shape[1] == indexed.weight.shape[1] < 48
    assert tuner.lora_B["default"].weight.shape[0] == indexed.weight.shape[0] < 48
    if not dora:  # the dense model with adapters that are 0 where rows and columns are closed
        reference = peft.get_peft_model(dense, lora)
        factors = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
        for name, parameter in reference.named_parameters():
            if name in factors:
                path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
                rows, columns = model.get_submodule(path).get_base_layer().masks
                full = torch.zeros_like(parameter)
                kept = (slice(None), columns) if "lora_A" in name else (rows, slice(None))
                full[kept] = factors[name].detach()
                parameter.data = full
        torch.testing.assert_close(output, reference(ids).logits, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_" in n]
    assert all(grad.abs().max() > 0 for grad in grads)
    merged = wrapped.eval().merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, output, rtol=1e-5, atol=1e-6)
    assert type(merged.model.layers[0].self_attn.q_proj) is type(indexed)


@pytest.mark.parametrize("adapted", [False, True])
def test_packed_model_runs_in_several_threads(adapted, monkeypatch):
    model, _ = gated("llama")
    gp.pack(model)
    if adapted:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora).eval()
    ids = token_ids()
    expected = model(ids).logits
    linear, met = F.linear, []

    def meet(*args):
        """The product of a linear, in the first of which another thread runs the whole model."""
        if not met:
            met.append("on the way")
            with ThreadPoolExecutor(1) as pool:
                met.append(pool.submit(model, ids).result().logits)
        return linear(*args)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", meet)
        outer = model(ids).logits
    for logits in (outer, met[1], model(ids).logits):
        assert torch.equal(logits, expected)


def test_adapter_around_an_adapter_on_packed_linears():
    peft = pytest.importorskip("peft")
    from adapters import lora_around

    model, _ = gated("llama")
    gp.pack(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    ids = token_ids()
    model(ids)
    mlp = model.get_base_model().model.layers[0].mlp
    inner = mlp.up_proj
    mlp.up_proj = lora_around(inner, "outer", config).double()
    with torch.no_grad():
        merged = copy.deepcopy(model)
        base = merged.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
        for tuner, name in ((inner, "default"), (mlp.up_proj, "outer")):
            base.weight += tuner.get_delta_weight(name)
        merged.get_base_model().model.layers[0].mlp.up_proj = base
        torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-9, atol=1e-9)


def test_budget_of_exact_zeros_is_met():
    model = tiny_model("llama", torch.float32).eval()
    gates = gp.attach(model, gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.6))
    torch.manual_seed(0)
    kept = gates.snap({name: torch.randn(gate.size) for name, gate in gates.items()})
    assert abs(kept - 0.6) <= 0.005 and gates.kept_fraction() == kept
    assert abs(gp.pack(model).kept_fraction - 0.6) <= 0.005


def test_rows_are_kept_in_multiples():
    model = tiny_model("llama", torch.float32, intermediate_size=160, num_hidden_layers=6).eval()
    config = gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.6, width_multiple=4)
    gates = gp.attach(model, config)
    torch.manual_seed(0)
    scores = {name: torch.rand(gate.size) for name, gate in gates.items()}
    plan = gates.plan(scores)
    assert abs(plan.kept_fraction - 0.6) <= 0.005 and plan.width_multiple == 4
    counts = {n: int(m.sum()) for n, m in plan.masks.items() if n.endswith("rows")}
    in_multiples = [count % 4 == 0 for count in counts.values()]
    assert sum(in_multiples) >= 0.9 * len(counts)
    assert all(ok for n, ok in zip(counts, in_multiples, strict=True) if "mlp" in n)
    for name, mask in plan.masks.items():
        if name.endswith("columns") and "down" not in name and "o_proj" not in name:
            threshold = scores[name][mask].min()
            assert bool((scores[name][~mask] <= threshold).all())
    flat = torch.cat(list(plan.masks.values()))
    assert torch.equal(gates.couple(flat), flat)


def test_multiple_is_refined_and_logged(caplog):
    model = tiny_model("llama", torch.float32).eval()
    config = gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.6, width_multiple=16)
    gates = gp.attach(model, config)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="gatepack.budget"):
        plan = gates.plan({name: torch.rand(gate.size) for name, gate in gates.items()})
    assert abs(plan.kept_fraction - 0.6) <= 0.005 and plan.width_multiple == 4
    assert [record.getMessage() for record in caplog.records] == [
        "width_multiple 16 cannot meet the target 0.6000 within 0.5 %; using 4"
    ]


def test_unreachable_target_names_the_nearest():
    model = tiny_model("llama", torch.float32, num_hidden_layers=1, intermediate_size=20)
    targets = ("*.gate_proj", "*.up_proj")  # a channel is 1.1 % of the weights
    gates = gp.attach(model, gp.GateConfig(units=("rows",), target=0.9522, targets=targets))
    message = (
        "target=0.9522 cannot be met within 0.5% of the params: the nearest reachable kept "
        r"fraction is 0\.9574\. Choose that or gate more linears"
    )
    with pytest.raises(ValueError, match=message):
        gates.plan({name: torch.arange(gate.size) for name, gate in gates.items()})


@pytest.mark.parametrize("target", [0.3, 0.61, 0.9])
def test_targets_are_met_before_scores_are_known(target):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(units=("rows", "columns"), target=target))
    assert abs(gates.check_target() - target) <= 0.005
    with pytest.raises(ValueError, match="masks: expected None, because rows and columns"):
        gates.check_target({})


def test_every_linear_and_the_tied_head():
    config = gp.GateConfig(units=("rows", "columns"), noise=0.0, targets=("*",))
    untied = tiny_model("llama", torch.float32, tie_word_embeddings=False).eval()
    gates = gp.attach(untied, config)
    assert "lm_head:rows" in gates
    gates.close("lm_head:rows", [7])
    logits = untied(token_ids()).logits
    assert not logits[..., 7].any() and logits[..., 8].any()
    gp.pack(untied)
    torch.testing.assert_close(untied(token_ids()).logits, logits, rtol=1e-4, atol=1e-4)
    tied = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head', whose weight is also 'model.embed_tokens"):
        gp.attach(tied, config)


def test_refusals_name_the_setting():
    with pytest.raises(ValueError, match="units must be among .*'heads'.* or among .*'rows'"):
        gp.GateConfig(units=("heads", "rows"))
    with pytest.raises(ValueError, match="matches nothing that can be gated"):
        gp.attach(tiny_model("llama"), gp.GateConfig(units=("rows",), targets=("encoder.*",)))
    _, gates = gated("llama")
    with pytest.raises(
        ValueError, match=r"scores\['model.*_proj:rows'\]: expected \[48\], got None"
    ):
        gates.plan({})


def test_gated_model_is_copied_saved_and_moved(tmp_path):
    model, gates = gated("llama", torch.float32)
    expected = model(token_ids()).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(token_ids()).logits, expected)
    gp.save_pretrained(model, tmp_path)
    again = gp.from_pretrained(tmp_path).eval()
    assert torch.equal(again(token_ids()).logits, expected)
    assert gp.gates_of(model.to(torch.bfloat16)).logits.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing():
    found = {}
    for saving in (False, True):
        model, gates = gated("llama", config=dataclasses.replace(CONFIG, noise=0.1))
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = token_ids()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found[saving] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[False].keys() == found[True].keys() and "gatepack_gates.logits" in found[True]
    for name, grad in found[True].items():
        torch.testing.assert_close(grad, found[False][name], msg=name)


def test_dora_is_inside_the_gates():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, use_dora=True, init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora).eval()

    model, gates = gated("llama")
    wrapped, reference = adapted(model), adapted(tiny_model("llama"))
    gates.unfreeze()
    logits = gates.logits.detach().double().requires_grad_()
    values = gates.split(gates.estimator.values(logits))
    multiply_rows_and_columns(reference.get_base_model(), values)
    ids = token_ids()
    ours, theirs = wrapped(ids).logits, reference(ids).logits
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * scale)
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    size = float(logits.grad.abs().max())
    torch.testing.assert_close(gates.logits.grad.double(), logits.grad, rtol=1e-4, atol=1e-6 * size)
    factors = {n: p for n, p in wrapped.named_parameters() if "lora_" in n and p.requires_grad}
    assert any("magnitude" in name for name in factors)
    for name, parameter in reference.named_parameters():
        if name in factors:
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                factors[name].grad, parameter.grad, rtol=1e-5, atol=1e-6 * size, msg=name
            )
