"""``trlx sweep``: many runs, each with settings of its own, on Ray Tune."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from trlx.launch.job import Job
from trlx.launch.results import FOLDERS, read_results, title_of, write_report, write_results
from trlx.launch.script import TRLX, assignments, check_script, script_path
from trlx.launch.space import SCHEDULERS, Space, plain, read_space
from trlx.launch.trial import Trial, launch_command
from trlx.optional import require
from trlx.strict import ConfigError

COPY = "sweep.yaml"
"""Copy of the sweep's file in the folder of all trials, below the command. Only the same command goes on."""
PACKAGES = {"bayesopt": '"bayesian-optimization<2"', "bohb": "hpbandster ConfigSpace", "optuna": "optuna"}
"""What Ray's searches need beside Ray, for pip."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_kill_child_processes_on_worker_exit": "0",
}
"""Environment of Ray: it sends nothing, prints nothing, keeps no copies of metrics, and does not kill what it started:
trials save and end by themselves, see `trlx.launch.trial_process`."""


def run(
    work: str | Job,
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
        work: a script with ``main(hparams)``, or what to train.
        num_gpus: GPUs of each trial; None: one if there is one.
        num_cpus: CPUs of each process of a trial; None: 4, or as many as there are.
        server_address: host:port of a Ray Client server; None: ``RAY_ADDRESS``, else this machine.
        local: this machine, whatever ``RAY_ADDRESS`` says.
        out: folder of all trials. If it holds this sweep already, the sweep goes on.

    Raises:
        FileNotFoundError: the script, `config` or `accelerate_config` is not there.
        ValueError: something in `work` or `config` is wrong, `out` holds another sweep, or a trial needs more than
            there is; the message says what to write.
        ImportError: Ray, or a package that a search needs, is not installed.
    """
    if local and server_address:
        raise ValueError("--local is this machine and --server_address another: leave one out")
    if accelerate_config is not None and not accelerate_config.is_file():
        raise FileNotFoundError(f"there is no {accelerate_config}, which --accelerate_config names")
    sweep = Sweep(work, read_space(config), out)
    require("ray", extra="sweep", purpose="A sweep")
    what = "Go on with" if sweep.is_begun else f"Train {sweep.space.num_trials} times with {sweep.name}, in"
    if not assume_yes and not _confirmed(f"{what} {sweep.folder}? [y/n] "):
        return 1
    sweep.folder.mkdir(parents=True, exist_ok=True)
    (sweep.folder / COPY).write_text(sweep.headline + config.read_text(encoding="utf-8"), encoding="utf-8")
    with _ray("local" if local else server_address and f"ray://{server_address}") as ray:
        resources = _resources(ray.cluster_resources(), num_gpus, num_cpus)
        sweep.command = launch_command(sweep.words, resources["gpu"], accelerate_config and accelerate_config.resolve())
        errors = _fit(sweep, resources)
    results = read_results(sweep.folder, sweep.space, errors)
    print(*write_results(sweep.folder, results, sweep.space), sep="\n")
    return 0 if results and results[0].is_ranked else 1


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


