"""The phases and the work of a NeMo trainer's run, from the formulas of its stages."""

from __future__ import annotations

from trlx.config import TRLConfig
from trlx.launch.plan.memory import cache, layer_activations, logits_at_once, memory
from trlx.launch.plan.parameters import parameters, total_parameters
from trlx.launch.plan.phases import DRAWING, Phase
from trlx.launch.plan.run import TRAINERS, Run
from trlx.launch.plan.traffic import bubble
from trlx.launch.plan.work import Work, rows_of_a_step


def rows_sampled(config: TRLConfig) -> int:
    """Rows that a data rank samples at once."""
    return int(getattr(config.method, "chunk_size", config.train.batch_size))


def phases(run: Run, config: TRLConfig) -> list[Phase]:
    """Memory of each phase on the stage that needs most in it."""
    names = ["scoring", "update", "save"]
    if TRAINERS[config.method.name].generates:
        names.insert(0, "sampling")
    return [
        max((_phase(name, run, config, stage) for stage in run.stages), key=lambda phase: phase.total) for name in names
    ]


def work(run: Run, config: TRLConfig) -> Work:
    """What a step computes."""
    shape, heads = run.shape, parameters(run, run.stages[-1]).heads * run.parallel.tensor
    table = shape.vocab_size * shape.hidden_size
    blocks = total_parameters(shape) - table * (1 if shape.tied else 2)
    trained = round(blocks * sum(map(run.is_trained, range(shape.num_layers))) / shape.num_layers)
    rows = config.train.batch_size * run.data
    step = rows_of_a_step(config, rows, run.needs.reference, run.element == 4)
    new = min(run.response, int(config.method.gen_kwargs.get("max_new_tokens", run.response)))
    held = sum(cache(run, stage, rows_sampled(config), run.length) for stage in run.stages)
    return Work(
        **step,
        kept=0,
        length=run.length,
        response=run.response,
        new=new,
        trained=trained,
        frozen=blocks - trained,
        output=table if run.output_layer else shape.hidden_size,
        heads=heads,
        again=2 if run.recompute.granularity == "full" else 0,
        half=run.element < 4,
        gpus=run.gpus,
        bubble=bubble(run),
        draws=step["sampled"] * new / (rows_sampled(config) * run.data),
        read=total_parameters(shape) * run.element / run.parallel.tensor + held / 2,
    )


def _phase(name: str, run: Run, config: TRLConfig, stage: int) -> Phase:
    """Outside of updates the gradients' buffers stay; a pass without gradients holds at most what one layer keeps."""
    held = memory(run, stage)
    parts = {
        "weights": held.weights,
        "reference": held.reference,
        "optimizer": held.main_weights + held.moments,
        "gradients": held.gradients,
    }
    if name == "update":
        parts |= {"activations": held.activations, "temporary": held.temporary}
    elif name == "scoring":
        parts["temporary"] = max(layer_activations(run), logits_at_once(run, stage))
    elif name == "sampling":
        rows = rows_sampled(config)
        logits = rows * run.vocab_part * DRAWING if run.is_last(stage) else 0
        parts |= {"keys, values": cache(run, stage, rows, run.length), "temporary": logits}
    return Phase(name, parts)
