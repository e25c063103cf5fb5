"""ATP: regularisers against literal fp64 transcriptions, what the steps touch, what is refused."""

import math

import pytest
import torch
from atp_training import FAST, STEPS, generator_batches, loss_of, started, train
from tiny import tiny_model, token_ids
from torch.profiler import profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gatepack as gp
from gatepack import _ext, in_place
from gatepack.families import FAMILIES
from gatepack.functional import FoldedLinear
from gatepack.layers import layers_of
from gatepack.methods import ATP, atp
from gatepack.methods.group_lasso import lasso, proximal
from gatepack.methods.masked_lora import mask_linears, unmask_linears
from gatepack.modules import operands_of

pytest.importorskip("peft")
# GLM, GLM-4 and Phi turn neighbouring lanes, or the first of them only; the others have no RoPE.
ROTATED_HALVES = set(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text granite smollm3 starcoder2 "
    "modernbert olmo olmo2 olmo3 apertus arcee exaone4 hunyuan_v1_dense ministral ministral3 "
    "seed_oss".split()
)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kernels_compute_both_formulas(monkeypatch):
    pytest.importorskip("triton")
    found = {}
    for path in ("folded", "triton"):
        monkeypatch.setenv("GATEPACK_BACKEND", path)
        model, training = started("llama", torch.float32)
        loss_of(model, 0).backward()
        grads = [
            p.grad for name, p in model.named_parameters() if "layers.0" in name and "lora" in name
        ]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            values = float64([0.0, 0.3, 1.0])[torch.randint(3, training.decisions.hard.shape)]
        values = values.float().requires_grad_()
        model.eval()
        with training.decisions.softened(values):
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
        found[path] = [*grads, *torch.autograd.grad(loss, values)]
    for ours, expected in zip(found["triton"], found["folded"], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * scale)


def test_all_kept_is_plain_lora():
    model, training = started("llama", decide=False)
    ids = token_ids()
    for mode in (True, False):
        model.train(mode)
        ours = model(ids).logits
        unmask_linears(model, training.decisions)
        torch.testing.assert_close(ours, model(ids).logits, rtol=1e-9, atol=1e-9)
        mask_linears(model, training.decisions)


def test_dropout_is_between_a_and_b():
    model, training = started("llama", lora_dropout=0.5)
    module = model.model.layers[0].mlp.up_proj
    widths = []
    module.lora_dropout["default"].register_forward_pre_hook(
        lambda m, args: widths.append(args[0].shape[-1])
    )
    model(token_ids())
    assert widths == [3]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("per_head", [False, True])
