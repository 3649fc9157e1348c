"""Commands that use what is trained or installed: generate, chat, demo, env."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trlx.launch.cli.tools import ManyValues, example
from trlx.launch.cli.train import Tokenizer

commands = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="JSON in place of text")]
Checkpoint = Annotated[str, typer.Argument(help="a folder of a run or a model, or a hub name")]
Gen = Annotated[
    list[str] | None, typer.Option("--gen", metavar="KEY=VALUE...", help="as in method.gen_kwargs: temperature=0.7")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="ends a response; repeat")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="other samples")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="folder of all that is written")]
GENERATE = example(
    'trlx generate ckpts/ppo --prompt "The sky is" --gen temperature=0.7',
    "trlx generate gpt2 --prompts mine.csv --column prompt=text --out new.jsonl",
)


@commands.command("generate", cls=ManyValues, epilog=GENERATE)
def generate(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="what to answer; repeat")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE|DATASET", help="more of them, as for trlx train")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="KEY=NAME", help="a column's other name; repeat")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="each text is a message, in the chat template")] = False,
    number: Annotated[int, typer.Option("--number", "-n", help="responses to each prompt")] = 1,
    gen: Gen = None,
    stop: Stop = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="lines of JSON  [default: on the terminal]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="lines of JSON on the terminal, too")] = False,
    batch_size: Annotated[int, typer.Option(help="prompts at once on each process")] = 32,
    device: Device = None,
    seed: Seed = 0,
    processes: Annotated[int | None, typer.Option(metavar="N", help="processes on this machine, by torchrun")] = None,
    tp: Annotated[int | None, typer.Option(help="tensor ranks, on Megatron")] = None,
    pp: Annotated[int | None, typer.Option(help="pipeline stages, on Megatron")] = None,
) -> int:
    """Samples from a checkpoint of any trainer with its run's evaluation settings. The lines of a pipe are prompts."""
    from trlx.launch.generate import Request, run

    request = Request(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        prompt=prompt or [],
        prompts=prompts,
        column=column or [],
        chat=chat,
        number=number,
        gen=gen or [],
        stop=stop or [],
        out=out,
        json=as_json,
        batch_size=batch_size,
        device=device,
        seed=seed,
        tp=tp,
        pp=pp,
    )
    return run(request, processes)


@commands.command("chat", cls=ManyValues, epilog=example("trlx chat ckpts/best_checkpoint", "trlx chat gpt2 --stop ."))
def chat(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="tells the model what it is")] = None,
    gen: Gen = None,
    stop: Stop = None,
    device: Device = None,
    seed: Seed = 0,
) -> int:
    """A conversation in the terminal: /system TEXT, /reset, /quit; Ctrl-C ends an answer, Ctrl-D the conversation."""
    from trlx.launch.chat import run

    return run(checkpoint, tokenizer, system, gen or [], stop or [], device, seed)


@commands.command("demo", epilog=example("trlx demo", "trlx demo --method grpo --out runs/demo"))
def demo(
    method: Annotated[str, typer.Option(metavar="METHOD", help="ppo, grpo or ilql")] = "ppo",
    out: Out = Path("ckpts/randomwalks"),
    seed: Annotated[int, typer.Option(help="of weights, samples and batches")] = 1000,
) -> int:
    """Watch a method learn: a small GPT-2 finds shortest paths in a graph, offline and on a CPU, in minutes."""
    from trlx.launch.demo import run

    run(method, out, seed)
    return 0


@commands.command("env", epilog=example("trlx env", "trlx env --json > environment.json"))
def env(as_json: Json = False) -> int:
    """What a report of a bug needs: versions, machine, and the variables of the environment that trlx reads."""
    from trlx.report.environment import lines

    print(*lines(as_json), sep="\n")
    return 0
