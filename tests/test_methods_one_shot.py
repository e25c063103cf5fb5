"""One-shot methods: metrics against their formulas by loops, then prune, pack, save and tune."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny import fused_row, tiny_model, token_ids

import gatepack as gp
from gatepack import methods
from gatepack.layers import layers_of
from gatepack.methods.one_shot import comparable, ranks, run_beside_lora, worth
from gatepack.modules import weight_matrix
from gatepack.training import TrainConfig

GATES = gp.GateConfig(noise=0.0, target=0.7, width_multiple=2, equal_layers=False)
FAMILIES = ["llama", "glm", "phi3", "gpt_neox", "gpt2", "bert", "modernbert"]
NAMES = ["Magnitude", "WandaSP", "FLAP", "Taylor"]


def make(name: str, **fields):
    if name == "Taylor":
        fields = {"keep_first": 0, "keep_last": 0, **fields}
    return getattr(methods, name)(**{"gates": GATES, **fields})


def batches_for(model, count: int = 2) -> list[dict]:
    ids = [token_ids(batch=3, seed=seed) for seed in range(1, count + 1)]
    labels = torch.tensor([0, 1, 1])
    causal = model.can_generate()
    return [{"input_ids": i, "labels": i if causal else labels} for i in ids]


def recorded_inputs(model, batches) -> dict[str, torch.Tensor]:
    """Gate name -> [T, K] of what its out or down linear read, by hooks on the dense model."""
    seen: dict[str, list] = {}
    handles = []
    for layer in layers_of(model):
        for path, name in (
            (layer.family.out, f"{layer.heads_name}:heads"),
            (layer.family.down, f"{layer.channels_name}:channels"),
        ):

            def hook(module, args, output, name=name):
                seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

            handles.append(layer.module.get_submodule(path).register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model.eval()(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def readers(model) -> dict[str, tuple[torch.Tensor, int]]:
    """Gate name -> (W [N, K] of its out or down linear, lanes of a unit)."""
    found = {}
    for layer in layers_of(model):
        out = weight_matrix(layer.linear(layer.family.out)).detach()
        found[f"{layer.heads_name}:heads"] = (out, layer.head_dim)
        down = weight_matrix(layer.linear(layer.family.down)).detach()
        found[f"{layer.channels_name}:channels"] = (down, 1)
    return found


def coupled_weights(model, of) -> dict[str, list[list[tuple[torch.Tensor, float]]]]:
    """Gate name -> per unit the (vector, share) pairs of its rows and columns of of(linear)."""
    found = {}
    for layer in layers_of(model):
        family, dim = layer.family, layer.head_dim
        ratio = layer.queries // layer.kv_heads
        heads = []
        for head in range(layer.queries):
            parts = []
            for lane in range(head * dim, (head + 1) * dim):
                parts.append((of(layer.linear(family.out))[:, lane], 1.0))
                if family.qkv:
                    for block in range(3):
                        row = fused_row(layer, block, head, lane % dim)
                        share = 1 / ratio if block else 1.0
                        parts.append((of(layer.linear(family.qkv))[row], share))
                    continue
                parts.append((of(layer.linear(family.q))[lane], 1.0))
                row = (head // ratio) * dim + lane % dim
                for path in family.kv:
                    parts.append((of(layer.linear(path))[row], 1 / ratio))
            heads.append(parts)
        found[f"{layer.heads_name}:heads"] = heads
        down = of(layer.linear(family.down))
        width = down.shape[1]
        up = [row for path in family.up for row in of(layer.linear(path)).split(width)]
        found[f"{layer.channels_name}:channels"] = [
            [(down[:, j], 1.0), *((branch[j], 1.0) for branch in up)] for j in range(width)
        ]
    return found


def check_metric(method, model, batches, expected) -> None:
    gp.attach(model, GATES)
    metric = method.metric(model, batches)
    assert metric.keys() == expected.keys()
    for name, value in metric.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), torch.tensor(expected[name]).double(), rtol=1e-5, atol=1e-7
        )
    for name, value in method.score(model, batches).items():
        assert value.dtype == torch.float32 and value.shape == metric[name].shape
        assert bool((value >= 0).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_is_the_norm_of_coupled_weights(family, order):
    model = tiny_model(family)
    expected = {
        name: [
            sum(share * sum(abs(w) ** order for w in vector.tolist()) for vector, share in parts)
            ** (1 / order)
            for parts in units
        ]
        for name, units in coupled_weights(model, lambda x: weight_matrix(x).detach()).items()
    }
    check_metric(make("Magnitude", order=order), model, (), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sp_is_mean_weight_times_norm(family):
    model = tiny_model(family)
    batches = batches_for(model)
    x = recorded_inputs(model, batches)
    expected = {}
    for name, (weight, lanes) in readers(model).items():
        per_lane = [
            sum(abs(w) for w in weight[:, j].tolist())
            / len(weight)
            * math.sqrt(sum(v * v for v in x[name][:, j].tolist()))
            for j in range(weight.shape[1])
        ]
        expected[name] = [sum(per_lane[i : i + lanes]) for i in range(0, weight.shape[1], lanes)]
    check_metric(make("WandaSP"), model, batches, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("square_heads", [False, True])
def test_flap_is_the_standardised_fluctuation(family, square_heads):
    model = tiny_model(family)
    batches = batches_for(model, 3)
    x = recorded_inputs(model, batches)
    expected = {}
    for name, (weight, lanes) in readers(model).items():
        fluctuation = []
        for j in range(weight.shape[1]):
            values = x[name][:, j].tolist()
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            value = variance * sum(w * w for w in weight[:, j].tolist())
            fluctuation.append(value**2 if square_heads and name.endswith("heads") else value)
        n = len(fluctuation)
        mean = sum(fluctuation) / n
        spread = math.sqrt(sum((f - mean) ** 2 for f in fluctuation) / (n - 1))
        z = [(f - mean) / spread for f in fluctuation]
        expected[name] = [sum(z[i : i + lanes]) / lanes for i in range(0, n, lanes)]
    gp.attach(model, GATES)
    metric = make("FLAP", square_heads=square_heads).metric(model, batches)
    for name, value in metric.items():
        torch.testing.assert_close(value, torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["param_first", "vectorize", "unit"])
def test_taylor_is_weight_times_gradient(family, variant):
    model = tiny_model(family).eval()
    batches = batches_for(model)
    losses = [model(**batch).loss * batch["labels"].numel() for batch in batches]
    (sum(losses) / sum(batch["labels"].numel() for batch in batches)).backward()

    def products(linear):
        grad = linear.weight.grad
        return (
            (linear.weight * grad).detach()
            if weight_matrix(linear) is linear.weight
            else (linear.weight * grad).detach().t()
        )

    def reduce(parts):
        if variant == "param_first":
            return sum(share * sum(abs(v) for v in vector.tolist()) for vector, share in parts)
        if variant == "vectorize":
            return sum(share * abs(sum(vector.tolist())) for vector, share in parts)
        return abs(sum(share * sum(vector.tolist()) for vector, share in parts))

    expected = {
        name: [reduce(parts) for parts in units]
        for name, units in coupled_weights(model, products).items()
    }
    model.zero_grad()
    check_metric(make("Taylor", variant=variant), model, batches, expected)
    assert all(p.grad is None for p in model.parameters())


def test_worth_makes_the_knapsack_one_threshold():
    gates = gp.attach(tiny_model("llama"), dataclasses.replace(GATES, units=("channels",)))
    torch.manual_seed(0)
    values = {name: torch.randn(gate.size) for name, gate in gates.items()}
    masks = gates.plan(worth(gates, values)).masks
    kept = torch.cat([values[name][mask] for name, mask in masks.items()])
    gone = torch.cat([values[name][~mask] for name, mask in masks.items()])
    # Widths are even, so each gate may keep one unit that is below the threshold.
    assert int((gone > kept.min()).sum()) <= len(masks) * 2


def test_ranks_keep_the_same_fraction_of_every_gate():
    values = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([1e-3, 5e-3])}
    assert ranks(values)["a"].tolist() == pytest.approx([1, 1 / 3, 2 / 3])
    assert ranks(values)["b"].tolist() == [0.5, 1.0]
    assert comparable(values, False)["a"].tolist() == pytest.approx([1.5, 0.5, 1.0])
    model = tiny_model("llama")
    report = make("Magnitude").prune(model)
    kept = {
        kind: [row[3] for row in report.rows if row[1] == kind] for kind in ("heads", "channels")
    }
    assert all(len(set(counts)) == 1 for counts in kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
@pytest.mark.parametrize("name", NAMES)
def test_prunes_packs_saves_and_reloads(family, name, tmp_path):
    model = tiny_model(family, torch.float32)
    batches = batches_for(model)
    report = make(name, gates=dataclasses.replace(GATES, width_multiple=1)).prune(model, batches)
    assert abs(report.kept_fraction - 0.7) <= 0.005
    assert report.params[1] < report.params[0]
    ids = batches[0]["input_ids"]
    logits = model.eval()(ids).logits
    assert bool(logits.isfinite().all())
    gp.save_pretrained(model, tmp_path)
    assert torch.equal(gp.from_pretrained(tmp_path).eval()(ids).logits, logits)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", ["Magnitude", "WandaSP", "Taylor"])
def test_global_and_per_layer_meet_the_target(name, per_layer):
    model = tiny_model("llama", torch.float32)
    batches = batches_for(model)
    report = make(name, per_layer=per_layer).prune(model, batches)
    assert abs(report.kept_fraction - 0.7) <= 0.005


def test_taylor_keeps_outer_layers_whole():
    model = tiny_model("llama", torch.float32, num_hidden_layers=4)
    gates = dataclasses.replace(GATES, target=0.85, width_multiple=1)
    report = make("Taylor", gates=gates, keep_first=1, keep_last=2).prune(model, batches_for(model))
    untouched = [before == kept for _, _, before, kept in report.rows]
    assert untouched[:2] == [True, True] and untouched[4:] == [True] * 4
    assert not all(untouched[2:4])
    assert abs(report.kept_fraction - 0.85) <= 0.005
    whole = tiny_model("llama", torch.float32)
    with pytest.raises(ValueError, match="keep_first=4 and keep_last=2 leave no gate of 2 layers"):
        methods.Taylor(gates=GATES).prune(whole, batches_for(whole))
    assert not hasattr(whole, "gatepack_gates")


def test_gates_that_are_there_decide():
    model = tiny_model("llama", torch.float32)
    gp.attach(model, dataclasses.replace(GATES, target=0.5, width_multiple=1))
    report = make("WandaSP").prune(model, [token_ids()])
    assert abs(report.kept_fraction - 0.5) <= 0.005


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flap_compensation_lowers_the_error(family):
    torch.manual_seed(0)
    errors = {}
    fresh = token_ids(batch=8, length=12, seed=99)
    for compensate in (False, True):
        model = tiny_model(family, torch.float32).eval()
        expected = model(fresh).logits
        calibration = [token_ids(batch=8, length=12, seed=seed) for seed in range(4)]
        make("FLAP", compensate=compensate).prune(model, calibration)
        errors[compensate] = (model(fresh).logits - expected).square().mean().item()
        if family == "llama":
            assert model.config.mlp_bias is compensate
            assert (model.model.layers[0].mlp.down_proj.bias is not None) is compensate
    assert errors[True] < errors[False]


@pytest.mark.parametrize("name", NAMES)
def test_run_prunes_then_tunes(name):
    torch.manual_seed(0)
    model = tiny_model("llama", torch.float32)
    windows = token_ids(batch=8, length=9)
    train = TrainConfig(
        steps=6, batch_size=4, window=9, lora_rank=2, calibration_batches=2, learning_rate=1e-2
    )
    seen = []
    result = make(name).run(model, windows, train, on_step=lambda run: seen.append(run.step))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert sum(result.losses[-2:]) < sum(result.losses[:2])
    assert not any(hasattr(module, "base_layer") for module in result.model.modules())
    assert bool(result.model(windows).logits.isfinite().all())
    assert abs(result.report.kept_fraction - 0.7) <= 0.005


@pytest.mark.parametrize(
    "method",
    [
        gp.methods.FineGates(learning_rate=0.5, trains="gates", budget=0.7, freeze=0.5),
        gp.methods.ATP(target=0.7, width_multiple=1, generator_rate=0.01),
    ],
    ids=lambda method: type(method).__name__,
)
def test_run_beside_lora_ends_at_the_budget_and_computes_what_was_trained(method):
    torch.manual_seed(0)
    model = tiny_model("llama", torch.float32)
    windows = token_ids(batch=8, length=9)
    train = TrainConfig(
        steps=6, batch_size=4, window=9, lora_rank=2, calibration_batches=2, learning_rate=1e-2
    )
    merged = {}

    def keep_last(run):
        if run.step == train.steps:
            run.beside.finish()
            merged["model"] = copy.deepcopy(run.model).merge_and_unload().eval()

    result = run_beside_lora(method, model, windows, train, on_step=keep_last)
    assert len(result.losses) == train.steps
    assert result.report.kept_fraction == pytest.approx(0.7, abs=0.02)
    expected = merged["model"](windows).logits
    torch.testing.assert_close(result.model(windows).logits, expected, rtol=1e-4, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize("name", ["WandaSP", "FLAP", "Taylor"])
    def test_no_batches(self, name):
        model = tiny_model("llama", torch.float32)
        with pytest.raises(ValueError, match="at least one batch of token ids, got none"):
            make(name).prune(model, [])
        assert not hasattr(model, "gatepack_gates")
        assert not hasattr(model.config, "gatepack")

    @pytest.mark.parametrize("name", NAMES)
    def test_scores_that_are_not_finite(self, name):
        model = tiny_model("llama", torch.float32)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 3] = float("nan")
        with pytest.raises(ValueError, match=r"scores of '.*' hold infinite or NaN values"):
            make(name).prune(model, [token_ids()])
        assert not hasattr(model, "gatepack_gates")

    def test_target_out_of_reach(self):
        model = tiny_model("llama", torch.float32)
        gates = dataclasses.replace(GATES, target=0.2, units=("heads",))
        with pytest.raises(ValueError, match="target=0.2 cannot be reached"):
            make("WandaSP", gates=gates).prune(model, [token_ids()])
        few = dataclasses.replace(GATES, target=0.3)
        four = tiny_model("llama", torch.float32, num_hidden_layers=4)
        with pytest.raises(ValueError, match="target=0.3 cannot be met"):
            make("Taylor", gates=few, keep_first=2).prune(four, [token_ids()])

    def test_closed_gates_and_adapters(self):
        model = tiny_model("llama", torch.float32)
        gates = gp.attach(model, GATES)
        gates.close(next(iter(gates)), [0])
        with pytest.raises(ValueError, match="every gate open"):
            make("Magnitude").prune(model)
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["down_proj"])
        wrapped = peft.get_peft_model(tiny_model("llama", torch.float32), config)
        with pytest.raises(ValueError, match="down_proj carries an adapter"):
            make("Magnitude").prune(wrapped)

    def test_model_without_room_for_a_bias(self):
        model = tiny_model("qwen2", torch.float32)
        with pytest.raises(ValueError, match="Qwen2ForCausalLM has no bias.*compensate=False"):
            make("FLAP").prune(model, [token_ids()])
        assert make("FLAP", compensate=False).prune(model, [token_ids()]).kept_fraction < 0.71

    def test_taylor_needs_labels_for_other_losses(self):
        with pytest.raises(ValueError, match="BertForSequenceClassification need labels"):
            make("Taylor").prune(tiny_model("bert", torch.float32), [token_ids()])

    def test_fields(self):
        with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
            methods.Magnitude(order=3)
        with pytest.raises(ValueError, match="variant must be one of"):
            methods.Taylor(variant="second")
        with pytest.raises(ValueError, match="keep_last must be >= 0, got -1"):
            methods.Taylor(keep_last=-1)

    @pytest.mark.parametrize("name", [*NAMES, "ContextPruning"])
    def test_gates_on_rows_and_columns(self, name):
        model = tiny_model("llama", torch.float32)
        message = r"units: expected 'heads' and 'channels'.* got \('rows', 'columns'\): .*FineGates"
        gates = gp.GateConfig(units=("rows", "columns"), noise=0.0)
        with pytest.raises(ValueError, match=message):
            make(name, gates=gates).prune(model, [token_ids()])
        assert not hasattr(model, "gatepack_gates")
        gp.attach(model, gates)
        for call in (make(name).prune, make(name).score, make(name).metric):
            with pytest.raises(ValueError, match=message):
                call(model, [token_ids()])

    def test_score_needs_gates(self):
        with pytest.raises(ValueError, match="model has no gates"):
            methods.Magnitude().score(tiny_model("llama"))
