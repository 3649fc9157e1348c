"""`trlx.train`: check the arguments, build the trainer, feed it, let it learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import trlx.trainer.accelerate
import trlx.trainer.nemo  # noqa: F401  registers its trainers, as the line above does
from trlx import logging
from trlx.config import TrainConfig, TRLConfig
from trlx.data.prompts import Prompt, PromptPipeline
from trlx.data.rows import as_list, common_method
from trlx.launch.replay import Replay
from trlx.presets import load_preset, over_preset
from trlx.registry import pipelines, trainers
from trlx.report.reporter import Reporter
from trlx.rewards.weighted import WeightedRewards
from trlx.run.callbacks import Callback, check_callbacks
from trlx.run.checks import at_start
from trlx.run.failures import for_users
from trlx.run.folder import check_folders
from trlx.run.hub import check_login
from trlx.strict import called_here, check_keywords, suggestion
from trlx.tracking import check_installed
from trlx.trainer.base import OURS, Trainer
from trlx.yaml_files import read_yaml

logger = logging.get_logger(__name__)


@for_users
def train(
    model_path: Any = None,
    reward_fn: Callable[..., Any] | list[Any] | dict[str, Any] | WeightedRewards | None = None,
    dataset: Iterable[Any] | None = None,
    samples: list[Any] | None = None,
    rewards: list[float] | None = None,
    prompts: list[Any] | None = None,
    eval_prompts: list[Any] | None = None,
    metric_fn: Callable[..., Any] | None = None,
    config: TRLConfig | Mapping[str, Any] | str | Path | None = None,
    stop_sequences: list[str] | None = None,
    eval_samples: list[Any] | None = None,
    callbacks: list[Callback] | None = None,
    **others: Any,
) -> Trainer:
    """Fine-tunes a language model: online with a reward function, or offline on samples.

    Args:
        model_path: hub name, folder or ``transformers.PretrainedConfig``; replaces ``config.model.model_path``.
        reward_fn: is called with those keywords that it names: samples, prompts and outputs (texts without eos),
            prompt_ids, output_ids, ended, messages, the prompts' further keys (each a list of one entry per sample),
            tokenizer and step. Returns one entry per sample: a number, a list of one number per response token, or a
            dict of these by name. May be ``async def``, a list or dict of functions, or ``trlx.WeightedRewards``. See
            docs/rewards.md.
        dataset: deprecated; ``(samples, rewards)``.
        samples: texts, dialogues (lists of alternating prompts and outputs), chats (lists of messages), pairs (dicts
            with "prompt", "chosen" and "rejected"), answers with a label (dicts with "prompt", "completion" and
            "label"), or a data set. See docs/data.md.
        rewards: one number per sample (ILQL); without them samples are imitated (SFT), or compared (DPO, KTO).
        prompts: texts, chats, or dicts with "prompt" and further keys, which reach reward_fn as keyword lists.
        eval_prompts: the same for evaluations; by default the first of `prompts`.
        metric_fn: called like reward_fn, at evaluations; returns a dict of numbers or of lists, one number per sample.
        config: a TRLConfig, a preset's name, or a dict or YAML file merged (see `over_preset`) over the preset of PPO
            (with reward_fn), ILQL (with rewards), DPO (with pairs), KTO (with labels) or SFT. None: that preset.
        stop_sequences: texts that end a response and are cut off it.
        eval_samples: like `samples`, but not trained on; evaluations log their loss (SFT, DPO, KTO) or accuracy.
        callbacks: see the numbers of the run and may end it: `trlx.Callback`, `trlx.EarlyStopping`.

    Returns:
        The trainer, after training: ``.generate``, ``.save_pretrained``, ``.evaluate``.

    Raises:
        ValueError, TypeError: an argument is unknown, or contradicts another one or the config.
        trlx.rewards.scoring.RewardError: reward_fn or metric_fn failed.
    """
    _refuse(others)
    if dataset is not None:
        warnings.warn("train(dataset=...) is now train(samples=..., rewards=...)", DeprecationWarning, stacklevel=3)
        samples, rewards = dataset
    config = _config(config, model_path, reward_fn, rewards, samples)
    trainer_class = checked(config, reward_fn, prompts, samples, rewards, eval_prompts, eval_samples)
    check_callbacks(callbacks or [])
    functions = {"reward_fn": reward_fn, "metric_fn": metric_fn, "stop_sequences": stop_sequences or []}
    trainer = trainer_class(config=config, **functions, **config.train.trainer_kwargs)
    _watch(trainer, callbacks)
    feed(trainer, prompts, eval_prompts, samples, rewards, eval_samples)
    at_start(trainer)
    trainer.learn() if (replay := Replay.asked()) is None else replay.learn(trainer)
    return trainer


def _refuse(others: Iterable[str]) -> None:
    for name in others:
        here = called_here(name)
        advice = f" Write {here}; settings go into config={{...}}." if here else suggestion(name, train.__annotations__)
        raise TypeError(f"train() has no argument {name!r}.{advice}")


def _config(config: Any, model_path, reward_fn, rewards, samples=None) -> TRLConfig:
    if config is None:
        logger.warning("No config: using the preset of the method that the arguments ask for")
        config = {}
    if isinstance(config, (str, Path)):
        config = read_yaml(config) if Path(config).is_file() else load_preset(str(config))
    if isinstance(config, Mapping):
        offline = common_method(samples) if rewards is None else "ilql"
        config = over_preset(config, offline if reward_fn is None else "ppo")
    elif not isinstance(config, TRLConfig):
        raise TypeError(f"config must be a TRLConfig, a dict, or the name of a preset or file, got {config!r}")
    config = config if model_path is None else config.evolve(model={"model_path": model_path})
    return config if (replay := Replay.asked()) is None else replay.config(config)


def checked(
    config: TRLConfig, reward_fn=None, prompts=None, samples=None, rewards=None, eval_prompts=None, eval_samples=None
) -> type[Trainer]:
    """The class of the trainer that `config` names. Raises what `train` raises before it builds one."""
    found = _trainer_class(config.train, reward_fn, prompts, samples, rewards)
    _check_evaluations(found, eval_prompts, eval_samples)
    check_folders(config.train)
    check_installed(config.train.tracker)
    check_login(config.train)
    return found


def _trainer_class(config: TrainConfig, reward_fn, prompts, samples, rewards) -> type[Trainer]:
    """The class that ``train.trainer`` names, which the arguments must suit."""
    found = trainers.get(config.trainer)
    if not issubclass(found, Trainer):
        raise TypeError(f"{found.__name__} must subclass trlx.trainer.base.Trainer, see docs/extending.md")
    if reward_fn is None and samples is None:
        raise ValueError("train() needs reward_fn (to learn online) or samples (to learn offline)")
    if found.online:
        _check_online(found.__name__, reward_fn, prompts, samples, rewards, config.batch_size)
    else:
        _check_offline(found, prompts, samples, rewards)
    check_keywords(found, config.trainer_kwargs, "train.trainer_kwargs", ours=OURS)
    return found


def _check_online(trainer: str, reward_fn, prompts, samples, rewards, batch_size: int) -> None:
    if reward_fn is None:
        raise ValueError(f"{trainer} learns online: pass reward_fn, or set train.trainer to an offline trainer")
    if samples is not None or rewards is not None:
        raise ValueError(f"{trainer} learns from what it samples itself: leave out samples and rewards")
    if prompts is None:
        raise ValueError(
            "train() got no prompts: pass prompts=[...]. CarperAI's trlx then began every response from bos; to do "
            f"that, write prompts=[tokenizer.bos_token or tokenizer.eos_token] * {batch_size}"
        )


def _check_offline(trainer_class: type[Trainer], prompts, samples, rewards) -> None:
    trainer = trainer_class.__name__
    if samples is None:
        raise ValueError(f"{trainer} learns from samples: pass samples, or set train.trainer to an online trainer")
    if rewards is not None and len(samples) != len(rewards):
        raise ValueError(f"train() got {len(samples)} samples but {len(rewards)} rewards; pass one reward per sample")
    if trainer_class.rewarded and rewards is None:
        raise ValueError(f"{trainer} learns from rewards: pass rewards, one number per sample")
    if not trainer_class.rewarded and rewards is not None:
        raise ValueError(f"{trainer} does not use rewards: leave them out, or use an ILQL trainer")
    if prompts is not None:  # no error: CarperAI's trlx ignored them, too
        advice = "write eval_prompts=[...] to sample these" if trainer_class.generates else "leave them out"
        logger.warning(f"{trainer} learns from samples and ignores prompts: {advice}")


def _check_evaluations(trainer_class: type[Trainer], eval_prompts, eval_samples) -> None:
    name = trainer_class.__name__
    if eval_prompts is not None and not trainer_class.generates:
        raise ValueError(f"{name} generates nothing, so it has no use for eval_prompts: pass eval_samples")
    if eval_samples is not None and not hasattr(trainer_class, "add_eval_samples"):
        raise ValueError(f"{name} is not evaluated on samples: leave out eval_samples")


def _watch(trainer: Trainer, callbacks: list[Callback] | None) -> None:
    """Gives a trainer what looks at its run: the callbacks, and what writes the report."""
    trainer.callbacks.extend(callbacks or [])
    trainer.watchers.append(Reporter)


def feed(trainer: Trainer, prompts=None, eval_prompts=None, samples=None, rewards=None, eval_samples=None) -> None:
    """Gives a trainer what it learns from and what it is evaluated on."""
    global_batch = trainer.config.train.batch_size * trainer.backend.data_size
    if trainer.online:
        prompts = as_list(prompts, "prompts")
        trainer.add_prompt_pipeline(_pipeline(prompts, trainer))
    else:
        data = [samples] if rewards is None else [samples, rewards]
        trainer.make_experience(*data, trainer.config.train.seq_length)
        if type(trainer).collect is Trainer.collect and not hasattr(trainer, "samples"):
            raise TypeError(f"{type(trainer).__name__}.make_experience must call self.learn_from(rollouts)")
        prompts = [trainer.tokenizer.bos_token or trainer.tokenizer.eos_token] * global_batch
    if trainer.generates:
        trainer.add_eval_pipeline(_pipeline(prompts[:global_batch] if eval_prompts is None else eval_prompts, trainer))
    if eval_samples is not None:
        _hold_out(trainer, eval_samples)


def _hold_out(trainer: Trainer, eval_samples) -> None:
    try:
        trainer.add_eval_samples(eval_samples, trainer.config.train.seq_length)
    except (ValueError, TypeError) as error:
        error.args = (f"eval_samples: {error}",)
        raise


def _pipeline(prompts: list[Any], trainer: Trainer) -> PromptPipeline:
    config = trainer.config
    new_tokens = max(sampling.max_new_tokens for _, sampling in trainer.eval_variants)
    new_tokens = max(new_tokens, trainer.sampling_kwargs.get("max_new_tokens") if trainer.online else 0)
    room = config.train.seq_length - new_tokens
    if room < 1:
        raise ValueError(
            f"train.seq_length ({config.train.seq_length}) leaves no room for a prompt: it must be more than "
            f"max_new_tokens in the method's gen_kwargs ({new_tokens})"
        )
    pipeline_class, special_tokens = pipelines.get(config.train.pipeline), trainer.backend.row_format.special_tokens
    made = pipeline_class(as_list(prompts, "prompts"), room, trainer.tokenizer, add_special_tokens=special_tokens)
    if not isinstance(made[0], Prompt):
        kind = type(made[0]).__name__
        raise TypeError(f"{pipeline_class.__name__}[0] must be a trlx.data.prompts.Prompt, got a {kind}")
    trainer.backend.check_prompts([made[i].ids for i in range(len(made))], new_tokens)
    return made
