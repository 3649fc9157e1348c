"""Import paths of CarperAI's trlx: names that moved, names that are gone, and the finder that answers for both.

``from trlx.data.configs import TRLConfig`` still works; each old path warns once in a process. The finder in
``trlx/__init__.py`` calls `find_spec` for names under ``trlx.`` that Python itself cannot find.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import warnings
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

_SECTIONS = "TRLConfig ModelConfig TokenizerConfig OptimizerConfig SchedulerConfig TrainConfig"

_MOVED: dict[str, dict[str, str]] = {
    "trlx.trlx": {"trlx.api": "train"},
    "trlx.data.configs": {"trlx.config": _SECTIONS},
    "trlx.data.default_configs": {
        "trlx.config": _SECTIONS,
        "trlx.method_configs": "PPOConfig ILQLConfig SFTConfig RFTConfig",
        "trlx.presets": "default_ppo_config default_ilql_config default_sft_config default_rft_config",
        "trlx.compat.functions": "default_nemo_1_3b_config default_nemo_2b_config default_nemo_20b_config",
    },
    "trlx.data.method_configs": {
        "trlx.method_configs": "MethodConfig get_method",
        "trlx.registry": "register_method",
    },
    "trlx.models.modeling_ppo": {
        "trlx.method_configs": "PPOConfig",
        "trlx.methods.advantages": "AdaptiveKLController=AdaptiveKL FixedKLController=FixedKL",
    },
    "trlx.models.modeling_ilql": {"trlx.method_configs": "ILQLConfig"},
    "trlx.trainer.accelerate_base_trainer": {
        "trlx.trainer.base": "AccelerateRLTrainer=Trainer",
        "trlx.registry": "register_trainer",
    },
    "trlx.trainer.accelerate_ppo_trainer": {"trlx.trainer.accelerate": "AcceleratePPOTrainer"},
    "trlx.trainer.accelerate_ilql_trainer": {
        "trlx.trainer.accelerate": "AccelerateILQLTrainer",
        "trlx.compat.functions": "make_experience",
    },
    "trlx.trainer.accelerate_sft_trainer": {
        "trlx.trainer.accelerate": "AccelerateSFTTrainer",
        "trlx.method_configs": "SFTConfig",
    },
    "trlx.trainer.accelerate_rft_trainer": {
        "trlx.trainer.accelerate": "AccelerateRFTTrainer",
        "trlx.method_configs": "RFTConfig",
    },
    "trlx.trainer.nemo_ppo_trainer": {"trlx.trainer.nemo": "NeMoPPOTrainer"},
    "trlx.trainer.nemo_ilql_trainer": {"trlx.trainer.nemo": "NeMoILQLTrainer"},
    "trlx.trainer.nemo_sft_trainer": {"trlx.trainer.nemo": "NeMoSFTTrainer"},
    "trlx.pipeline": {"trlx.registry": "register_datapipeline"},
    "trlx.pipeline.offline_pipeline": {
        "trlx.data.prompts": "PromptPipeline",
        "trlx.compat.functions": "DialogMessage DialogStore tokenize_dialogue",
    },
    "trlx.utils": {"trlx.compat.functions": "set_seed"},
    # of trlx.api, because the import of it registers trainers and pipelines
    "trlx.utils.loading": {"trlx.api": "get_trainer=trainers.get get_pipeline=pipelines.get"},
    "trlx.utils.logging": {
        "trlx.logging": "DEBUG INFO WARNING ERROR CRITICAL get_logger set_verbosity get_verbosity "
        "enable_explicit_format reset_format enable_progress_bar disable_progress_bar is_progress_bar_enabled "
        "MultiProcessAdapter=RankLogger log_levels=LEVELS"
    },
    "trlx.utils.modeling": {
        "trlx.methods.masked": "RunningMoments",
        "trlx.compat.functions": "whiten logprobs_of_labels flatten_dict",
        "trlx.models.decoder": "hf_get_decoder=trunk hf_get_decoder_blocks=blocks "
        "hf_get_decoder_final_norm=final_norm hf_get_lm_head=output_head",
    },
}
"""Old module -> new module -> names, as ``name`` or as ``old=new``."""

OLD_PATHS: dict[str, dict[str, str]] = {
    old: {
        name.partition("=")[0]: f"{new}:{name.rpartition('=')[2]}"
        for new, names in rows.items()
        for name in names.split()
    }
    for old, rows in _MOVED.items()
}
"""Old module -> name -> where it is now, as "module:attribute"."""

_BATCHES = "a sample is a trlx.batch.Rollout, and a padded batch of them a trlx.batch.TokenBatch"
_OUTPUTS = "a model's outputs for the tokens of a batch are a trlx.batch.TokenOutputs"
_CAUSAL = (
    "models are plain transformers models: load the folder of trainer.save_pretrained() with AutoModelForCausalLM; "
    "trlx.models.policy.Policy is the model in training with its heads"
)
_SEQ2SEQ = _CAUSAL.replace("CausalLM", "Seq2SeqLM")
_BRANCHES = "trlx.models.reference.Reference is the reference of any model: the policy with its first weights"
_STORES = "trlx.data.store.RolloutStore holds the samples, and trlx.data.collate.collate pads them"
_NEMO = "the NeMo trainers need nothing but Megatron-Core, see trlx.backends.megatron and docs/megatron.md"
_SWEEP = "trlx.launch.sweep.run is python -m trlx.sweep, and trlx.launch.space.read_space reads its file"
_ORCHESTRATORS = "trainers draw prompts and collect rollouts themselves: call trlx.train"
_ACROSS = "trainer.backend adds and gathers over processes, see trlx.backends.base.Backend"
_HANDLERS = "logging.getLogger('trlx') of Python's own logging is the library's logger"
_TREES = "trlx.batch.TokenBatch.to moves a batch; torch.utils._pytree.tree_map maps over other trees"
_DELTAS = "OpenDelta is not supported; model.peft_config trains adapters with peft"

_GONE_NAMES: dict[str, dict[str, str]] = {
    "trlx.data": {"GeneralElement RLElement BatchElement SimElement": _BATCHES},
    "trlx.data.configs": {"merge": "trlx.config.TRLConfig.update and trlx.config.TRLConfig.evolve merge settings"},
    "trlx.models.modeling_ppo": {
        "AutoModelForCausalLMWithValueHead AutoModelForCausalLMWithHydraValueHead": _CAUSAL,
        "AutoModelForSeq2SeqLMWithValueHead AutoModelForSeq2SeqLMWithHydraValueHead": _SEQ2SEQ,
        "CausalLMOutputWithValue Seq2SeqLMOutputWithValue": _OUTPUTS,
        "make_value_branch": "set method.num_value_layers_unfrozen; the class is trlx.models.heads.ValueBranch",
        "ModelBranch GPTModelBranch OPTModelBranch BloomModelBranch LlamaModelBranch GPTBigCodeModelBranch": _BRANCHES,
        "T5Branch hf_get_branch_class": _BRANCHES,
    },
    "trlx.models.modeling_ilql": {
        "AutoModelForCausalLMWithILQLHeads": _CAUSAL,
        "AutoModelForSeq2SeqLMWithILQLHeads": _SEQ2SEQ,
        "CausalILQLOutput Seq2SeqILQLOutput": _OUTPUTS,
        "ILQLBatch": _BATCHES,
        "ILQLHeads": "the Q heads are trlx.models.heads.QHeads",
        "topk_mask": "method.gen_kwargs takes top_k",
        "batched_index_select": "torch.take_along_dim does the same",
    },
    "trlx.pipeline": {
        "BasePipeline": "subclass trlx.data.prompts.PromptPipeline (docs/extending.md)",
        "BaseRolloutStore": _STORES,
        "MiniBatchIterator": "train.minibatch_size splits batches; trlx.batch.TokenBatch.split splits one by hand",
    },
    "trlx.pipeline.offline_pipeline": {
        "ILQLRolloutStorage ILQLSeq2SeqRolloutStorage ilql_collate_fn ilql_seq2seq_collate_fn": _STORES,
    },
    "trlx.sweep": {
        "get_param_space get_search_alg get_scheduler get_tune_config tune_function": _SWEEP,
        "create_report": "python -m trlx.sweep writes its report as files, see trlx.launch.results",
    },
    "trlx.trainer": {"BaseRLTrainer": "subclass trlx.trainer.base.Trainer (docs/extending.md)"},
    "trlx.trainer.nemo_ppo_trainer": {"PPOGPT megatron_trainer rank_0_tqdm": _NEMO},
    "trlx.trainer.nemo_ilql_trainer": {"ILQLGPT megatron_trainer ShuffledCyclicSequence": _NEMO},
    "trlx.trainer.nemo_sft_trainer": {"SFTGPT megatron_trainer ShuffledCyclicSequence": _NEMO},
    "trlx.utils": {
        "Clock": "time.perf_counter() tells the time; runs log time/step, time/rollout_time and their parts",
        "OptimizerName get_optimizer_class": "trlx.backends.optimizer.make_optimizer makes the optimizer of a config",
        "SchedulerName get_scheduler_class": "trlx.backends.optimizer.make_scheduler makes the scheduler of a config",
        "filter_non_scalars": "trlx.tracking.Tracker takes a dict of numbers",
        "significant": "f'{x:.3g}' shows three digits",
        "get_distributed_config": "trainer.backend.accelerator.state holds Accelerate's settings",
        "get_git_tag": "trlx.tracking.default_run_name makes the name of a run",
        "infinite_dataloader": "trlx.data.prompts.PromptStream draws prompts without end",
        "is_peft_available": "trlx.optional.is_available('peft') does the same",
        "print_rank_0": "trlx.logging.get_logger(__name__).info writes on the main process only",
        "to_device tree_map": _TREES,
    },
    "trlx.utils.loading": {"get_orchestrator get_model": _ORCHESTRATORS},
    "trlx.utils.logging": {
        "add_handler remove_handler disable_default_handler enable_default_handler": _HANDLERS,
        "disable_propagation enable_propagation": _HANDLERS,
        "get_log_levels_dict": "trlx.logging.LEVELS maps names to levels",
        "warning_advice": "trlx.logging.RankLogger.warning_advice is a method of loggers",
        "tqdm EmptyTqdm": "import tqdm itself; trlx.logging.is_progress_bar_enabled tells whether to show bars",
    },
    "trlx.utils.modeling": {
        "make_head": "heads are trlx.models.heads.ValueHead and trlx.models.heads.QHeads",
        "freeze_bottom_causal_layers freeze_bottom_seq2seq_layers": "trlx.models.decoder.freeze freezes any model",
        "findattr rgetattr rhasattr": "operator.attrgetter('a.b')(x) follows dotted names",
        "hf_get_hidden_size": "trlx.models.decoder.hidden_size takes the model",
        "hf_get_num_hidden_layers": "len(trlx.models.decoder.blocks(model)) counts them",
        "get_global_statistics gather_dict": _ACROSS,
        "get_tensor_stats": "trlx.methods.masked.spread_of(x, mask) gives mean, std, min and max",
        "MODIFIED_MODULES_DICT generate_layer_regex get_delta_model_class get_delta_modified_modules": _DELTAS,
        "parse_delta_kwargs regex_for_range": _DELTAS,
    },
}
"""Module -> gone names -> what to use instead."""

_GONE_MODULES: dict[str, str] = {
    "trlx.data.accelerate_base_datatypes": f"a prompt is a trlx.data.prompts.Prompt; {_BATCHES}",
    "trlx.data.ilql_types": _BATCHES,
    "trlx.data.ppo_types": _BATCHES,
    "trlx.models.modeling_base": _CAUSAL,
    "trlx.models.modeling_nemo_ilql": _NEMO,
    "trlx.models.modeling_nemo_ppo": _NEMO,
    "trlx.models.modeling_nemo_sft": _NEMO,
    "trlx.pipeline.ppo_pipeline": _STORES,
    # from versions before the original's last; old scripts and articles still import them
    "trlx.model": "trlx.trainer.accelerate has a trainer for each method",
    "trlx.orchestrator": _ORCHESTRATORS,
    "trlx.ray_tune": _SWEEP,
    "trlx.trainer.nn": _CAUSAL,
}
"""Gone module -> what to use instead."""

_GONE = _GONE_MODULES | {
    f"{module}.{name}": instead
    for module, rows in _GONE_NAMES.items()
    for names, instead in rows.items()
    for name in names.split()
}
GONE: dict[str, str] = {name: f"{name} of CarperAI's trlx is gone: {instead}" for name, instead in _GONE.items()}
"""Old dotted name -> the sentence that says what to use instead."""

OLD_COMMANDS = {"trlx.sweep": "sweep", "trlx.reference": "compare"}
"""Old module -> command: ``python -m trlx.sweep`` is ``python -m trlx sweep``."""


def find_spec(name: str) -> ModuleSpec | None:
    """The spec of an old module, or of a name that is gone; None for names that CarperAI's trlx never had."""
    is_command = name.removesuffix(".__main__") in OLD_COMMANDS
    if name not in OLD_PATHS and name not in GONE and not is_command:
        return None
    # Python looks up ``from package import name`` as the module package.name too, and so gets the sentence about name
    return importlib.util.spec_from_loader(name, _Loader(), origin=name, is_package=not name.endswith(".__main__"))


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in GONE:
            raise ImportError(GONE[spec.name], name=spec.name)
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: `_OldModule` reads the table."""

    def get_code(self, name: str) -> CodeType:
        """What ``python -m`` runs for an old command."""
        command = OLD_COMMANDS[name.removesuffix(".__main__")]
        source = f"import sys; from trlx.launch.cli import main; sys.exit(main(['{command}', *sys.argv[1:]]))"
        return compile(source, name, "exec")


class _OldModule(ModuleType):
    """Looks up each name on first use, and warns once per module."""

    def __getattr__(self, name: str) -> Any:
        table, full_name = OLD_PATHS.get(self.__name__, {}), f"{self.__name__}.{name}"
        if name not in table:
            raise AttributeError(GONE.get(full_name, f"module {self.__name__!r} has no attribute {name!r}"))
        if not any(known in self.__dict__ for known in table):
            warnings.warn(_advice(self.__name__, name), DeprecationWarning, stacklevel=2)
        module, _, attribute = table[name].partition(":")
        value = operator.attrgetter(attribute)(importlib.import_module(module))
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OLD_PATHS.get(self.__name__, {})})


def _advice(old: str, name: str) -> str:
    module, _, attribute = OLD_PATHS[old][name].partition(":")
    others = sorted({place.partition(":")[0] for place in OLD_PATHS[old].values()} - {module})
    rest = f"; its other names are in {', '.join(others)}" if others else ""
    return f"{old} is an import path of CarperAI's trlx: {name} is now {module}.{attribute}{rest}"
