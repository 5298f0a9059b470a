"""`glm plan`: the paper's own case, sums of terms, impossible layouts, searches, and the memory of one process."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from command_line import refuse, run

from openglm.config import ModelConfig
from openglm.errors import InputError
from openglm.models.glm130b import GLM130B
from openglm.parallel.layout import ParallelLayout
from openglm.planning import GPUS, Cluster, Layout, Workload, calibrate, make_plan, paper_efficiency, process_memory, search
from openglm.planning.hardware import find_gpu, gpu_of_device, parse_gpus
from openglm.planning.layout import cut_layers
from openglm.planning.memory import GIB, fullest_stage, layer_activations, snapshot_bytes, stage_memory, stage_parameters
from openglm.planning.timing import paper_case, step_time, utilization
from openglm.training.dry_run import layout_of, plan_of
from openglm.training.recipe import read_recipe

PAPER = ["--model", "130b", "--gpus", "96x8", "--gpu", "a100-40", "--batch", "4224", "--precision", "fp16"]
LAYOUT = ["--tensor", "4", "--pipeline", "8", "--micro-batch", "1", "--zero", "1", "--recompute", "partitioned"]


def plan_json(*arguments: str) -> dict:
    return json.loads(run("plan", *arguments, "--json").stdout)


# The paper's case (SPEC 9.1.2).


def test_the_papers_flops_and_utilization_follow_from_its_step():
    workload, layout, cluster = paper_case()
    used = utilization(workload, layout.recompute, cluster, 88.5)
    assert used.mfu == pytest.approx(0.325, rel=0.02)
    assert used.hfu == pytest.approx(0.433, rel=0.02)
    assert used.model_tflops == pytest.approx(100.96, rel=1e-3)
    assert used.hardware_tflops == pytest.approx(134, rel=0.02)
    larger = dataclasses.replace(workload, batch=6_144)
    assert utilization(larger, layout.recompute, cluster, 122.5).hardware_tflops == pytest.approx(141, rel=0.02)
    assert utilization(workload, "none", cluster, 88.5).hfu == used.mfu


def test_the_papers_layout_bubble_and_memory():
    workload, layout, cluster = paper_case()
    assert cut_layers(70, 8) == (8, 9, 9, 9, 9, 9, 9, 8)
    assert layout.gpus == cluster.gpus == 768
    assert layout.micro_batches(4_224) == 176
    assert layout.bubble(4_224) == pytest.approx(0.038, rel=0.02)
    assert layout.bubble(6_144) == pytest.approx(0.027, rel=0.02)
    memory = fullest_stage(workload, layout)
    assert memory.group("weights", "gradients") / GIB == pytest.approx(15.0, rel=0.02)
    assert memory.group("optimizer") / GIB == pytest.approx(1.9, rel=0.02)
    assert memory.total < 40e9
    whole = dataclasses.replace(layout, recompute="layer")
    inputs = {kind: stage_memory(workload, kind, 1).group("activations, stored") for kind in (layout, whole)}
    assert inputs[whole] == 7 * 9 * 48 * 2**20  # the second stage has seven in flight
    assert inputs[layout] == inputs[whole] / 4
    assert snapshot_bytes(workload) == pytest.approx(1.80e12, rel=0.01)


def test_without_zero_or_without_recomputation_the_papers_layout_does_not_fit():
    workload, layout, _ = paper_case()
    alone = fullest_stage(workload, dataclasses.replace(layout, zero=0))
    assert alone.group("optimizer") == pytest.approx(48.3e9, rel=0.02)
    assert alone.total > 40 * GIB
    assert fullest_stage(workload, dataclasses.replace(layout, recompute="none")).total > 40 * GIB


def test_a_step_calibrated_at_one_batch_predicts_the_other():
    workload, layout, cluster = paper_case()
    efficiency = calibrate(workload, layout, cluster, [(88.5, 4_224)])
    assert step_time(workload, layout, cluster, efficiency).seconds == pytest.approx(88.5)
    larger = dataclasses.replace(workload, batch=6_144)
    predicted = step_time(larger, layout, cluster, efficiency).seconds
    assert predicted == pytest.approx(122.5, rel=0.05)
    assert abs(predicted - 122.5) < abs(88.5 * 6_144 / 4_224 - 122.5)  # better than proportion
    both = calibrate(workload, layout, cluster, [(122.5, 6_144), (88.5, 4_224)])
    assert both.overhead > 0
    assert step_time(workload, layout, cluster, both).seconds == pytest.approx(88.5)
    assert step_time(larger, layout, cluster, both).seconds == pytest.approx(122.5)


def test_the_papers_energy_and_days():
    plan = make_plan(*paper_case(), paper_efficiency())
    assert plan.tokens_per_second == pytest.approx(97_750, rel=0.01)
    budget = plan.budget(tokens=400e9, price=2.0, carbon=581)
    assert budget.days == pytest.approx(47.4, rel=0.01)
    assert budget.energy(60) == pytest.approx(442.4, rel=0.001)
    assert budget.co2(60) == pytest.approx(257, rel=0.001)
    assert budget.cost(1) == 768 * 24 * 2
    assert plan.budget(tokens=400e9, uptime=0.79).days == pytest.approx(60, rel=0.01)
    assert plan.budget(watts=200).energy(1) == plan.budget().energy(1) / 2
    assert plan.budget().days is None


# Sums, and agreement with what the package does.


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", ["layer", "partitioned", "none"])
@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_terms_add_up_and_more_zero_needs_less(tensor, pipeline, data, zero, recompute):
    workload = Workload(ModelConfig.preset("1.3b"), 64, 2_048)
    layout = Layout(tensor, pipeline, data, 2, zero, recompute)
    plan = make_plan(workload, layout, Cluster(1, 8, GPUS["h100"]), paper_efficiency())
    assert plan.memory.total == sum(term.bytes for term in plan.memory.terms)
    assert plan.time.seconds == pytest.approx(sum(term.seconds for term in plan.time.terms))
    assert plan.time.mfu <= plan.time.hfu < 1
    stages = [stage_memory(workload, layout, stage).total for stage in range(pipeline)]
    assert plan.memory.total == max(stages)
    if zero:
        less = [
            fullest_stage(workload, dataclasses.replace(layout, zero=z)).group("weights", "gradients", "opt") for z in (0, zero)
        ]
        assert less[1] < less[0] or data == 1


def test_parameters_and_flops_of_the_parts_are_those_of_the_whole():
    config = ModelConfig.preset("335m")
    assert stage_parameters(config, Layout(), 0) == config.parameter_count
    ends = config.vocab_size * config.hidden_size
    assert sum(stage_parameters(config, Layout(pipeline=2), stage) for stage in (0, 1)) == config.parameter_count + ends
    workload = Workload(config, 8, 1_024)
    assert config.num_layers * workload.layer_flops + workload.head_flops == config.flops_per_token(1_024)
    assert workload.model_flops == 8 * 1_024 * config.flops_per_token(1_024, training=True)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8, 16, 23, 24])
def test_layers_are_cut_as_the_parallel_room_cuts_them(stages):
    wanted = [len(layers) for layers in ParallelLayout(pipeline=stages).stage_layers(24)]
    assert list(cut_layers(24, stages)) == wanted


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_layer_stores_what_the_planner_says(precision):
    """Bytes that autograd really keeps for one layer more, parameters apart."""

    def kept(layers: int) -> int:
        config = ModelConfig(layers, 128, 2, 256, 512, 64)
        network = GLM130B(config).initialize(1).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        positions = torch.arange(64).expand(2, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.zeros(2, 64, dtype=torch.long), positions, torch.ones(2, 64, 64, dtype=torch.bool))
        return sum(sizes.values())

    workload = Workload(ModelConfig(2, 128, 2, 256, 512, 64), 2, 64, precision)
    assert layer_activations(workload, 128) == pytest.approx(kept(3) - kept(2), rel=0.005)


def test_memory_of_one_process_names_its_terms():
    workload = Workload(ModelConfig.preset("110m"), 8, 512)
    count = workload.config.parameter_count
    memory = process_memory(workload, 4)
    sizes = {term.name: term.bytes for term in memory.terms}
    assert memory.moment == "backward" and memory.total == sum(sizes.values())
    assert sizes["master weights"] == 4 * count and sizes["working copy"] == sizes["gradients"] == 2 * count
    assert sizes["AdamW moments"] == 8 * count
    assert {term.name for term in memory.terms if term.basis == "fitted"} == {"holes in the heap"}
    assert sizes["snapshot copy"] == memory.total - process_memory(workload, 4, snapshots=False).total == 12 * count
    assert process_memory(workload, 4, loss_share=0.1).total < memory.total
    small = process_memory(Workload(workload.config, 2, 16), 1)
    assert small.moment == "update" and small.total == 34 * count
    assert process_memory(Workload(workload.config, 1, 16, "fp32"), 1).total == 32 * count


def test_a_dry_run_plans_the_gradients_that_the_layouts_sum(request):
    recipe = read_recipe(request.config.rootpath / "recipes" / "130b.toml")
    plan = plan_of(recipe, layout_of(recipe, None), Cluster(96, 8, GPUS["a100-40"]), paper_efficiency())
    assert plan.workload.precision == "fp16"
    assert plan.memory.group("gradients") == 2 * plan.memory.group("weights")  # 4 bytes beside 2
    original = dataclasses.replace(plan.workload, float32_gradients=False)
    assert fullest_stage(original, plan.layout).group("gradients") == plan.memory.group("weights")
    assert step_time(original, plan.layout, plan.cluster, paper_efficiency()).seconds < plan.time.seconds


# Impossible layouts.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tensor", "5"], "96 attention heads do not divide by tensor 5"),
        (["--pipeline", "96"], "70 layers are fewer than 96 stages"),
        (["--tensor", "4", "--pipeline", "8", "--data", "20"], "are 640 GPUs, but there are 768"),
        (["--tensor", "4", "--pipeline", "7"], "are 756 GPUs, but there are 768"),
        (
            ["--tensor", "4", "--pipeline", "8", "--micro-batch", "3", "--batch", "100"],
            "does not divide by data 24 x micro-batch 3",
        ),
        (["--tensor", "4", "--pipeline", "8", "--batch", "96"], "4 micro-batches a step are too few for 8 stages"),
        (["--precision", "fp8"], "must be one of bf16, fp16, fp32"),
        (["--gpu", "v100-32", "--precision", "bf16"], "cannot compute in bf16"),
        (["--gpu", "a100"], "did you mean `a100-"),
        (["--gpus", "many"], "is not of the form SERVERSxGPUS"),
        (["--gpus", "200000x8"], "more than 1,000,000 GPUs"),
        (["--model", "130B"], "did you mean `130b`"),
        (["--zero", "4"], "must be one of 0, 1, 2, 3"),
        (["--memory", "0"], "`--memory` must be above 0"),
        (["--uptime", "2"], "at most 1"),
        (["--tokens", "many"], "no number of tokens"),
        (["--calibrate", "88.5@4224"], "needs `--tensor` and `--pipeline`"),
        (["--calibrate", "fast", *LAYOUT], "not of the form SECONDS@BATCH"),
        (["--calibrate", "20@4224", *LAYOUT], "times the GPU's peak"),
        (["--calibrate", "1@4224", *LAYOUT], "communication alone"),
        (["--calibrate", "88.5@100", *LAYOUT], "does not belong to data 24"),
        (["--calibrate", "88.5@4224", "--calibrate", "140@6144", *LAYOUT], "too slow for its size"),
        (["--cpu"], "takes no `--gpu"),
    ],
)
def test_what_cannot_be_gets_one_sentence(options, words):
    assert words in refuse("plan", *PAPER, *options)


def test_gpus_are_needed_and_read():
    assert "--gpus" in refuse("plan", "--model", "130b")
    assert parse_gpus("96x8") == (96, 8) and parse_gpus("8") == (1, 8)
    assert find_gpu("h200").peak_tflops("bf16") == 989
    with pytest.raises(InputError):
        parse_gpus("0x8")


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Quadro P400", None),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(name, gpu):
    assert gpu_of_device(name) is (GPUS[gpu] if gpu else None)


# Searches.


def test_a_search_returns_only_layouts_that_fit_fastest_first_and_the_papers_among_them():
    workload, _, cluster = paper_case()
    found = search(workload, cluster, paper_efficiency(), recompute="partitioned")
    assert all(plan.fits and plan.layout.gpus == 768 for plan in found.plans)
    seconds = [plan.time.seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    degrees = [(plan.layout.tensor, plan.layout.pipeline, plan.layout.data) for plan in found.plans]
    assert (4, 8, 24) in degrees and len(set(degrees)) == len(degrees)
    reasons = " ".join(f"{refusal.layouts}: {refusal.why}" for refusal in found.refused)
    for words in ("70 layers do not divide", "70 layers are fewer", "over 40 GiB", "does not divide by data"):
        assert words in reasons


def test_a_search_says_that_heads_do_not_divide_and_keeps_what_was_asked_for():
    workload = Workload(ModelConfig.preset("110m"), 64, 2_048)
    cluster = Cluster(1, 8, GPUS["a100-40"])
    found = search(workload, cluster, paper_efficiency(), micro_batch=2, zero=1, recompute="none")
    assert any("12 attention heads do not divide by tensor 8" in refusal.why for refusal in found.refused)
    assert {(p.layout.micro_batch, p.layout.zero, p.layout.recompute) for p in found.plans} == {(2, 1, "none")}


def test_what_fits_nowhere_is_shown_at_its_nearest():
    values = plan_json("--model", "130b", "--gpus", "8", "--memory", "24", "--batch", "64")
    assert values["layouts"] == [] and values["refused"]
    nearest = values["nearest"]
    assert not nearest["fits"] and nearest["memory"]["total"] > nearest["memory"]["limit"]
    text = run("plan", "--model", "130b", "--gpus", "8", "--memory", "24", "--batch", "64").stdout
    assert "no layout fits" in text and "does not fit 24" in text


# The command.


def test_the_command_shows_the_papers_case_with_fitted_inputs_named():
    text = run("plan", *PAPER, *LAYOUT, "--attention", "scores", "--tokens", "400B").stdout
    for words in (
        "128,697,794,560 parameters",
        "bubble 3.8%",
        "32.4%",
        "43.0%",
        "88.500",
        "fits 40",
        "fitted: 47.",
        "(assumed)",
    ):
        assert words in text
    assert "does not fit 40" in text  # without recomputation
    assert "a guess for other GPUs" not in text
    assert "a guess for other GPUs" in run("plan", "--model", "10b", "--gpus", "8", "--gpu", "h200").stdout
    text = run("plan", *PAPER, *LAYOUT, "--batch", "6144", "--calibrate", "88.5@4224").stdout
    assert "bubble 2.7%" in text and "fitted to the measured 88.5 s at batch 4,224" in text


def test_json_has_every_figure():
    values = plan_json(*PAPER, *LAYOUT, "--tokens", "400B", "--price", "1.5")
    assert values["parameters"] == 128_697_794_560 and values["hardware"]["memory"] == 40
    (plan,) = values["layouts"]
    assert plan["fits"] and plan["layout"]["tensor"] == 4 and plan["stage_layers"] == [8, 9, 9, 9, 9, 9, 9, 8]
    assert plan["memory"]["total"] == pytest.approx(sum(term["bytes"] for term in plan["memory"]["terms"]))
    assert plan["memory_other_recompute"]["total"] > plan["memory"]["limit"]
    assert plan["time"]["efficiency"]["fitted"] and plan["time"]["mfu"] == pytest.approx(0.324, rel=0.01)
    assert plan["budget"]["days"] == pytest.approx(47.4, rel=0.01)
    assert plan["budget"]["cost"] == pytest.approx(1.5 * plan["budget"]["gpu_hours"])


def test_a_folder_and_one_process_can_be_planned(tiny):
    assert plan_json("--model", str(tiny), "--gpus", "1", "--gpu", "rtx4090")["layouts"][0]["fits"]
    values = plan_json("--model", "110m", "--cpu", "--sequence", "512", "--micro-batch", "4")
    assert values["moment"] == "backward" and values["total"] == sum(term["bytes"] for term in values["terms"])
    assert "holes in the heap" in run("plan", "--model", "110m", "--cpu").stdout
    assert "smaller than a micro-batch" in refuse("plan", "--model", "110m", "--cpu", "--batch", "2", "--micro-batch", "4")


def test_the_examples_of_the_help_work():
    from openglm.cli.plan import EXAMPLES

    commands = [line.split()[1:] for line in EXAMPLES.splitlines() if line.strip().startswith("glm ")]
    assert len(commands) >= 3
    for command in commands:
        run(*command)