class Sweep:
    """What a trial of this sweep is: what runs, with which settings, in which folder.

    Raises:
        FileNotFoundError, ValueError: see `run`.
    """

    command: list[str]

    def __init__(self, work: str | Job, space: Space, folder: Path | None = None):
        if isinstance(work, str):
            check_script(work)
            self.words, self.name = [work], script_path(work).stem
        else:
            replace(work, settings=[*work.settings, *assignments(space.example)]).arguments()
            self.words, self.name = [TRLX, *work.words()], work.command
        time = datetime.now().replace(microsecond=0).isoformat()
        folder = folder or Path("ckpts", "sweeps", f"{self.name}-{time.replace(':', '')}")
        self.space, self.cwd, self.folder = space, Path.cwd(), folder.resolve()
        self.ray_folder = self.folder / "ray"
        self.is_begun = self.ray_folder.is_dir()
        self.common = {"train.project_name": f"sweep_{self.name}", "train.group_name": time}
        self.headline = f"# {shlex.join(self.words)}\n"
        if any(self.folder.glob(FOLDERS)) and not self._is_same(self.folder / COPY):
            raise ValueError(f"{self.folder} holds the trials of another sweep; name another folder")

    def _is_same(self, copy: Path) -> bool:
        if not self.is_begun or not copy.read_text(encoding="utf-8").startswith(self.headline):
            return False
        return read_space(copy) == self.space

    def trial(self, name: str, chosen: Mapping[str, Any], seen: int = -1) -> Trial:
        number = number_of(name)
        settings = {**self.common, **self.space.hparams(number, chosen)}
        return Trial(self.command, self.cwd, self.folder / name_of(number), settings, self.space.tune.metric, seen)


def name_of(number: int) -> str:
    """The name of a trial, and of its folder."""
    return f"trial_{number:03d}"


def number_of(name: str) -> int:
    """The number in the name of a trial. Ray adds to the name of a folder if it starts a trial again."""
    return int(name.split("_")[1])


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, at an address or on this machine, while the block runs."""
    os.environ.update(ENVIRONMENT)
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with tempfile.TemporaryDirectory(prefix="trlx-", dir=_short_folder(), ignore_cleanup_errors=True) as folder:
        own = {"include_dashboard": False, "object_store_memory": 2**27, "num_cpus": _cpus(), "_temp_dir": folder}
        logging.getLogger("ray").setLevel(logging.ERROR)  # for what it says before it reads logging_level
        # it would show traces of its processes where a trial fails; the table shows why it failed
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **(own if address == "local" else {}))
        try:
            yield ray
        finally:
            ray.shutdown()


def _short_folder() -> str:
    """A folder for temporary files. Ray's sockets lie in it, whose paths may have 107 characters."""
    return tempfile.gettempdir() if len(tempfile.gettempdir()) < 20 else "/tmp"


