"""Hyper-parameter sweeps: many runs of a script, each with settings of its own, on ray or one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

from trlx.launch.results import read_results, write_results
from trlx.launch.script import check_script, script_path
from trlx.launch.space import Parameter, Space, TuneConfig, read_space
from trlx.launch.trial import Launch, Trial, TrialError, claim_folder
from trlx.optional import is_available, optional_import, require

FIRST_SEED = 1000
"""Trial n has the seed FIRST_SEED + n, unless the sweep varies ``train.seed``."""


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
    """A whole sweep: checks, asks, runs all trials and writes what they found. 0 if any trial can be ranked, else 1.

    Args:
        num_gpus: of each trial; None: one where this machine has one.
        out: folder of all trials.

    Raises: as `Sweep.of`, `run_in_sequence` and `run_on_ray`.
    """
    num_gpus = int(_has_gpu()) if num_gpus is None else num_gpus
    sweep = Sweep.of(script, config, num_gpus=num_gpus, accelerate_config=accelerate_config, folder=out)
    question = f"Run main() of {script} {sweep.space.num_trials} times, in {sweep.folder}? [y/n] "
    if not assume_yes and not _confirmed(question):
        return 1
    if local:
        run_in_sequence(sweep)
    else:
        run_on_ray(sweep, num_cpus, server_address)
    written = sweep.write()
    print(*written, sep="\n")
    return 0 if written[-1].suffix == ".yaml" else 1


@dataclass(frozen=True)
class Sweep:
    """A script, what of it to vary, and the folder of all trials."""

    launch: Launch
    space: Space
    folder: Path

    @classmethod
    def of(
        cls,
        script: str,
        config: Path,
        *,
        num_gpus: int = 0,
        accelerate_config: Path | None = None,
        folder: Path | None = None,
    ) -> Sweep:
        """Reads and checks everything; starts nothing.

        Raises:
            FileNotFoundError: the script, `config` or `accelerate_config` is not there.
            ValueError: the script has no ``main``, or something in `config` is wrong; the message says what to write.
        """
        check_script(script)
        space = read_space(config)
        if accelerate_config is not None and not accelerate_config.is_file():
            raise FileNotFoundError(f"there is no {accelerate_config}, which --accelerate_config names")
        name, time = script_path(script).stem, datetime.now().replace(microsecond=0).isoformat()
        folder = folder or Path("ckpts", "sweeps", f"{name}-{time.replace(':', '')}")
        if any(folder.glob("trial_*")):
            raise ValueError(f"{folder} holds the trials of an older sweep; name another folder")
        common = {"train.project_name": f"sweep_{name}", "train.group_name": time}
        accelerate_config = accelerate_config and accelerate_config.resolve()
        launch = Launch(script, Path.cwd(), space.tune.metric, common, num_gpus, accelerate_config)
        return cls(launch, space, folder.resolve())

    def trial(self, chosen: Mapping[str, Any]) -> Trial:
        """A new trial with the settings chosen for it, in a folder and with a seed of its own."""
        number, folder = claim_folder(self.folder)
        return Trial(self.launch, folder, {"train.seed": FIRST_SEED + number, **self.space.fixed, **chosen})

    def write(self) -> list[Path]:
        """Prints and writes what the trials found; returns the paths, ``best.yaml`` last if there is one."""
        tune = self.space.tune
        results = read_results(self.folder, tune.metric, tune.mode)
        return write_results(self.folder, results, tune.metric, tune.mode, self.space.varied)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def run_in_sequence(sweep: Sweep, seed: int = 0) -> None:
    """Random and grid search without ray, one trial after the other; Ctrl-C ends it.

    Raises:
        ValueError: the sweep asks for what only ray has.
    """
    tune = sweep.space.tune
    if (tune.search_alg, tune.scheduler, tune.time_budget_s) != ("random", "fifo", None):
        raise ValueError("--local knows search_alg random and scheduler fifo only, and no time_budget_s: leave it out")
    for chosen in sweep.space.draws(Random(seed)):
        trial = sweep.trial(chosen)
        try:
            while (found := trial.next_evaluation()) is not None:
                print(
                    f"{trial.folder.name}: {tune.metric} {found[tune.metric]:.4g} at step {found['step']}", flush=True
                )
        except TrialError as error:
            print(f"{trial.folder.name}: {error}", flush=True)
        except KeyboardInterrupt:
            return
        finally:
            trial.stop()


def run_on_ray(sweep: Sweep, num_cpus: int | None = None, server_address: str | None = None) -> None:
    """Searches with ray.tune, as many trials at a time as the machine or cluster has room for.

    Args:
        num_cpus: for each process of a trial; None: 4, or as many as there are.
        server_address: host:port of a Ray Client server; None: ``RAY_ADDRESS``, else this machine.

    Raises:
        ImportError: ray, or what a search algorithm needs, is not installed.
        ValueError: a trial needs more GPUs or CPUs than there are.
    """
    require("ray", extra="sweep", purpose="A sweep (but for one with --local)")
    _require_search(sweep.space.tune.search_alg)
    import ray
    from ray import tune

    ray.init(address=f"ray://{server_address}" if server_address else None, ignore_reinit_error=True)
    try:
        resources = _resources(ray.cluster_resources(), sweep.launch.num_gpus, num_cpus)
        tuner = tune.Tuner(
            tune.with_resources(_trainable(tune, sweep), resources),
            param_space=_param_space(tune, sweep.space),
            tune_config=_tune_config(tune, sweep.space),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(sweep.folder),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        ray.shutdown()


def _require_search(search: str) -> None:
    """Ray leaves what its search algorithms need to those who use them."""
    if search == "bayesopt" and not hasattr(optional_import("bayes_opt", extra="sweep"), "UtilityFunction"):
        # version 2 renamed what ray calls
        raise ImportError('search_alg bayesopt needs a package of its own: pip install "bayesian-optimization<2"')
    if search == "bohb" and not (is_available("hpbandster") and is_available("ConfigSpace")):
        raise ImportError("search_alg bohb needs packages of its own: pip install hpbandster ConfigSpace")


def _resources(there: Mapping[str, float], num_gpus: int, num_cpus: int | None) -> dict[str, float]:
    processes = max(num_gpus, 1)
    cpus = processes * num_cpus if num_cpus else min(4 * processes, there.get("CPU", 1))
    wanted = {"cpu": cpus, "gpu": num_gpus}
    for name, count in wanted.items():
        if count > there.get(name.upper(), 0):
            has = int(there.get(name.upper(), 0))
            raise ValueError(f"a trial needs {count:g} {name.upper()}s and there are {has}: lower --num_{name}s")
    return wanted


def _trainable(tune: Any, sweep: Sweep) -> type:
    """What ray runs in a process beside each trial's own."""

    class RayTrial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.chosen = _plain(sweep.space, config)
            self.trial_run: Trial | None = None
            self.last: dict[str, float] = {}

        def step(self) -> dict[str, Any]:
            self.trial_run = self.trial_run or sweep.trial(self.chosen)
            found = self.trial_run.next_evaluation()
            self.last = found or self.last
            return {**self.last, "done": found is None}

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            # ray saves when it pauses a trial in favour of others; the weights lie in the trial's own folder
            self.trial_run.pause()
            return {"folder": str(self.trial_run.folder), "hparams": self.trial_run.hparams, "last": self.last}

        def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.last = checkpoint["last"]
            folder, seen = Path(checkpoint["folder"]), int(self.last["step"])
            self.trial_run = Trial(sweep.launch, folder, checkpoint["hparams"], seen)

        def cleanup(self) -> None:
            if self.trial_run is not None:
                self.trial_run.stop()

    return RayTrial