def test_packed_model_is_the_evaluation_formula(family, per_head):
    model, training = started(family, per_head=per_head, final="sample")
    ids = token_ids()
    expected = model.eval()(ids).logits.detach()
    kept = training.finish()
    scale = float(expected.abs().max())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6 * scale)
    report = gp.pack(model)
    assert report.kept_fraction == pytest.approx(kept)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6 * scale)
    assert not any(hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tied_lanes_are_those_that_stay_zero_after_rope(family, monkeypatch):
    seen = []

    def spy(module, query, key, *args, **kwargs):
        seen.append((query, key))
        return sdpa_attention_forward(module, query, key, *args, **{**kwargs, "softcap": None})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
    model, training = started(family, final="sample")
    dim = layers_of(model)[0].head_dim
    tied = training.decisions.layout.lengths[0] == dim // 2
    assert tied == (family in ROTATED_HALVES)
    if not tied:
        return
    model.eval().set_attn_implementation("spy")
    training.finish()
    model(token_ids())
    lengths, hard = training.decisions.layout.lengths, training.decisions.hard
    assert len(seen) == training.decisions.layout.layers
    for layer, states in enumerate(seen):
        start = layer * sum(lengths)
        kept = hard[start : start + lengths[0]].repeat(2)
        for x in states:
            assert torch.equal(x.abs().amax((0, 1, 2)) > 0, kept)


class TestRegularisers:
    def test_lasso_is_the_published_one_without_its_floor(self):
        model, training = started("llama")
        decisions = training.decisions
        total = groups = 0
        for place in decisions.layout.places:
            (adapter,) = operands_of(model.get_submodule(place.name)).adapters
            vectors = adapter.a.t() if place.rows is None else adapter.b
            for j, vector in enumerate(vectors.tolist()):
                m = float(decisions.hard[decisions.index[place.name][j]])
                total += math.sqrt(sum(((1 - m) * w) ** 2 for w in vector) + 1e-8)
                groups += 1
        floor = groups * 1e-4 / 6
        found = lasso(model, decisions).detach()
        assert float(found) == pytest.approx(total / 6 - floor, rel=1e-9)

    def test_lasso_is_zero_when_the_pruned_groups_are(self):
        model, training = started("llama", torch.float32)
        proximal(model, training.decisions, 1e9)
        assert float(lasso(model, training.decisions)) == 0

    def test_proximal_is_the_published_one(self):
        model, training = started("llama")
        decisions, layout = training.decisions, training.decisions.layout
        before = {
            p.name: [
                (a.a if p.rows is None else a.b).detach().clone()
                for a in operands_of(model.get_submodule(p.name)).adapters
            ][0]
            for p in layout.places
        }
        squares = [0.0] * len(layout.costs)
        for place in layout.places:
            vectors = before[place.name].t() if place.rows is None else before[place.name]
            for j, vector in zip(
                decisions.index[place.name].tolist(), vectors.tolist(), strict=True
            ):
                squares[j] += sum(w * w for w in vector)
        hard = decisions.hard.tolist()
        pruned = hard.count(False)
        strength = 40.0
        proximal(model, decisions, strength)
        for place in layout.places:
            (adapter,) = operands_of(model.get_submodule(place.name)).adapters
            old, new = before[place.name], (adapter.a if place.rows is None else adapter.b)
            old, new = (old.t(), new.t()) if place.rows is None else (old, new)
            for row, j in enumerate(decisions.index[place.name].tolist()):
                if hard[j]:
                    assert torch.equal(new[row], old[row])
                    continue
                layer, within = divmod(j, sum(layout.lengths))
                first = 0
                for length in layout.lengths:
                    if within < first + length:
                        break
                    first += length
                start = layer * sum(layout.lengths) + first
                share = hard[start : start + length].count(False) / pruned
                norm = math.sqrt(squares[j])
                scale = max(0.0, norm - strength * share) / norm
                torch.testing.assert_close(new[row], old[row] * scale, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("early", [False, True])
    @pytest.mark.parametrize(("frozen", "weight"), [(False, 0.03), (True, 100.0)])
    def test_lasso_is_added_to_the_gradients_of_lora(self, frozen, weight, early):
        model, training = started("llama", torch.float32, freeze=1.0)
        training.frozen = frozen
        optimizer = torch.optim.SGD(training.weights(), lr=0.0)
        up = model.model.layers[0].mlp.up_proj.lora_B["default"].weight
        (task,) = torch.autograd.grad(loss_of(model, 0), up)
        closed = ~training.decisions.hard[training.decisions.index["model.layers.0.mlp.up_proj"]]
        expected = torch.zeros_like(task, dtype=torch.float64)
        for row in closed.nonzero().squeeze(1).tolist():
            values = up[row].tolist()
            norm = math.sqrt(sum(v * v for v in values) + 1e-8)
            expected[row] = float64([weight * v / norm / 6 for v in values])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        if early:
            training.begin_step(scaler.get_scale())
        scaler.scale(loss_of(model, 0)).backward()
        training.step(scaler.get_scale())
        scaler.unscale_(optimizer)
        torch.testing.assert_close((up.grad - task).double(), expected, rtol=1e-3, atol=1e-4)
        assert closed.any() and not closed.all()

    @pytest.mark.parametrize("done", [0, 3, 11])
    def test_projection_grows_as_published_and_follows_the_step(self, done):
        model, training = started(
            "llama", regulariser="proximal", proximal_rate=1e-6, freeze=1.0, offset=0.0
        )
        training.done = done
        optimizer = torch.optim.SGD(training.weights(), lr=0.1)
        loss_of(model, 0).backward()
        training.step()
        optimizer.step()
        decisions, layout = training.decisions, training.decisions.layout
        hard, squares = decisions.hard.tolist(), [0.0] * len(decisions.hard)
        for place in layout.places:
            (adapter,) = operands_of(model.get_submodule(place.name)).adapters
            vectors = (adapter.a.t() if place.rows is None else adapter.b).tolist()
            indices = decisions.index[place.name].tolist()
            for j, vector in zip(indices, vectors, strict=True):
                squares[j] += sum(w * w for w in vector)
        strength = 5e4 * (math.exp((done + 1) / STEPS) - 1) / (math.e - 1) * 1e-6
        share = sum(not hard[j] for j in indices) / hard.count(False)
        model(token_ids())
        after = adapter.a.detach().t()
        assert 0 < share < 1
        for row, (j, vector) in enumerate(zip(indices, vectors, strict=True)):
            norm = math.sqrt(squares[j])
            scale = 1.0 if hard[j] else max(0.0, norm - strength * share) / norm
            expected = float64([scale * w for w in vector])
            torch.testing.assert_close(after[row], expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("regulariser", ["lasso", "proximal"])
    def test_pruned_lora_shrinks_after_the_freeze(self, regulariser):
        model, training = started(
            "llama", torch.float32, 50, regulariser=regulariser, freeze=0.12, proximal_rate=1e-2
        )
        optimizer = train(model, training, until=6)
        assert training.frozen
        before = training.metrics()["gates/pruned_lora"]
        train(model, training, optimizer, until=50)
        assert training.metrics()["gates/pruned_lora"] < 0.3 * before


def test_decisions_are_fp32_in_a_bf16_model(monkeypatch):
    """The released code lost logits and noise to bf16 for a while."""
    seen = []
    real = atp.gumbel_sigmoid
    monkeypatch.setattr(
        atp, "gumbel_sigmoid", lambda *a: seen.extend(t.dtype for t in a[:2]) or real(*a)
    )
    model = tiny_model("llama", torch.bfloat16).train()
    training = ATP(**FAST).start(model, STEPS, generator_batches())
    train(model, training, until=2)
    assert {p.dtype for p in training.generator.parameters()} == {torch.float32}
    assert len(seen) == 2 * (1 + 2 * 2) and set(seen) == {torch.float32}


def test_evaluation_draws_nothing():
    model, training = started("llama", decide=False, generator_rate=0.1)
    train(model, training, until=4)
    decisions, state = training.decisions.hard.clone(), torch.get_rng_state()
    model.eval()
    with torch.no_grad():
        first, second = (model(token_ids()).logits for _ in range(2))
    assert torch.equal(first, second) and torch.equal(training.decisions.hard, decisions)
    assert torch.equal(torch.get_rng_state(), state)


def test_generator_step_pays_for_no_lora_gradient():
    model, training = started("llama", torch.float32)
    loss_of(model, 0).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    asked = []
    module = model.model.layers[1].mlp.gate_proj
    module.register_forward_hook(
        lambda m, args, y: asked.append((m.lora_A["default"].weight.requires_grad, m.training))
    )
    before = [p.detach().clone() for p in training.generator.parameters()]
    training._generator_step()
    assert asked == [(False, False)]
    assert model.training and module.lora_A["default"].weight.requires_grad
    for name, parameter in model.named_parameters():
        if name in grads:
            assert torch.equal(parameter.grad, grads[name])
    moved = zip(before, training.generator.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def test_hard_loss_is_that_of_the_packed_model(monkeypatch):
    model, training = started("llama", offset=0.5, hard_loss=True)
    losses, drawn, real = [], [], atp.gumbel_sigmoid
    monkeypatch.setattr(atp, "gumbel_sigmoid", lambda *a: drawn.append(real(*a)) or drawn[-1])
    handle = model.register_forward_hook(lambda m, args, output: losses.append(output.loss))
    training._generator_step()
    handle.remove()
    training.decisions.set(drawn[0] >= 0.5)
    assert 0.3 < float(training.decisions.hard.double().mean()) < 0.9
    training.frozen = True
    training.finish()
    gp.pack(model)
    ids = generator_batches()[0]
    expected = model.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-6)


def test_decisions_cross_to_the_host_once(monkeypatch):
    """For all linears together, and only where a path asks which rows are kept."""
    model, training = started("llama", torch.float32)
    model(token_ids())
    decisions, crossed, real = training.decisions, [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: crossed.append(x) or real(x))
    decisions.set(~decisions.hard)
    assert not crossed
    for _ in range(2):
        model(token_ids())
    assert len(crossed) == 1 and crossed[0] is decisions.hard
    for place in decisions.layout.places:
        rows = decisions.open_rows(place)
        if place.rows is None:
            assert rows is None
        else:
            assert torch.equal(rows, decisions.hard[place.rows].nonzero().squeeze(1))


def test_pruned_rows_of_the_frozen_path_are_not_computed(folded, monkeypatch):
    widths = []
    real = FoldedLinear.apply
    monkeypatch.setattr(FoldedLinear, "apply", lambda *a: widths.append(len(a[5])) or real(*a))
    model, training = started("llama", torch.float32)
    model(token_ids())
    decisions = training.decisions
    expected = [
        int(decisions.hard[decisions.index[place.name]].sum())
        for place in decisions.layout.places
        if place.rows is not None
    ]
    assert sorted(widths) == sorted(expected)


@pytest.mark.skipif(_ext.backend().name == "torch", reason="gatepack._C could not be built")
def test_few_tokens_multiply_the_kept_rows_in_place(monkeypatch):
    found = []
    for most in (in_place.few_tokens, dict):
        monkeypatch.setattr(in_place, "few_tokens", most)
        model, training = started("llama", torch.float32)
        with profile() as trace:
            loss = loss_of(model, 0)
        calls = sum(event.name == "gatepack::open_linear" for event in trace.events())
        found.append((calls, torch.autograd.grad(loss, training.weights())))
    (calls, ours), (none, dense) = found
    assert none == 0
    assert calls == sum(place.rows is not None for place in training.decisions.layout.places)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


class TestErrors:
    def test_no_batches(self):
        with pytest.raises(ValueError, match="batches: expected at least one for the generator"):
            ATP().start(tiny_model("llama", torch.float32), 4)

    def test_adapters_that_leave_linears_out(self):
        import peft

        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(tiny_model("llama", torch.float32), lora)
        with pytest.raises(ValueError, match="k_proj has no LoRA, which ATP trains on every"):
            ATP().start(model, 4, generator_batches())

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_dora(self, wrapped):
        import peft

        model = tiny_model("llama", torch.float32)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True)
        if wrapped:
            model = peft.get_peft_model(model, lora)
        else:
            peft.inject_adapter_in_model(lora, model)
        classes = [type(module) for module in model.modules()]
        message = (
            r"layers\.0\.self_attn\.q_proj cannot be masked by decisions: adapter 'default' is a "
            r"DoraLinearVariant; ATP trains plain LoRA \(LoraConfig without use_dora"
        )
        method = ATP(**FAST)
        for refused in (
            lambda: method.prepare(model),
            lambda: method.start(model, 4, generator_batches()),
        ):
            with pytest.raises(ValueError, match=message):
                refused()
        assert [type(module) for module in model.modules()] == classes
        assert model(input_ids=token_ids()).logits.isfinite().all()

    def test_quantized_weights(self):
        class Quantized(torch.Tensor):
            pass

        model = tiny_model("llama", torch.float32)
        down = model.model.layers[1].mlp.down_proj
        down.weight = torch.nn.Parameter(down.weight.detach().as_subclass(Quantized))
        before = model.state_dict().keys()
        with pytest.raises(
            ValueError, match=r"1\.mlp\.down_proj cannot .* weight is a Quantized; "
        ):
            ATP().prepare(model)
        assert model.state_dict().keys() == before

    def test_gates(self):
        model = tiny_model("llama", torch.float32)
        gp.attach(model)
        with pytest.raises(ValueError, match="model has gates: take them off"):
            ATP().start(model, 4, generator_batches())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target": 1.0}, r"target: expected a kept fraction in \(0, 1\), got 1.0"),
            ({"freeze": 0.0}, "freeze: expected a fraction of all steps > 0, got 0.0"),
            ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
            ({"lasso_weight": -1.0}, "lasso_weight: expected a number >= 0, got -1.0"),
            ({"regulariser": "l2"}, "regulariser: expected one of .*'proximal'.*, got 'l2'"),
            ({"final": "best"}, "final: expected one of"),
            ({"lora_rank": 0}, "lora_rank: expected at least 1, got 0"),
            ({"lora_dropout": 1.0}, r"lora_dropout: expected a number in \[0, 1\), got 1.0"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ATP(**fields)
