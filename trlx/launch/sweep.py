"""``python -m trlx sweep``: many runs of a script, each with settings of its own, on Ray or one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

from trlx.launch.results import Result, ranked, write_results
from trlx.launch.script import check_script, script_path
from trlx.launch.space import SCHEDULERS, Space, plain, read_space
from trlx.launch.trial import Trial, TrialError, launch_command
from trlx.optional import require

COPY = "sweep.yaml"
"""Copy of the sweep's file in the folder of all trials. A later command goes on only with the same sweep."""
PACKAGES = {"bayesopt": '"bayesian-optimization<2"', "bohb": "hpbandster ConfigSpace"}
"""What Ray's searches need beside Ray, for pip."""


def run(
    script: str,
    config: Path,
    *,
    accelerate_config: Path | None = None,
    num_gpus: int | None = None,
    num_cpus: int | None = None,
    server_address: str | None = None,
    local: bool = False,
    out: Path | None = None,
    assume_yes: bool = False,
) -> int:
    """Checks everything, asks, runs all trials and writes what they found; returns 0 if a trial is ranked, else 1.

    Args:
        num_gpus: GPUs of each trial; None: one if this machine has one.
        out: folder of all trials. If it holds this sweep already, the sweep goes on.

    Raises:
        FileNotFoundError: the script, `config` or `accelerate_config` is not there.
        ValueError: the script has no ``main``, or something in `config` is wrong, or `out` holds another sweep; the
            message says what to write.
        Others: see `run_on_ray`.
    """
    if num_gpus is None:
        import torch

        num_gpus = int(torch.cuda.is_available())
    if accelerate_config is not None and not accelerate_config.is_file():
        raise FileNotFoundError(f"there is no {accelerate_config}, which --accelerate_config names")
    check_script(script)
    sweep = Sweep(script, read_space(config), out, num_gpus, accelerate_config)
    sweep.check(local)
    what = "Go on with" if sweep.is_begun else f"Run main() of {script} {sweep.space.num_trials} times, in"
    if not assume_yes and not _confirmed(f"{what} {sweep.folder}? [y/n] "):
        return 1
    sweep.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, sweep.folder / COPY)
    found = run_local(sweep) if local else run_on_ray(sweep, num_cpus, server_address)
    tune = sweep.space.tune
    written = write_results(sweep.folder, ranked(found, tune.mode), tune.metric, tune.mode, sweep.space.varied)
    print(*written, sep="\n")
    return 0 if written[-1].suffix == ".yaml" else 1


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


class Sweep:
    """What a trial of this sweep is: which script runs, with which settings, in which folder."""

    def __init__(
        self,
        script: str,
        space: Space,
        folder: Path | None = None,
        num_gpus: int = 0,
        accelerate_config: Path | None = None,
    ):
        name, time = script_path(script).stem, datetime.now().replace(microsecond=0).isoformat()
        folder = folder or Path("ckpts", "sweeps", f"{name}-{time.replace(':', '')}")
        self.space, self.num_gpus, self.cwd, self.folder = space, num_gpus, Path.cwd(), folder.resolve()
        self.ray_folder = self.folder / "ray"
        self.is_begun = self.ray_folder.is_dir()
        self.command = launch_command(script, num_gpus, accelerate_config and accelerate_config.resolve())
        self.common = {"train.project_name": f"sweep_{name}", "train.group_name": time}

    def check(self, local: bool) -> None:
        """Refuses what needs Ray, if `local`, and a folder with another sweep."""
        tune = self.space.tune
        if local and (tune.search_alg, tune.scheduler, tune.time_budget_s) != ("random", "fifo", None):
            raise ValueError("--local knows search_alg random, scheduler fifo and no time_budget_s: leave --local out")
        is_same = not local and self.is_begun and read_space(self.folder / COPY) == self.space
        if any(self.folder.glob("trial_*")) and not is_same:
            raise ValueError(f"{self.folder} holds the trials of another sweep; name another folder")

    def trial(self, number: int, chosen: Mapping[str, Any], seen: int = -1) -> Trial:
        settings = {**self.common, **self.space.hparams(number, chosen)}
        return Trial(self.command, self.cwd, self.folder / name_of(number), settings, self.space.tune.metric, seen)


def name_of(number: int) -> str:
    """The name of a trial, and of its folder."""
    return f"trial_{number:03d}"


def number_of(name: str) -> int:
    """The number in the name of a trial. Ray adds to the name of a folder if it starts a trial again."""
    return int(name.split("_")[1])


def run_local(sweep: Sweep, seed: int = 0) -> list[Result]:
    """Random and grid search without Ray, one trial after the other. Ctrl-C ends the sweep."""
    metric, results = sweep.space.tune.metric, []
    for number, chosen in enumerate(sweep.space.draws(Random(seed))):
        trial, series, error = sweep.trial(number, chosen), [], None
        try:
            while (found := trial.next_evaluation()) is not None:
                series.append((found["step"], found[metric]))
                print(f"{name_of(number)}: {metric} {found[metric]:.4g} at step {found['step']}", flush=True)
        except TrialError as failure:
            error = str(failure)
        except KeyboardInterrupt:
            break
        finally:
            trial.stop()
            results.append(Result(name_of(number), sweep.space.hparams(number, chosen), series, error))
    return results