def _param_space(tune: Any, space: Space) -> dict[str, Any]:
    if space.tune.search_alg != "bayesopt":
        return {name: _domain(tune, parameter) for name, parameter in space.varied.items()}
    # it would search a logarithmic range as if it were even, so it gets plain numbers
    return {name: tune.uniform(*parameter.bounds) for name, parameter in space.varied.items()}


def _domain(tune: Any, parameter: Parameter) -> Any:
    values = list(parameter.values)
    if parameter.strategy in ("choice", "grid"):
        return getattr(tune, {"grid": "grid_search"}.get(parameter.strategy, parameter.strategy))(values)
    return getattr(tune, parameter.strategy)(*values)


def _plain(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ray chose as settings: values of numpy as Python's, numbers that stand for values as those."""
    chosen = {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}
    if space.tune.search_alg == "bayesopt":
        return {name: space.varied[name].decode(value) for name, value in chosen.items()}
    return chosen


def _tune_config(tune: Any, space: Space) -> Any:
    settings = space.tune
    judged = {"metric": settings.metric, "mode": settings.mode}
    return tune.TuneConfig(
        **judged,
        search_alg=_search(settings.search_alg, judged),
        scheduler=_scheduler(tune, settings),
        num_samples=settings.num_samples,
        max_concurrent_trials=settings.max_concurrent_trials,
        time_budget_s=settings.time_budget_s,
    )


def _search(name: str, judged: dict[str, str]) -> Any:
    if name == "bayesopt":
        from ray.tune.search.bayesopt import BayesOptSearch

        return BayesOptSearch(**judged)
    if name == "bohb":
        from ray.tune.search.bohb import TuneBOHB

        return TuneBOHB(**judged)
    return None


def _scheduler(tune: Any, settings: TuneConfig) -> Any:
    classes = {"hyperband": "HyperBandScheduler", "hyperbandforbohb": "HyperBandForBOHB"}
    if settings.scheduler not in classes:
        return None
    # its unit of time is what a trial reports, which are evaluations
    return getattr(tune.schedulers, classes[settings.scheduler])(max_t=settings.max_evaluations)
