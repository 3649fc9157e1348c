"""Settings of other libraries (TRL, transformers' TrainingArguments, verl, OpenRLHF), and what to write instead."""

from __future__ import annotations

_NAMES = {
    "model.model_path": "model_name_or_path model_name pretrain",
    "model.model_extra_configs": "model_init_kwargs",
    "model.peft_config": "lora_r lora_rank lora_alpha lora_dropout target_modules use_peft",
    "tokenizer.tokenizer_path": "tokenizer_name tokenizer_name_or_path",
    "tokenizer.truncation_side": "truncation_mode",
    "optimizer.name": "optim",
    "optimizer.kwargs.lr": "learning_rate lr actor_learning_rate",
    "optimizer.kwargs.weight_decay": "weight_decay l2",
    "optimizer.kwargs.betas": "betas adam_beta1 adam_beta2 adam_betas",
    "optimizer.kwargs.eps": "eps adam_epsilon",
    "scheduler.name": "lr_scheduler_type lr_scheduler lr_decay_style",
    "scheduler.kwargs": "lr_scheduler_kwargs",
    "scheduler.name: linear and scheduler.kwargs: {start_factor: 0.01, total_iters: 100}": (
        "warmup_steps num_warmup_steps lr_warmup_steps warmup_ratio lr_warmup_ratio"
    ),
    "train.epochs": "num_train_epochs num_epochs max_epochs total_epochs",
    "train.total_steps": "max_steps total_training_steps num_training_steps",
    "train.batch_size": "per_device_train_batch_size train_batch_size mini_batch_size ppo_mini_batch_size",
    "train.minibatch_size (the rows computed at once, of the train.batch_size rows of a step)": (
        "gradient_accumulation_steps micro_batch_size micro_train_batch_size ppo_micro_batch_size_per_gpu"
    ),
    "train.seq_length": "max_length max_seq_length max_seq_len model_max_length max_len",
    "train.seq_length (the tokens of a prompt and its response)": "max_prompt_length prompt_max_len",
    "train.mixed_precision: bf16": "bf16",
    "train.mixed_precision: fp16": "fp16",
    "train.mixed_precision": "precision",
    "train.gradient_checkpointing": "enable_gradient_checkpointing",
    "train.compile": "torch_compile use_torch_compile",
    "train.max_grad_norm": "clip_grad grad_clip gradient_clip_val",
    "train.seed": "data_seed",
    "train.checkpoint_dir": "output_dir save_dir save_path ckpt_path default_local_dir",
    "train.checkpoint_interval": "save_steps save_freq save_interval",
    "train.eval_interval": "eval_steps test_freq evaluation_steps evaluation_interval",
    "train.keep_checkpoints": "save_total_limit max_ckpt_num",
    "train.save_best": "load_best_model_at_end",
    "train.sampler": "use_vllm vllm_mode",
    "train.tracker": "report_to log_with use_wandb use_tensorboard",
    "train.push_to_hub": "hub_model_id",
    "train.hub_private": "hub_private_repo",
    "train.run_name": "experiment_name wandb_run_name",
    "train.project_name": "wandb_project tracker_project_name",
    "train.group_name": "wandb_group",
    "train.entity_name": "wandb_entity wandb_org",
    "method.init_kl_coef (PPO) or method.kl_coef (GRPO)": "beta kl_coef kl_coeff kl_loss_coef",
    "method.target": "target_kl kl_target",
    "method.horizon": "kl_horizon",
    "method.ppo_epochs (PPO) or method.num_iterations (GRPO)": "num_ppo_epochs num_iterations ppo_epochs",
    "method.cliprange": "clip_range clip_ratio eps_clip epsilon",
    "method.cliprange_high (GRPO)": "epsilon_high clip_ratio_high",
    "method.cliprange_value": "value_clip cliprange_vf",
    "method.gamma": "discount",
    "method.lam": "lambd gae_lambda",
    "method.vf_coef": "vf_coeff value_loss_coef",
    "method.num_rollouts": "rollout_batch_size generation_batch_size",
    "method.chunk_size": "rollout_micro_batch_size local_rollout_forward_batch_size",
    "method.num_generations (GRPO) or method.n_generations_per_prompt (RFT); for PPO, repeat each prompt": (
        "num_generations n_samples_per_prompt num_return_sequences"
    ),
    "method.advantage (GRPO)": "scale_rewards adv_estimator advantage_estimator",
    "method.loss_type: gspo (GRPO)": "importance_sampling_level",
    "method.missing_eos_penalty": "mask_truncated_completions",
    "method.sft_coef (DPO)": "loss_weights rpo_alpha",
    "method.center_coef (reward models)": "center_rewards_coefficient",
    "method.gen_kwargs": "generation_kwargs generation_config sampling_params",
    "method.gen_kwargs.max_new_tokens": (
        "max_new_tokens max_tokens max_completion_length response_length max_response_length generate_max_len"
    ),
    "trlx.train(stop_sequences=[...])": "stop stop_strings stop_token",
    "trlx.train(reward_fn=...)": "reward_funcs reward_func reward_model",
    "trlx.train(reward_fn=trlx.WeightedRewards(...))": "reward_weights",
    "trlx.train(prompts=[...]) or trlx.train(samples=[...])": "train_dataset prompt_data",
    "trlx.train(eval_prompts=[...]) or trlx.train(eval_samples=[...])": "eval_dataset",
    "trlx.train(metric_fn=...)": "compute_metrics",
    "accelerate launch --config_file": "deepspeed fsdp fsdp_config",
}
_IN_A_DICT = {
    "method.gen_kwargs": "temperature top_k top_p min_p do_sample num_beams min_new_tokens repetition_penalty",
    "model.model_extra_configs": (
        "dtype torch_dtype attn_implementation trust_remote_code revision load_in_8bit load_in_4bit"
    ),
}

HERE: dict[str, str] = {name: here for here, names in _NAMES.items() for name in names.split()} | {
    name: f"{here}.{name}" for here, names in _IN_A_DICT.items() for name in names.split()
}
"""Name in another library -> what to write here."""

PRESETS: dict[str, str] = {
    **{name: f'load_preset("grpo", overrides=["method.loss_type={name}"])' for name in ("dapo", "gspo")},
    "dr_grpo": 'load_preset("grpo", overrides=["method.loss_type=dr_grpo", "method.advantage=dr_grpo"])',
    "reinforce++": 'load_preset("reinforce-pp")',
}
"""Algorithm without a preset of its name -> what to write here."""
