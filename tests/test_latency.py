"""Budgets of measured latency and of FLOPs: tables, what units cost, and landing on them."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from checkpoints import save_tiny
from latencies import HERE, config, table
from tiny import tiny_model, token_ids
from typer.testing import CliRunner

import gatepack as gp
from gatepack import latency_bench
from gatepack.bench import BenchConfig
from gatepack.budget import TOLERANCE, _choices
from gatepack.cli import app
from gatepack.latency import PHASES, LatencyCosts, LatencyTable
from gatepack.layers import layers_of
from gatepack.modules import linear_shape
from gatepack.progress import Log


def seconds_of(model, found, phase):
    """What the table says of a packed model, layer by layer from the widths that it has."""
    total = 0.0
    for layer in layers_of(model):
        width = linear_shape(layer.linear(layer.family.down))[1]
        per_kv = layer.queries // layer.kv_heads
        total += found.layer_seconds(phase, layer.kv_heads, per_kv, width)
    return total


def test_table_comes_back_from_json(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().to_dict()))
    assert LatencyTable.read(path) == LatencyTable.from_dict(table().to_dict())
    gates = config(latency_table=str(path))
    assert gp.GateConfig.from_json(gates.to_json()) == gates
    assert hash(gates) == hash(config())


def test_table_refuses():
    with pytest.raises(ValueError, match=r"latency_table: nowhere.json cannot be read: .*Measure"):
        config(latency_table="nowhere.json")
    with pytest.raises(ValueError, match="widths: expected ascending counts up to 40"):
        table(widths=(4, 8))
    with pytest.raises(ValueError, match=r"seconds\['prefill'\]\['heads'\]: expected positive"):
        table(seconds={**table().seconds, "prefill": None})
    with pytest.raises(ValueError, match="version: expected 1, got 7; measure the table again"):
        table(version=7)
    with pytest.raises(ValueError, match="latency_table: not a table of this release"):
        LatencyTable.from_dict({"device": "cpu"})


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_costs_are_those_of_the_table(phase):
    found = table()
    gates = gp.attach(tiny_model("llama"), config(latency_phase=phase))
    costs = gates.costs
    assert isinstance(costs, LatencyCosts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        masks, total = {}, 0.0
        for i in range(2):
            k, q = (int(torch.randint(1, n + 1, (), generator=generator)) for n in (2, 3))
            heads = torch.zeros(2, 3, dtype=torch.bool)
            heads[:k, :q] = True
            width = int(torch.randint(1, 41, (), generator=generator))
            masks[f"model.layers.{i}.self_attn:heads"] = heads.reshape(-1)
            masks[f"model.layers.{i}.mlp:channels"] = torch.arange(40) < width
            total += found.layer_seconds(phase, k, q, width)
        expected = total / (2 * found.dense_seconds(phase))
        assert costs.kept_fraction(masks) == pytest.approx(expected, rel=1e-12)
        flat = torch.cat([masks[name] for name in gates]).float()
        assert float(costs.expected(flat)) == pytest.approx(expected, rel=1e-5)
    everything = {name: torch.ones(gate.size, dtype=torch.bool) for name, gate in gates.items()}
    assert costs.kept_fraction(everything) == pytest.approx(1.0, rel=1e-12)


def test_gradient_of_the_expected_latency():
    gates = gp.attach(tiny_model("llama"), config())
    p = torch.rand(gates.logits.shape, generator=torch.Generator().manual_seed(3)) * 0.8 + 0.1
    p.requires_grad_(True)
    (found,) = torch.autograd.grad(gates.costs.expected(p), p)
    step = 1e-3
    for unit in (0, 4, 7, 30, 50, 91):
        moved = torch.zeros_like(p).index_fill_(0, torch.tensor([unit]), step)
        with torch.no_grad():
            slope = gates.costs.expected(p + moved) - gates.costs.expected(p - moved)
        assert float(found[unit]) == pytest.approx(float(slope) / (2 * step), rel=0.05, abs=1e-4)


@pytest.mark.parametrize("target", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("equal", [True, False])
def test_lands_on_the_target_by_the_table(equal, target):
    found, model = table(channels=640), tiny_model("llama", intermediate_size=640)
    wanted = config(latency_table=found.to_dict(), target=target, equal_layers=equal)
    gates = gp.attach(model, wanted)
    generator = torch.Generator().manual_seed(1)
    kept = gates.snap({n: torch.rand(gate.size, generator=generator) for n, gate in gates.items()})
    assert abs(kept - target) <= TOLERANCE
    gp.pack(model)
    layers = layers_of(model)
    shapes = {tuple(linear_shape(x.linear(p)) for p in x.family.linears) for x in layers}
    assert len(shapes) == 1 or not equal
    dense = 2 * found.dense_seconds("decode")
    assert seconds_of(model, found, "decode") / dense == pytest.approx(kept, rel=1e-9)


def test_training_lands_there_too_and_the_checkpoint_holds_the_table(tmp_path):
    model = tiny_model("llama", torch.float32).train()
    gp.attach(model, config(equal_layers=False, width_multiple=1))
    training = gp.GateTraining(model, 20)
    for step in range(20):
        ids = token_ids(2, 6, seed=step)
        model(ids, labels=ids).loss.backward()
        training.step()
        model.zero_grad()
    assert abs(training.finish() - 0.7) <= TOLERANCE
    gp.save_pretrained(model, tmp_path / "gated")
    again = gp.gates_of(gp.from_pretrained(tmp_path / "gated"))
    assert again.kept_fraction() == gp.gates_of(model).kept_fraction()


def test_one_shot_methods_take_the_budget():
    model = tiny_model("llama")
    method = gp.methods.Magnitude(gates=config(equal_layers=False, width_multiple=1))
    method.prune(model)
    dense = 2 * table().dense_seconds("decode")
    assert abs(seconds_of(model, table(), "decode") / dense - 0.7) <= TOLERANCE


def test_a_table_of_another_device_or_shape():
    elsewhere = table(device="NVIDIA H100").to_dict()
    gates = gp.attach(tiny_model("llama"), config(latency_table=elsewhere))
    for use in (gates.snap, lambda: gp.GateTraining(gates.attachment.root, 10)):
        with pytest.raises(
            ValueError, match=r"latency_table: measured on 'NVIDIA H100', got .*--latency-table"
        ):
            use()
    model = tiny_model("llama")
    gp.attach(
        model,
        config(
            latency_table=elsewhere,
            latency_device="NVIDIA H100",
            equal_layers=False,
            width_multiple=1,
        ),
    ).snap()
    with pytest.raises(
        ValueError, match=r"does not cover 'model.layers.0.mlp:channels': it has 36"
    ):
        gp.attach(tiny_model("llama", intermediate_size=36), config())
    with pytest.raises(
        ValueError, match="the table is of layers with 6 query and 2 key/value heads"
    ):
        gp.attach(tiny_model("llama", num_key_value_heads=3), config())
    seconds = {**table().seconds, "decode": None}
    with pytest.raises(
        ValueError, match="latency_phase: expected one that the table has, got 'dec"
    ):
        gp.attach(tiny_model("llama"), config(latency_table=table(seconds=seconds).to_dict()))


@pytest.mark.parametrize(
    ("family", "seen"), [("llama", 0.5), ("gpt2", 0.5), ("opt", 0.5), ("bert", 1.0)]
)
@pytest.mark.parametrize("length", [2, 100])
def test_flops_are_those_of_the_packed_model(family, seen, length):
    """2 per weight and token; and 2 * head_dim per query head and token that it sees, twice."""

    def flops(model):
        total = 0
        for layer in layers_of(model):
            weights = sum(layer.linear(path).weight.numel() for path in layer.family.linears)
            total += 2 * weights + layer.queries * 4 * layer.head_dim * length * seen
        return total

    model = tiny_model(family)
    dense = flops(model)
    wanted = gp.GateConfig(
        target=0.7, target_of="flops", sequence_length=length, equal_layers=False,
        width_multiple=1, noise=0.0,
    )  # fmt: skip
    gates = gp.attach(model, wanted)
    assert gates.costs.total == dense
    kept = gates.snap()
    assert abs(kept - 0.7) <= TOLERANCE
    gp.pack(model)
    assert flops(model) / dense == pytest.approx(kept, rel=1e-9)


def test_flops_of_layers_without_gates_are_fixed():
    model = tiny_model("llama")
    wanted = gp.GateConfig(target=0.9, target_of="flops", units=("channels",), sequence_length=100)
    gates = gp.attach(model, wanted)
    heads = 2 * (2 * (48 * 48 * 2 + 48 * 16 * 2) + 6 * 2 * 8 * 100)
    assert gates.costs.fixed == heads
    assert gates.costs.total == heads + 2 * 2 * 3 * 48 * 40


@pytest.mark.parametrize(
    ("family", "seen"), [("llama", 0.5), ("gpt2", 0.5), ("opt", 0.5), ("bert", 1.0)]
)
@pytest.mark.parametrize("units", [("rows", "columns"), ("columns",)])
def test_flops_of_rows_and_columns_are_those_of_the_packed_model(family, seen, units):
    """2 per weight and token that stays; attention keeps its heads and lanes."""
    dense = tiny_model(family)
    heads = gp.attach(dense, gp.GateConfig(target_of="flops", sequence_length=100))
    model = tiny_model(family, torch.float32).train()
    layers, head_dim = layers_of(model), layers_of(model)[0].head_dim
    attention = sum(layer.queries * 4 * head_dim * 100 * seen for layer in layers)
    wanted = gp.GateConfig(
        units=units, target=0.7, target_of="flops", sequence_length=100, width_multiple=1
    )
    gates = gp.attach(model, wanted)
    assert gates.costs.total == heads.costs.total and gates.costs.fixed == attention
    training = gp.GateTraining(model, 20)
    for step in range(20):
        ids = token_ids(2, 6, seed=step)
        labels = ids if model.can_generate() else ids.sum(1) % 2
        model(input_ids=ids, labels=labels).loss.backward()
        training.step()
        model.zero_grad()
    kept = training.finish()
    assert abs(kept - 0.7) <= TOLERANCE and kept == gates.kept_fraction()
    assert float(gates._kept()) == pytest.approx(kept, rel=1e-6)
    assert str(gates.summary()).endswith(f"kept FLOPs {kept:.1%}")
    weights = gp.pack(model).block_params[1]
    assert (2 * weights + attention) / gates.costs.total == pytest.approx(kept, rel=1e-9)


def test_flops_of_linears_without_rows_and_columns_are_fixed():
    wanted = gp.GateConfig(
        units=("rows",), target=0.8, target_of="flops", sequence_length=10, targets=("*.gate_proj",)
    )
    with pytest.raises(ValueError, match=r"gated linears hold 15\.5% of the blocks' flops; gate"):
        gp.attach(tiny_model("llama"), wanted)
    gates = gp.attach(tiny_model("llama"), dataclasses.replace(wanted, target=0.95))
    linears = 2 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 40)
    assert gates.costs.total == 2 * linears + 2 * 6 * 2 * 8 * 10
    assert gates.costs.fixed == gates.costs.total - 2 * 2 * 48 * 40
    everything = torch.ones_like(gates.logits)
    assert float(gates.costs.expected(everything)) == pytest.approx(1.0, rel=1e-6)


def test_what_shapes_cost_does_not_depend_on_worth():
    """Heads count as they are packed, equally many per key/value head, so only such are planned."""
    wanted = config(equal_layers=True, q_per_kv_uniform=False)
    gates = gp.attach(tiny_model("llama"), wanted)
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scores = {n: torch.rand(gate.size, generator=generator) for n, gate in gates.items()}
        heads, _ = _choices(gates.costs, scores, wanted, 4)
        found.append(heads.costs.tolist())
        for option in heads.options:
            for units in option.values():
                blocks = torch.bincount(units // 3)
                assert len(set(blocks[blocks > 0].tolist())) == 1
    assert found == found[:1] * 4


@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
def test_collects_a_table_that_the_model_can_use(model_type, monkeypatch):
    """By a clock that ticks once a weight: each entry is the size of a layer cut to its shape."""

    def ticks(probe):
        weights = float(sum(parameter.numel() for parameter in probe.model.parameters()))
        return {"prefill": weights, **({"decode": 2 * weights} if probe.caches else {})}

    def weights_of(layer):
        return float(sum(parameter.numel() for parameter in layer.module.parameters()))

    monkeypatch.setattr(latency_bench, "WIDTHS", 3)
    monkeypatch.setattr(latency_bench, "COUNTS", 2)
    monkeypatch.setattr(latency_bench._Probe, "times", ticks)
    model = tiny_model(model_type, torch.float32)
    settings = BenchConfig(model="tiny", device="cpu", prompt_tokens=6, new_tokens=2, repeats=1)
    found = latency_bench.collect(model, torch.device("cpu"), settings, Log("quiet"))
    assert found.widths == (14, 28, 40) and found.device == HERE
    dense = weights_of(layers_of(model)[0])
    phases = {"prefill": 1} if model_type == "bert" else {"prefill": 1, "decode": 2}
    assert [phase for phase in PHASES if found.seconds[phase] is not None] == [*phases]
    for phase, tick in phases.items():
        student = copy.deepcopy(model)
        budget = config(
            latency_table=found.to_dict(), latency_phase=phase, target=0.8, equal_layers=False
        )
        gates = gp.attach(student, budget)
        assert gates.costs.total == pytest.approx(2 * tick * dense)
        gates.snap()
        gp.pack(student)
        total = tick * sum(weights_of(layer) for layer in layers_of(student))
        assert seconds_of(student, found, phase) == pytest.approx(total)


def test_command_writes_the_table_and_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_bench, "WIDTHS", 2)
    monkeypatch.setattr(latency_bench, "COUNTS", 1)
    model, path = str(save_tiny(tmp_path / "dense")), tmp_path / "table.json"
    arguments = ["bench", model, "--latency-table", str(path), "--prompt-tokens", "6"]
    arguments += ["--new-tokens", "2", "--repeats", "1", "--device", "cpu"]
    timed, real = [], latency_bench._ratio

    def ratio(root, dense, point, *rest):
        if len(timed) == 2:
            timed.append(None)
            raise KeyboardInterrupt
        timed.append(point)
        return real(root, dense, point, *rest)

    monkeypatch.setattr(latency_bench, "_ratio", ratio)
    wide = {"COLUMNS": "200", "NO_COLOR": "1"}
    assert CliRunner().invoke(app, arguments, env=wide).exit_code == 130
    assert not path.exists()
    done = CliRunner().invoke(app, arguments, env=wide)
    assert done.exit_code == 0, done.output
    shapes = [dataclasses.astuple(point) for point in timed if point]
    assert shapes == [(2, 3, 40), (2, 3, 20), (2, 3, 40)]  # heads, then both widths: once each
    assert "channels" in done.output and "decode, ms" in done.output
    assert LatencyTable.read(path).channels == 40 and not list(tmp_path.glob("*.resume"))
    path.unlink()
    done = CliRunner().invoke(app, [*arguments, "--dry-run"], env=wide)
    assert done.exit_code == 0 and "seconds" in done.output and not path.exists()
    assert re.search(r"shapes of a layer\W+4 ", done.output)


def test_a_folder_in_the_place_of_the_table_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file to write"):
        latency_bench.run(BenchConfig(model="none"), tmp_path, Log("quiet"))
