"""The public names of CarperAI's trlx, by module: of its last version, and those of older ones that scripts use."""

ORIGINAL = {
    "trlx.data": "BatchElement GeneralElement RLElement SimElement".split(),
    "trlx.data.accelerate_base_datatypes": """
        AccelerateRLBatchElement AccelerateRLElement PromptBatch PromptElement
    """.split(),
    "trlx.data.configs": """
        ModelConfig OptimizerConfig SchedulerConfig TRLConfig TokenizerConfig TrainConfig merge
    """.split(),
    "trlx.data.default_configs": """
        ILQLConfig ModelConfig OptimizerConfig PPOConfig SFTConfig SchedulerConfig TRLConfig TokenizerConfig
        TrainConfig default_ilql_config default_nemo_1_3b_config default_nemo_20b_config default_nemo_2b_config
        default_ppo_config default_sft_config
    """.split(),
    "trlx.data.ilql_types": """
        ILQLBatch ILQLElement ILQLSeq2SeqBatch ILQLSeq2SeqElement flatten_dataclass unflatten_dataclass
    """.split(),
    "trlx.data.method_configs": "MethodConfig get_method register_method".split(),
    "trlx.data.ppo_types": "PPORLBatch PPORLElement".split(),
    "trlx.model": "BaseRLModel register_model".split(),
    "trlx.models.modeling_base": "PreTrainedModelWrapper".split(),
    "trlx.models.modeling_ilql": """
        AutoModelForCausalLMWithILQLHeads AutoModelForSeq2SeqLMWithILQLHeads CausalILQLOutput ILQLBatch
        ILQLConfig ILQLHeads Seq2SeqILQLOutput batched_index_select topk_mask
    """.split(),
    "trlx.models.modeling_nemo_ilql": """
        ILQLGPT LMHeads ParallelILQLHeads ParallelLinear make_parallel_head reshard_for_pipeline_parallelism
        unwrap_float16_module
    """.split(),
    "trlx.models.modeling_nemo_ppo": """
        OffloadedModel PPOGPT ParallelLinear RefLMHeads ValueHead make_parallel_head patch_attention_for_llama
        reshard_for_pipeline_parallelism unwrap_float16_module
    """.split(),
    "trlx.models.modeling_nemo_sft": "SFTGPT".split(),
    "trlx.models.modeling_ppo": """
        AdaptiveKLController AutoModelForCausalLMWithHydraValueHead AutoModelForCausalLMWithValueHead
        AutoModelForSeq2SeqLMWithHydraValueHead AutoModelForSeq2SeqLMWithValueHead BloomModelBranch
        CausalLMOutputWithValue FixedKLController GPTBigCodeModelBranch GPTModelBranch LlamaModelBranch
        ModelBranch OPTModelBranch PPOConfig Seq2SeqLMOutputWithValue T5Branch hf_get_branch_class
        make_value_branch
    """.split(),
    "trlx.orchestrator": "Orchestrator register_orchestrator".split(),
    "trlx.pipeline": "BasePipeline BaseRolloutStore MiniBatchIterator register_datapipeline".split(),
    "trlx.pipeline.offline_pipeline": """
        DialogMessage DialogStore ILQLRolloutStorage ILQLSeq2SeqRolloutStorage PromptPipeline ilql_collate_fn
        ilql_seq2seq_collate_fn tokenize_dialogue
    """.split(),
    "trlx.pipeline.ppo_pipeline": "PPORolloutStorage ppo_collate_fn".split(),
    "trlx.ray_tune": "get_param_space get_scheduler get_search_alg get_tune_config".split(),
    "trlx.sweep": "create_report get_param_space get_scheduler get_search_alg get_tune_config tune_function".split(),
    "trlx.trainer": "BaseRLTrainer register_trainer".split(),
    "trlx.trainer.accelerate_base_trainer": "AccelerateRLTrainer".split(),
    "trlx.trainer.accelerate_ilql_trainer": "AccelerateILQLTrainer make_experience".split(),
    "trlx.trainer.accelerate_ppo_trainer": "AcceleratePPOTrainer".split(),
    "trlx.trainer.accelerate_rft_trainer": "AccelerateRFTTrainer RFTConfig".split(),
    "trlx.trainer.accelerate_sft_trainer": "AccelerateSFTTrainer SFTConfig".split(),
    "trlx.trainer.nemo_ilql_trainer": "ILQLGPT NeMoILQLTrainer ShuffledCyclicSequence megatron_trainer".split(),
    "trlx.trainer.nemo_ppo_trainer": "NeMoPPOTrainer PPOGPT megatron_trainer rank_0_tqdm".split(),
    "trlx.trainer.nemo_sft_trainer": "NeMoSFTTrainer".split(),
    "trlx.trainer.nn": "ppo_models ilql_models".split(),
    "trlx.trlx": "train".split(),
    "trlx.utils": """
        Clock OptimizerName SchedulerName filter_non_scalars get_distributed_config get_git_tag
        get_optimizer_class get_scheduler_class infinite_dataloader is_peft_available print_rank_0 set_seed
        significant to_device tree_map
    """.split(),
    "trlx.utils.loading": "get_pipeline get_trainer get_model get_orchestrator".split(),
    "trlx.utils.logging": """
        EmptyTqdm MultiProcessAdapter add_handler disable_default_handler disable_progress_bar
        disable_propagation enable_default_handler enable_explicit_format enable_progress_bar enable_propagation
        get_log_levels_dict get_logger get_verbosity is_progress_bar_enabled log_levels remove_handler
        reset_format set_verbosity tqdm warning_advice
    """.split(),
    "trlx.utils.modeling": """
        MODIFIED_MODULES_DICT RunningMoments findattr flatten_dict freeze_bottom_causal_layers
        freeze_bottom_seq2seq_layers gather_dict generate_layer_regex get_delta_model_class
        get_delta_modified_modules get_global_statistics get_tensor_stats hf_get_decoder hf_get_decoder_blocks
        hf_get_decoder_final_norm hf_get_hidden_size hf_get_lm_head hf_get_num_hidden_layers logprobs_of_labels
        make_head parse_delta_kwargs regex_for_range rgetattr rhasattr whiten
    """.split(),
}