def run_on_ray(sweep: Sweep, num_cpus: int | None = None, server_address: str | None = None) -> list[Result]:
    """Searches with Ray Tune, as many trials at a time as the machine or cluster has room for.

    Args:
        num_cpus: for each process of a trial; None: 4, or as many as there are.
        server_address: host:port of a Ray Client server; None: ``RAY_ADDRESS``, else this machine.

    Raises:
        ImportError: Ray, or a package that a search algorithm needs, is not installed.
        ValueError: a trial needs more GPUs or CPUs than there are.
    """
    require("ray", extra="sweep", purpose="A sweep (but for one with --local)")
    import ray
    from ray import tune

    ray.init(address=f"ray://{server_address}" if server_address else None, ignore_reinit_error=True)
    try:
        resources = _resources(ray.cluster_resources(), sweep.num_gpus, num_cpus)
        trainable = tune.with_resources(_trainable(tune, sweep), resources)
        if sweep.is_begun:
            tuner = tune.Tuner.restore(str(sweep.ray_folder), trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_param_space(tune, sweep.space),
                tune_config=_tune_config(tune, sweep.space),
                run_config=tune.RunConfig(
                    name=sweep.ray_folder.name,
                    storage_path=str(sweep.folder),
                    # Ray's default also saves trials at their end; with it a test of hyperband waited forever
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            )
        return [_result(sweep, found) for found in tuner.fit()]
    finally:
        ray.shutdown()


def _resources(there: Mapping[str, float], num_gpus: int, num_cpus: int | None) -> dict[str, float]:
    processes = max(num_gpus, 1)
    cpus = processes * num_cpus if num_cpus else min(4 * processes, there.get("CPU", 1))
    wanted = {"cpu": cpus, "gpu": num_gpus}
    for name, count in wanted.items():
        has = int(there.get(name.upper(), 0))
        if count > has:  # Ray would wait for them
            raise ValueError(f"a trial needs {count:g} {name.upper()}s and there are {has}: lower --num_{name}s")
    return wanted


def _trainable(tune: Any, sweep: Sweep) -> type:
    class RayTrial(tune.Trainable):
        """A trial as Ray sees it: Ray runs this in a process of its own, which starts the process of the script."""

        def setup(self, config: dict[str, Any]) -> None:
            self.last: dict[str, float] = {"step": -1}
            self.run = self._trial(config)

        def step(self) -> dict[str, Any]:
            found = self.run.next_evaluation()
            self.last = found or self.last
            return {**self.last, "done": found is None}

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            # Ray saves a trial before it pauses it in favour of others; weights are in the trial's own folder
            self.run.pause()
            return {"last": self.last}

        def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.last = checkpoint["last"]
            self.run = self._trial(self.config)

        def cleanup(self) -> None:
            self.run.stop()

        def _trial(self, config: dict[str, Any]) -> Trial:
            return sweep.trial(number_of(self.trial_name), _chosen(sweep.space, config), int(self.last["step"]))

    return RayTrial


def _param_space(tune: Any, space: Space) -> dict[str, Any]:
    if space.tune.search_alg != "bayesopt":
        return {name: parameter.domain() for name, parameter in space.varied.items()}
    # Ray's bayesopt would search a logarithmic range as if it were linear, so it searches the logarithms
    return {name: tune.uniform(*parameter.bounds) for name, parameter in space.varied.items()}


def _chosen(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray chose, as settings: values instead of their logarithms."""
    if space.tune.search_alg == "bayesopt":
        return {name: space.varied[name].decode(value) for name, value in plain(config).items()}
    return plain(config)


def _tune_config(tune: Any, space: Space) -> Any:
    settings = space.tune
    judged = {"metric": settings.metric, "mode": settings.mode}
    # a scheduler counts what a trial reports, which are evaluations
    longest = {} if settings.scheduler == "fifo" else {"max_t": settings.max_evaluations}
    return tune.TuneConfig(
        **judged,
        search_alg=None if settings.search_alg == "random" else _searcher(tune, settings.search_alg, judged),
        scheduler=tune.create_scheduler(SCHEDULERS[settings.scheduler], **longest),
        num_samples=settings.num_samples,
        max_concurrent_trials=settings.max_concurrent_trials,
        time_budget_s=settings.time_budget_s,
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
    )


def _searcher(tune: Any, name: str, judged: Mapping[str, str]) -> Any:
    try:
        return tune.create_searcher(name, **judged)
    except (AssertionError, AttributeError, ImportError) as error:  # AttributeError: a version that Ray does not know
        raise ImportError(f"search_alg {name} needs packages of its own: pip install {PACKAGES[name]}") from error


def _trial_name(trial: Any) -> str:
    return name_of(int(trial.experiment_tag.split("_")[0]))


def _result(sweep: Sweep, found: Any) -> Result:
    number, metric, table = number_of(Path(found.path).name), sweep.space.tune.metric, found.metrics_dataframe
    # a trial that was started again reports some evaluations twice
    series = {} if table is None or metric not in table else dict(zip(table["step"], table[metric], strict=True))
    # Ray keeps no settings of a trial that was interrupted before its first evaluation
    hparams = sweep.space.hparams(number, _chosen(sweep.space, found.config or {}))
    # the cause is a TrialError, and Ray's error the same with traces of Ray's own processes
    error = found.error and str(getattr(found.error, "cause", found.error))
    return Result(name_of(number), hparams, sorted(series.items()), error)