def _cpus() -> int | None:
    """The CPUs that this process may use if that is not all of them; else None: Ray counts."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable if usable != os.cpu_count() else None


def _resources(there: Mapping[str, float], num_gpus: int | None, num_cpus: int | None) -> dict[str, int]:
    """What each trial gets of the CPUs and GPUs that there are."""
    has = {name: int(there.get(name.upper(), 0)) for name in ("cpu", "gpu")}
    gpus = min(has["gpu"], 1) if num_gpus is None else num_gpus
    processes = max(gpus, 1)
    wanted = {"cpu": processes * num_cpus if num_cpus else min(4 * processes, has["cpu"]), "gpu": gpus}
    for name, count in wanted.items():
        if count > has[name]:  # Ray would wait for them
            raise ValueError(f"a trial needs {count} {name.upper()}s and there are {has[name]}: lower --num_{name}s")
    return wanted


def _fit(sweep: Sweep, resources: Mapping[str, int]) -> dict[str, str]:
    """Runs all trials; returns by name of a trial why it failed."""
    from ray import tune

    trainable = tune.with_resources(_trainable(tune, sweep), dict(resources))
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
                callbacks=[_progress(tune, sweep)],
                verbose=0,
            ),
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.")
        grid = tuner.fit()
    failed = {name_of(number_of(Path(result.path).name)): result.error for result in grid if result.error}
    # the cause is a TrialError, and Ray's error the same with traces of Ray's own processes
    return {name: str(getattr(error, "cause", error)) for name, error in failed.items()}


def _trainable(tune: Any, sweep: Sweep) -> type:
    hands_over = sweep.space.tune.scheduler == "pbt"

    class RayTrial(tune.Trainable):
        """A trial as Ray sees it: Ray runs this in a process of its own, which starts the process that trains."""

        def setup(self, config: dict[str, Any]) -> None:
            self.last: dict[str, float] = {"step": -1}
            self.run = self._trial(config)

        def step(self) -> dict[str, Any]:
            found = self.run.next_evaluation()
            self.last = found or self.last
            return {**self.last, "is_new": found is not None, "done": found is None}

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            # Ray saves a trial before it pauses it in favour of others; weights are in the trial's own folder
            self.run.pause()
            return {"last": self.last, "of": self.trial_name, "handed": self.run.hand_over() if hands_over else None}

        def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.last = checkpoint["last"]
            self.run = self._trial(self.config)
            if number_of(checkpoint["of"]) != number_of(self.trial_name):
                self.run.take(checkpoint["handed"])

        def cleanup(self) -> None:
            self.run.stop()

        def _trial(self, config: dict[str, Any]) -> Trial:
            return sweep.trial(self.trial_name, _chosen(sweep.space, config), int(self.last["step"]))

    return RayTrial


def _progress(tune: Any, sweep: Sweep) -> Any:
    class Progress(tune.Callback):
        """Prints a line for each evaluation, and rewrites the report whenever a trial ends."""

        def on_trial_result(
            self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            metric = sweep.space.tune.metric
            if result["is_new"]:
                print(f"{trial}: {metric} {result[metric]:.4g} at step {result['step']}", flush=True)

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            write_report(sweep.folder, map(str, trials), title_of(sweep.folder, sweep.space))

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            print(f"{trial} failed", flush=True)

        def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
            self.left = sweep.space.num_trials - sum(trial.is_finished() for trial in trials)

        def on_experiment_end(self, trials: list, **info: Any) -> None:
            if self.left:  # by now Ray calls all of them finished
                print(f"{self.left} trials have not ended: the same command with --out {sweep.folder} goes on")

    return Progress()


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
    return tune.TuneConfig(
        metric=settings.metric,
        mode=settings.mode,
        search_alg=_searcher(tune, settings.search_alg),
        scheduler=_scheduler(tune, space),
        num_samples=settings.num_samples,
        max_concurrent_trials=settings.max_concurrent_trials,
        time_budget_s=settings.time_budget_s,
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
    )


def _searcher(tune: Any, name: str) -> Any:
    if name == "random":  # the trials of `trlx.launch.space.trials`
        return tune.search.BasicVariantGenerator(random_state=0)
    try:
        searcher = tune.create_searcher(name)
    except (AssertionError, AttributeError, ImportError) as error:  # AttributeError: a version that Ray does not know
        raise ImportError(f"search_alg {name} needs packages of its own: pip install {PACKAGES[name]}") from error
    logging.getLogger(name).setLevel(logging.WARNING)  # optuna's has the same name, and would tell of each trial
    return searcher


def _scheduler(tune: Any, space: Space) -> Any:
    name, settings, varied = space.tune.scheduler, space.tune.scheduler_kwargs, space.varied
    if name == "fifo":
        given = {}
    elif name == "pbt":
        mutations = {
            key: list(parameter.values) if parameter.strategy in ("choice", "grid") else parameter.domain()
            for key, parameter in varied.items()
        }
        explored = {"custom_explore_fn": lambda chosen: {key: varied[key].nearest(chosen[key]) for key in chosen}}
        given = {"perturbation_interval": 4, "hyperparam_mutations": mutations, **explored}
    else:
        given = {"max_t": space.tune.max_evaluations}
    # a trial reports evaluations, and this counts them
    made, given = partial(tune.create_scheduler, SCHEDULERS[name]), {"time_attr": "training_iteration", **given}
    known = inspect.signature(type(made(**given)).__init__).parameters
    for key in settings.keys() - known.keys():
        known = ", ".join(list(known)[1:])
        raise ConfigError(f"tune_config.scheduler_kwargs: {name} has no argument {key!r}. Known: {known}")
    return made(**{**given, **settings})


def _trial_name(trial: Any) -> str:
    return name_of(int(trial.experiment_tag.split("_")[0]))
