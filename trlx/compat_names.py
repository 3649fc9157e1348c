"""Names and modules of CarperAI's trlx that are gone, each with what to use instead. A table: nothing here runs.

`trlx.compat` makes an entry the text of the error of ``from trlx.utils import Clock``.
"""

from __future__ import annotations

_BATCHES = "a sample is a trlx.batch.Rollout, and a padded batch of them a trlx.batch.TokenBatch"
_OUTPUTS = "what a model says about the tokens of a batch is trlx.batch.TokenScores"
_CAUSAL = (
    "models are plain transformers models: load the folder of trainer.save_pretrained() with AutoModelForCausalLM; "
    "what trains, heads included, is trlx.models.policy.Policy"
)
_SEQ2SEQ = _CAUSAL.replace("CausalLM", "Seq2SeqLM")
_BRANCHES = (
    "no architecture needs code of its own: the reference is the policy with its first weights, "
    "trlx.models.reference.Reference"
)
_STORES = "trlx.data.store.RolloutStore holds the samples, and trlx.data.collate.collate pads them"
_NEMO = "the NeMo trainers run on Megatron-Core alone, see trlx.backends.megatron and docs/megatron.md"
_SWEEP = "python -m trlx.sweep is trlx.launch.sweep.run, and trlx.launch.space.read_space reads its file"
_ORCHESTRATORS = "trainers draw prompts and collect rollouts themselves: call trlx.train"
_ACROSS = "trainer.backend adds and gathers over processes, see trlx.backends.base.Backend"
_HANDLERS = "logging.getLogger('trlx') of Python's own logging is the logger of the whole library"
_TREES = "trlx.batch.TokenBatch.to moves a batch; torch.utils._pytree.tree_map maps over other trees"
_DELTAS = "OpenDelta is not supported; model.peft_config trains adapters with peft"

_NAMES: dict[str, dict[str, str]] = {
    "trlx.data": {"GeneralElement RLElement BatchElement SimElement": _BATCHES},
    "trlx.data.configs": {"merge": "trlx.config.TRLConfig.update and trlx.config.TRLConfig.evolve merge settings"},
    "trlx.models.modeling_ppo": {
        "AutoModelForCausalLMWithValueHead AutoModelForCausalLMWithHydraValueHead": _CAUSAL,
        "AutoModelForSeq2SeqLMWithValueHead AutoModelForSeq2SeqLMWithHydraValueHead": _SEQ2SEQ,
        "CausalLMOutputWithValue Seq2SeqLMOutputWithValue": _OUTPUTS,
        "make_value_branch": "method.num_value_layers_unfrozen asks for one, a trlx.models.heads.ValueBranch",
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
        "BasePipeline": "subclass trlx.data.prompts.PromptPipeline (docs/own-method.md)",
        "BaseRolloutStore": _STORES,
        "MiniBatchIterator": "train.minibatch_size splits batches; by hand it is trlx.batch.TokenBatch.split",
    },
    "trlx.pipeline.offline_pipeline": {
        "ILQLRolloutStorage ILQLSeq2SeqRolloutStorage ilql_collate_fn ilql_seq2seq_collate_fn": _STORES,
    },
    "trlx.sweep": {
        "get_param_space get_search_alg get_scheduler get_tune_config tune_function": _SWEEP,
        "create_report": "python -m trlx.sweep writes its report as files, see trlx.launch.results",
    },
    "trlx.trainer": {"BaseRLTrainer": "subclass trlx.trainer.base.Trainer (docs/own-method.md)"},
    "trlx.trainer.nemo_ppo_trainer": {"PPOGPT megatron_trainer rank_0_tqdm": _NEMO},
    "trlx.trainer.nemo_ilql_trainer": {"ILQLGPT megatron_trainer ShuffledCyclicSequence": _NEMO},
    "trlx.trainer.nemo_sft_trainer": {"SFTGPT megatron_trainer ShuffledCyclicSequence": _NEMO},
    "trlx.utils": {
        "Clock": "time.perf_counter() tells the time; runs log time/step, time/rollout_time and their parts",
        "OptimizerName get_optimizer_class": "trlx.backends.optimizer.make_optimizer makes what the config names",
        "SchedulerName get_scheduler_class": "trlx.backends.optimizer.make_scheduler makes what the config names",
        "filter_non_scalars": "trlx.tracking.Tracker takes a dict of numbers",
        "significant": "f'{x:.3g}' shows three digits",
        "get_distributed_config": "trainer.backend.accelerator.state holds what Accelerate was told",
        "get_git_tag": "trlx.tracking.default_run_name names runs",
        "infinite_dataloader": "trlx.data.prompts.PromptStream draws prompts without end",
        "is_peft_available": "trlx.optional.is_available('peft') says it",
        "print_rank_0": "trlx.logging.get_logger(__name__).info speaks on the main process alone",
        "to_device tree_map": _TREES,
    },
    "trlx.utils.loading": {"get_orchestrator get_model": _ORCHESTRATORS},
    "trlx.utils.logging": {
        "add_handler remove_handler disable_default_handler enable_default_handler": _HANDLERS,
        "disable_propagation enable_propagation": _HANDLERS,
        "get_log_levels_dict": "trlx.logging.LEVELS has the levels by name",
        "warning_advice": "it is a method of loggers, trlx.logging.RankLogger.warning_advice",
        "tqdm EmptyTqdm": "import tqdm itself; trlx.logging.is_progress_bar_enabled says whether to show bars",
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
"""By module, names and what to use instead of them."""

_MODULES: dict[str, str] = {
    "trlx.data.accelerate_base_datatypes": f"a prompt is a trlx.data.prompts.Prompt; {_BATCHES}",
    "trlx.data.ilql_types": _BATCHES,
    "trlx.data.ppo_types": _BATCHES,
    "trlx.models.modeling_base": _CAUSAL,
    "trlx.models.modeling_nemo_ilql": _NEMO,
    "trlx.models.modeling_nemo_ppo": _NEMO,
    "trlx.models.modeling_nemo_sft": _NEMO,
    "trlx.pipeline.ppo_pipeline": _STORES,
    # the original's own last version had these no longer, but older scripts and articles name them
    "trlx.model": "trainers have taken their place: trlx.trainer.accelerate has one for each method",
    "trlx.orchestrator": _ORCHESTRATORS,
    "trlx.ray_tune": _SWEEP,
    "trlx.trainer.nn": _CAUSAL,
}
"""Modules of which nothing is left, and what to use instead."""

_GONE = {
    **_MODULES,
    **{
        f"{module}.{name}": instead
        for module, rows in _NAMES.items()
        for names, instead in rows.items()
        for name in names.split()
    },
}

GONE: dict[str, str] = {name: f"{name} of CarperAI's trlx is gone: {instead}" for name, instead in _GONE.items()}
"""Old dotted name -> the sentence that says what to use instead."""
