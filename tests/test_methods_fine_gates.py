"""FineGates: each formula against a literal fp64 transcription, its hazards, and whole runs."""

import copy
import math

import pytest
import torch
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

import gatepack as gp
from gatepack.layers import layers_of
from gatepack.methods import FineGates
from gatepack.methods.fine_gates import kurtosis
from gatepack.modules import base_linear, weight_matrix

STEPS = 24


def phi(x: float) -> float:
    return 0.5 - 0.5 * math.erf(-x / math.sqrt(2))


def started(family="llama", dtype=torch.float64, steps=STEPS, model=None, **fields):
    model = tiny_model(family, dtype).train() if model is None else model
    method = FineGates(**{"noise": 0.0, **fields})
    training = method.start(model, steps)
    return model, training


def spread_logits(training, seed=0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = training.gates.logits
        logits.copy_(torch.randn(logits.shape, generator=generator))


def loss_of(model, step):
    ids = token_ids(4, 8, seed=step)
    if model.can_generate():
        return model(input_ids=ids, labels=ids).loss
    return model(input_ids=ids, labels=(ids.sum(1) % 2)).loss


def train(model, training, optimizer=None, until=STEPS):
    if optimizer is None and training.weights():
        optimizer = torch.optim.AdamW(training.weights(), lr=1e-3, weight_decay=0.0)
    while training.done < until:
        loss_of(model, training.done).backward()
        training.step()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def test_gate_is_the_published_one():
    model, training = started(noise=0.1, init_std=0.1)
    gates = training.gates
    assert abs(gates.logits.mean().item() - 1) < 0.02
    assert abs(gates.logits.std().item() - 0.1) < 0.02
    logits = gates.logits.detach()
    model.eval()
    expected = [min(1.0, max(0.0, math.tanh(v) + 0.5)) for v in logits.tolist()]
    assert gates.deterministic_values().tolist() == pytest.approx(expected, abs=1e-6)
    model.train()
    samples = []
    for _ in range(200):
        with torch.no_grad():
            gates.logits.fill_(0.0)
        samples.append(gates.draw().flat.detach())
    drawn = torch.stack(samples)
    assert abs(float(drawn.mean()) - 0.5) < 0.01 and abs(float(drawn.std()) - 0.1) < 0.01
    # One sample serves all tokens: the values of a forward do not depend on the batch.
    assert drawn.shape[1] == logits.numel()


@pytest.mark.parametrize("weighting", ["mean", "units"])
def test_penalty_is_the_published_one(weighting):
    _, training = started(weighting=weighting, target_sparsity=0.3, penalty=50.0)
    spread_logits(training)
    keep, terms, grads = 1 - 0.3, [], []
    sides = {name: v.tolist() for name, v in training.gates.split(training.gates.logits).items()}
    average = sum(len(values) for values in sides.values()) / len(sides)
    for values in sides.values():
        soft = sum(phi((math.tanh(v) + 0.5) / 0.5) for v in values) / len(values)
        scale = len(values) / average if weighting == "units" else 1.0
        terms.append(scale * abs(soft - keep))
        for v in values:
            t = math.tanh(v)
            density = math.exp(-(((t + 0.5) / 0.5) ** 2) / 2) / math.sqrt(2 * math.pi)
            slope = density / 0.5 * (1 - t * t) / len(values)
            grads.append(50 * scale * math.copysign(1, soft - keep) * slope / len(sides))
    linears = [
        0.5 * (rows + columns) for rows, columns in zip(terms[::2], terms[1::2], strict=True)
    ]
    expected = 50 * sum(linears) / len(linears)
    training.done = 1
    penalty = training._penalty()
    assert float(penalty) == pytest.approx(expected, rel=1e-5)
    (grad,) = torch.autograd.grad(penalty, training.gates.logits)
    assert grad.tolist() == pytest.approx(grads, rel=2e-4, abs=1e-9)


def test_kurtosis_weighting_is_the_softmax_of_the_published_matrix():
    model, training = started(weighting="kurtosis", kurtosis_temperature=0.5, kurtosis_every=2)
    linear = "model.layers.1.mlp.down_proj"
    seen = {}
    module = model.get_submodule(linear)
    module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    loss_of(model, 0).backward()
    x = seen["x"].reshape(-1, 40).double().mean(0)
    training.step()
    matrix = weight_matrix(base_linear(module)).detach() * x
    weights = training.gates.split(training.unit_weights)
    for side, lines in (("rows", matrix.tolist()), ("columns", matrix.t().tolist())):
        roots = []
        for line in lines:
            mean = sum(line) / len(line)
            square = sum((v - mean) ** 2 for v in line) / len(line)
            roots.append(math.sqrt(sum((v - mean) ** 4 for v in line) / len(line)) / square)
        powers = [math.exp(-root / 0.5) for root in roots]
        expected = [power / sum(powers) for power in powers]
        assert weights[f"{linear}:{side}"].tolist() == pytest.approx(expected, rel=1e-3)
    before = training.unit_weights
    loss_of(model, 1).backward()
    training.step()
    assert training.unit_weights is before
    assert kurtosis(torch.ones(3, 4), 1).tolist() == [1, 1, 1]


def test_warmup_asks_for_nothing_and_the_rate_follows_the_cosine():
    _, training = started(warmup=0.5, learning_rate=1e-2, final_rate=0.1, steps=10)
    for done in range(1, 11):
        before = training.gates.logits.detach().clone()
        training.step()
        fall = 0.5 * (1 + math.cos(math.pi * (done - 1) / 10))
        expected = 1e-2 * (0.1 + 0.9 * fall)
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert torch.equal(before, training.gates.logits) == (done <= 5)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_recipe_removes_weights_for_real(family):
    model = tiny_model(family, torch.float32).train()
    method = FineGates(budget=0.6, learning_rate=0.05, freeze=1.0 if family == "llama" else 0.75)
    training = method.start(model, STEPS)
    train(model, training)
    assert abs(training.finish() - 0.6) <= 0.005
    ids = token_ids(2, 6)
    expected = model.eval()(ids).logits.detach()
    report = gp.pack(model)
    assert abs(report.kept_fraction - 0.6) <= 0.005
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_closed_gates_gain_nothing_from_the_task():
    # A saturated gate has no task gradient; the penalty alone moves it.
    model, training = started(penalty=0.0)
    with torch.no_grad():
        training.gates.logits[::2] = -1.0
        training.gates.logits[1::2] = 0.1
    loss_of(model, 0).backward()
    assert not training.gradient[::2].any() and training.gradient[1::2].any()


class TestHazards:
    """What finer reading of the released code found, one test each."""

    def test_no_bias_is_invented(self):
        model, _ = started("llama")
        assert all(
            layer.linear(path).bias is None
            for layer in layers_of(model)
            for path in layer.family.linears
        )

    def test_lora_runs_in_both_modes_and_trains_inside_the_gates(self):
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(tiny_model("llama", torch.float32), lora).train()
        training = FineGates(trains="gates").start(model, STEPS)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names == {n for n in names if "lora_" in n or n.endswith("gatepack_gates.logits")}
        train(model, training, until=4)
        model.eval()(token_ids())
        adapter = model.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"]
        assert adapter.weight.abs().max() > 0

    def test_logits_are_fp32_in_a_bf16_model(self):
        model = tiny_model("llama", torch.bfloat16).train()
        training = FineGates(learning_rate=1e-4).start(model, STEPS)
        logits = training.gates.logits
        assert logits.dtype == torch.float32
        before = logits.detach().clone()
        train(model, training, until=1)
        moved = (logits.detach() - before).abs()
        # bf16 steps by 0.0078 just above 1 and would lose this.
        assert 5e-5 < float(moved.median()) < 2e-4

    def test_frozen_weights_stay_parameters(self):
        model, training = started("llama", torch.float32)
        weight = "model.layers.0.mlp.down_proj.weight"
        assert weight in model.state_dict()
        assert not dict(model.named_parameters())[weight].requires_grad
        assert dict(model.to(torch.float16).named_parameters())[weight].dtype == torch.float16
        model.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, 0).backward()
        assert bool(training.gradient.isfinite().all())

    def test_evaluation_has_no_noise(self):
        model, _ = started(noise=0.1, init_std=0.5)
        ids = token_ids()
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, model(ids).logits)
            model.eval()
            assert torch.equal(model(ids).logits, model(ids).logits)

    def test_the_soft_penalty_can_be_met_with_nothing_closed(self):
        model, training = started(target_sparsity=0.4, penalty=50.0)
        middle = math.atanh(0.5 * 0.2533 - 0.5)  # Phi(0.2533) = 0.6
        with torch.no_grad():
            training.gates.logits.fill_(middle)
        assert float(training.soft_distance()) < 1e-3
        assert training.gates.kept_fraction() == 1.0
        training.method = FineGates(budget=0.6)
        with torch.no_grad():
            training.gates.logits += 0.01 * torch.randn_like(training.gates.logits)
        training.gates.config = gp.GateConfig(units=("rows", "columns"), target=0.6)
        assert abs(training.finish() - 0.6) <= 0.005

    def test_units_weighting_pulls_on_every_gate_alike(self):
        # 40 channels against 48 residual lanes: the published mean pulls harder on the fewer.
        for weighting, ratio in (("mean", 48 / 40), ("units", 1.0)):
            _, training = started(weighting=weighting, init_std=0.0)
            (grad,) = torch.autograd.grad(training.soft_distance(), training.gates.logits)
            parts = training.gates.split(grad)
            narrow = parts["model.layers.0.mlp.down_proj:columns"][0]
            wide = parts["model.layers.0.mlp.down_proj:rows"][0]
            assert float(narrow / wide) == pytest.approx(ratio, rel=1e-5)

    @pytest.mark.parametrize("length", [4, 12])
    def test_the_schedule_is_of_the_steps_that_are_run(self, length, tmp_path):
        """A budget of tokens over the batch size alone gave steps in the millions, so that the
        cosine never fell."""
        rows = [{"input_ids": row, "labels": row} for row in token_ids(16, length)]
        model = tiny_model("llama", torch.float32)
        method = FineGates.post_train(final_rate=0.5, linears="blocks")
        callback = gp.GateCallback(method)
        run = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=rows,
            callbacks=[callback],
        )  # fmt: skip
        run.train()
        training = callback.training
        assert training.steps == training.done == run.state.global_step == 8
        last = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 7 / 8))
        rate = training.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(method.learning_rate * last)

    def test_kurtosis_weights_sum_to_one_with_gates_closed(self):
        model, training = started(weighting="kurtosis", kurtosis_every=1)
        training.gates.close("model.layers.0.mlp.down_proj:rows", range(20))
        loss_of(model, 0).backward()
        training.step()
        sums = [float(part.sum()) for part in training.gates.split(training.unit_weights).values()]
        assert sums == pytest.approx([1.0] * len(sums), abs=1e-5)

    @pytest.mark.parametrize("side", ["rows", "columns"])
    def test_closed_gates_keep_their_kurtosis_weights(self, side):
        """They are of all gates, so that k does not move: not of the open ones alone."""
        found = []
        for closed in (0, 20):
            model, training = started(
                weighting="kurtosis", kurtosis_every=1, kurtosis_temperature=0.5
            )
            gate = f"model.layers.0.self_attn.q_proj:{side}"
            training.gates.close(gate, range(closed))
            loss_of(model, 0).backward()
            training.step()
            found.append(training.gates.split(training.unit_weights)[gate])
        assert torch.equal(*found) and bool((found[0] > 0).all())
        assert found[0].max() > 1.1 * found[0].min()

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_kurtosis_weights_do_not_depend_on_what_is_handed_on(self, family, monkeypatch):
        """The folded path hands closed channels to no linear, and accumulation varies how many."""
        found = {}
        for path in ("folded", "dense"):
            monkeypatch.setenv("GATEPACK_BACKEND", path)
            model, training = started(family, weighting="kurtosis", kurtosis_every=1)
            widths = set()
            layer = layers_of(model)[0]
            layer.linear(layer.family.down).register_forward_pre_hook(
                lambda module, args, widths=widths: widths.add(args[0].shape[-1])
            )
            channels = f"{layer.name}.{layer.family.up[0]}:rows"
            for step, closed in enumerate((range(5), range(3, 11))):
                training.gates.close(channels, closed)
                loss_of(model, step).backward()
            training.step()
            assert widths == ({35, 29} if path == "folded" else {40})
            found[path] = training.unit_weights
        torch.testing.assert_close(found["folded"], found["dense"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", ["mean", "kurtosis"])
def test_resumes_bit_for_bit(weighting):
    def fresh():
        return started("bert", torch.float32, noise=0.1, weighting=weighting, kurtosis_every=4)

    whole, training = fresh()
    train(whole, training)
    first, training = fresh()
    optimizer = train(first, training, until=10)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(training.state_dict()))
    again = torch.optim.AdamW(resumed.weights(), lr=1e-3, weight_decay=0.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, again)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_trains():
    def trainable(family, **fields):
        model = tiny_model(family, torch.float32)
        FineGates(**fields).prepare(model)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    names = trainable("bert")
    assert {"classifier.weight", "classifier.bias"} <= names
    assert "bert.encoder.layer.0.output.dense.bias" in names
    assert not any("LayerNorm" in n or n.startswith("bert.emb") or "pooler" in n for n in names)
    assert all(name.endswith("bias") for name in names - {"classifier.weight"})
    assert trainable("bert", trains="gates") == set() == trainable("llama")
    assert all(name.endswith("bias") for name in trainable("opt", trains="biases"))
    everything = trainable("llama", trains="all")
    assert "model.embed_tokens.weight" in everything and len(everything) == 21


def test_modes_gate_what_was_published():
    def gated(method, **overrides):
        model = tiny_model("llama", torch.float32, **overrides)
        method.prepare(model)
        return {name.rpartition(":")[0] for name in gp.gates_of(model)}

    tied = gated(FineGates.post_train(), tie_word_embeddings=True)
    untied = gated(FineGates.post_train(), tie_word_embeddings=False)
    assert untied - tied == {"lm_head"} and len(tied) == 14
    pretrain = gated(FineGates.pretrain())
    assert len(pretrain) == 12 and not any("down_proj" in name for name in pretrain)
    chosen = gated(FineGates(linears=("*.layers.1.mlp.*",)))
    assert len(chosen) == 3
    published = FineGates.post_train(penalty=10.0)
    assert (published.penalty, published.target_sparsity, published.trains) == (10.0, 0.3, "gates")


def test_pretrain_mode_trains_weights_through_the_gates():
    model, training = started("llama", torch.float32, trains="all", linears="all_but_down")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    train(model, training, until=3)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    kept = training.finish()
    assert gp.pack(model).kept_fraction == pytest.approx(kept)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_sparsity": 1.5}, r"target_sparsity: expected a number in \[0, 1\], got 1.5"),
        ({"penalty": -1.0}, "penalty: expected a number >= 0, got -1.0"),
        ({"budget": 1.0}, r"budget: expected a kept fraction in \(0, 1\), got 1.0"),
        ({"trains": "head"}, "trains: expected one of .*'biases'.*, got 'head'"),
        ({"weighting": "l1"}, "weighting: expected one of"),
        ({"linears": "mlp"}, "linears: expected one of .* or a tuple of names, got 'mlp'"),
        ({"kurtosis_every": 0}, "kurtosis_every: expected at least 1, got 0"),
        ({"kurtosis_temperature": 0.0}, "kurtosis_temperature: expected a positive number"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        FineGates(**fields)


def test_other_gates_are_refused():
    model = tiny_model("llama")
    gp.attach(model)
    with pytest.raises(ValueError, match="needs gates on rows and columns, the model has"):
        FineGates().start(model, 3)
    with pytest.raises(ValueError, match="freeze: expected 1 for a model in which only gates"):
        FineGates.post_train(freeze=0.5).start(tiny_model("llama"), 3)


def test_the_newest_training_alone_watches_the_model():
    model, earlier = started("opt", weighting="kurtosis", kurtosis_every=1, freeze=0.5)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    start = copy.deepcopy(earlier.state_dict())
    _, newer = started(model=model, weighting="kurtosis", kurtosis_every=1, freeze=0.5)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    train(model, newer, until=STEPS // 2)
    assert newer.gates.frozen and not earlier._inputs and earlier.gradient is None
    newer.load_state_dict(start)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
