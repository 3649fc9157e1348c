"""Every key of a NeMo config file: honoured, refused, or without effect.

docs/megatron-config.md has these tables in Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trlx.backends.megatron.nemo.file import WHERE
from trlx.strict import ConfigError, suggestion

HONOURED: dict[str, str] = {
    "trainer.devices": "processes per node; with `num_nodes` compared with the number of processes that were started",
    "trainer.num_nodes": "nodes",
    "trainer.precision": "32, 32-true; bf16, bf16-mixed; 16, 16-mixed; `train.mixed_precision` wins",
    "trainer.gradient_clip_val": "largest norm of the gradients, 0 is off; `train.max_grad_norm` wins unless it is 1.0",
    "model.precision": "used if `trainer.precision` is not written",
    "model.micro_batch_size": "rows per microbatch, at most `train.batch_size`; `train.minibatch_size` wins",
    "model.tensor_model_parallel_size": "processes that share every layer",
    "model.pipeline_model_parallel_size": "stages, each with a part of the layers",
    "model.virtual_pipeline_model_parallel_size": "chunks of layers per stage (interleaved schedule)",
    "model.sequence_parallel": "norms and dropout are divided too; off, with a warning, if the tensor size is 1",
    "model.activations_checkpoint_granularity": "selective (attention only) or full; null is off",
    "model.activations_checkpoint_method": "uniform or block, with full; selective needs none",
    "model.activations_checkpoint_num_layers": "layers recomputed at a time (uniform), or recomputed in all (block)",
    "model.num_layers": "blocks",
    "model.hidden_size": "width",
    "model.ffn_hidden_size": "width of the feed-forward block; null is 4 x `hidden_size`",
    "model.num_attention_heads": "heads",
    "model.num_query_groups": "key-value heads; null is as many as heads",
    "model.kv_channels": "width of a head; null is `hidden_size` / heads",
    "model.max_position_embeddings": "longest sequence",
    "model.normalization": "layernorm, layernorm1p or rmsnorm",
    "model.layernorm_epsilon": "epsilon of every norm",
    "model.activation": "gelu, relu, geglu, reglu, swiglu, and the same with fast-",
    "model.openai_gelu": "the tanh form of gelu",
    "model.bias_activation_fusion": "gelu with bias in its tanh form, as NeMo's fused kernel computes it (its default)",
    "model.bias": "whether projections add a bias",
    "model.position_embedding_type": "learned_absolute or rope",
    "model.rotary_percentage": "fraction of each head that is rotated",
    "model.rotary_base": "base of the rotary frequencies",
    "model.share_embeddings_and_output_weights": "one weight for token embedding and output head",
    "model.make_vocab_size_divisible_by": "the vocabulary is padded to a multiple of this x the tensor size",
    "model.init_method_std": "standard deviation of random weights",
    "model.hidden_dropout": "dropout after each block's two halves; PPO switches every dropout off",
    "model.attention_dropout": "dropout of attention probabilities",
    "model.optim.name": "adam, adamw, fused_adam, distributed_fused_adam or sgd; the `optimizer` section wins",
    "model.optim.lr": "highest learning rate",
    "model.optim.betas": "of Adam",
    "model.optim.eps": "of Adam",
    "model.optim.weight_decay": "on all weights",
    "model.optim.momentum": "of SGD",
    "model.optim.sched.name": "CosineAnnealing, WarmupAnnealing, WarmupPolicy; the `scheduler` section wins",
    "model.optim.sched.warmup_steps": "steps of linear warm-up",
    "model.optim.sched.constant_steps": "steps at `min_lr` before `max_steps`",
    "model.optim.sched.min_lr": "last rate of the decay",
    "model.optim.sched.max_steps": "step at which the decay ends; null is `train.total_steps`",
}
"""Key -> what it does."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "restore_from_path": ((), "write train.trainer_kwargs.pretrained_model"),
    "trainer.accumulate_grad_batches": ((1,), "write train.minibatch_size: its gradients are accumulated"),
    "model.resume_from_checkpoint": ((), "write train.resume_from_checkpoint"),
    "model.num_micro_batches_with_partial_activation_checkpoints": ((), "set activations_checkpoint_num_layers"),
    "model.activations_checkpoint_layers_per_pipeline": ((), "every stage recomputes alike; leave it out"),
    "model.ffn_dropout": ((0,), "write hidden_dropout or attention_dropout"),
    "model.use_scaled_init_method": ((True,), "output and down projections always start smaller by sqrt(2 x layers)"),
    "model.headscale": ((False,), "heads are not scaled"),
    "model.transformer_block_type": (("pre_ln",), "norms always come before attention and feed-forward"),
    "model.normalize_attention_scores": ((True,), "scores are always divided by the square root of kv_channels"),
    "model.attention_type": (("multihead",), "write num_query_groups to share keys and values"),
    "model.fp32_residual_connection": ((False,), "the residual stream always has the type of the weights"),
    "model.fp16_lm_cross_entropy": ((False,), "log-probabilities are always computed in float32"),
    "model.pre_process": ((True,), "the first stage always has the embedding"),
    "model.post_process": ((True,), "the last stage always has the output layer"),
    "model.native_amp_init_scale": ((2**32,), "float16 starts with a loss scale of 2^32"),
    "model.native_amp_growth_interval": ((1000,), "the loss scale doubles after 1000 finite steps"),
    "model.hysteresis": ((2,), "the loss scale halves after 2 overflows"),
    "model.fp8": ((False,), "write trainer.precision: bf16"),
    "model.fp8_e4m3": ((False,), "write trainer.precision: bf16"),
    "model.fp8_hybrid": ((False,), "write trainer.precision: bf16"),
    "model.nsys_profile.enabled": ((False,), "run the script under nsys"),
}
"""Key -> (the accepted values besides null, what to do instead of using another value)."""

NO_EFFECT: dict[str, str] = {
    "name": "`train.run_name`",
    "trainer.accelerator": "a GPU if there is one",
    "trainer.logger": "`train.tracker`",
    "trainer.enable_checkpointing": "`train.checkpoint_interval`",
    "trainer.replace_sampler_ddp": "rows are always divided over data ranks",
    "trainer.max_epochs": "`train.epochs`",
    "trainer.max_steps": "`train.total_steps`",
    "trainer.log_every_n_steps": "every step is logged",
    "trainer.val_check_interval": "`train.eval_interval`",
    "trainer.limit_val_batches": "the evaluation prompts given to `trlx.train`",
    "trainer.limit_test_batches": "there is no test phase",
    "trainer.benchmark": "speed only",
    "exp_manager.explicit_log_dir": "`train.checkpoint_dir` and `train.logging_dir`",
    "exp_manager.exp_dir": "`train.checkpoint_dir`",
    "exp_manager.name": "`train.run_name`",
    "exp_manager.create_tensorboard_logger": "`train.tracker: tensorboard`",
    "exp_manager.create_wandb_logger": "`train.tracker: wandb`",
    "exp_manager.wandb_logger_kwargs": "`train.project_name`, `run_name`, `entity_name`, `group_name`, `tags`",
    "exp_manager.resume_if_exists": "`train.resume_from_checkpoint: auto`",
    "exp_manager.resume_ignore_no_checkpoint": "`auto` starts a new run if there is no checkpoint",
    "exp_manager.create_checkpoint_callback": "`train.checkpoint_interval`",
    "exp_manager.checkpoint_callback_params.monitor": "the best checkpoint is that of the highest reward",
    "exp_manager.checkpoint_callback_params.save_top_k": "`train.save_best`",
    "exp_manager.checkpoint_callback_params.mode": "the highest reward is the best",
    "exp_manager.checkpoint_callback_params.always_save_nemo": "checkpoints hold `hf_model/`",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": "checkpoints hold `hf_model/`",
    "exp_manager.checkpoint_callback_params.filename": "`checkpoint_<step>`",
    "exp_manager.checkpoint_callback_params.model_parallel_size": "known from the parallel sizes",
    "exp_manager.log_step_timing": "`time/*` is logged always",
    "exp_manager.step_timing_kwargs.sync_cuda": "as above",
    "exp_manager.step_timing_kwargs.buffer_size": "as above",
    "model.global_batch_size": "`train.batch_size` x data ranks",
    "model.encoder_seq_length": "`train.seq_length`",
    "model.seq_length": "`train.seq_length`",
    "model.seed": "`train.seed`",
    "model.padded_vocab_size": "computed from the vocabulary and `make_vocab_size_divisible_by`",
    "model.apply_query_key_layer_scaling": "softmax is computed in float32",
    "model.do_layer_norm_weight_decay": "weight decay applies to all weights, as with the Accelerate trainers",
    "model.megatron_legacy": "the archive's model_config.yaml",
    "model.tokenizer.library": "the `tokenizer` section",
    "model.tokenizer.type": "the `tokenizer` section",
    "model.tokenizer.model": "the `tokenizer` section",
    "model.tokenizer.vocab_file": "the `tokenizer` section",
    "model.tokenizer.merge_file": "the `tokenizer` section",
    "model.tokenizer.delimiter": "the `tokenizer` section",
    "model.tokenizer.sentencepiece_legacy": "the `tokenizer` section",
    "model.tokenizer.tokenizer_model": "the `tokenizer` section",
    "model.vocab_file": "the `tokenizer` section",
    "model.merges_file": "the `tokenizer` section",
    "model.megatron_amp_O2": "half precision always has float32 main weights",
    "model.sync_batch_comm": "speed only",
    "model.persist_layer_norm": "speed only",
    "model.bias_dropout_add_fusion": "speed only",
    "model.masked_softmax_fusion": "speed only",
    "model.grad_div_ar_fusion": "speed only",
    "model.gradient_accumulation_fusion": "speed only",
    "model.gradient_as_bucket_view": "memory only",
    "model.grad_allreduce_chunk_size_mb": "speed only",
    "model.use_emha": "speed only",
    "model.transformer_engine": "speed only",
    "model.reduce_amax": "there is no fp8",
    "model.fp8_margin": "there is no fp8",
    "model.fp8_interval": "there is no fp8",
    "model.fp8_amax_history_len": "there is no fp8",
    "model.fp8_amax_compute_algo": "there is no fp8",
    "model.use_cpu_initialization": "random weights do not depend on the device",
    "model.onnx_safe": "there is no export to ONNX",
    "model.apex_transformer_log_level": "`trlx.logging.set_verbosity`",
    "model.target": "`train.trainer`",
    "model.nemo_version": "for the record",
    "model.data.data_prefix": "the data given to `trlx.train`",
    "model.data.index_mapping_dir": "the data given to `trlx.train`",
    "model.data.data_impl": "the data given to `trlx.train`",
    "model.data.splits_string": "the data given to `trlx.train`",
    "model.data.seq_length": "`train.seq_length`",
    "model.data.skip_warmup": "the data given to `trlx.train`",
    "model.data.num_workers": "rows are collated in the process that trains",
    "model.data.dataloader_type": "shuffled, each row once per epoch",
    "model.data.reset_position_ids": "every row is one sequence",
    "model.data.reset_attention_mask": "every row is one sequence",
    "model.data.eod_mask_loss": "the loss is on the tokens of responses, their eos included",
    "model.data.add_bos": "the tokenizer decides",
    "model.data.add_eos": "an eos ends every sample that is trained on",
    "model.nsys_profile.start_step": "there is no profiler",
    "model.nsys_profile.end_step": "there is no profiler",
    "model.nsys_profile.ranks": "there is no profiler",
    "model.nsys_profile.gen_shape": "there is no profiler",
}
"""Key -> what decides instead."""

KEYS = (*HONOURED, *REFUSED, *NO_EFFECT)


def check_keys(config: Mapping[str, Any]) -> None:
    """Checks that every key of a NeMo config is known and has a supported value.

    Raises:
        ConfigError: a key is unknown or its value is refused; the message names the nearest known key.
    """
    _check_below("", config)


def _check_below(prefix: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in REFUSED:
            _check_accepted(path, value)
        elif path not in HONOURED and path not in NO_EFFECT:
            _check_section(path, value)


def _check_accepted(path: str, value: Any) -> None:
    accepted, advice = REFUSED[path]
    if value is not None and value not in accepted:
        raise ConfigError(f"{WHERE}.{path} is {value!r}, which trlx does not support: {advice}")


def _check_section(path: str, value: Any) -> None:
    if not any(key.startswith(f"{path}.") for key in KEYS):
        near = suggestion(path, _at_depth(path.count("."))) or suggestion(path, _at_depth(path.count(".") + 1))
        raise ConfigError(f"Unknown key '{WHERE}.{path}'.{near} docs/megatron-config.md lists them all")
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{WHERE}.{path} must be a mapping of settings, got {value!r}")
    _check_below(f"{path}.", value or {})


def _at_depth(depth: int) -> list[str]:
    """The keys and sections at this depth."""
    cut = (".".join(key.split(".")[: depth + 1]) for key in KEYS if key.count(".") >= depth)
    return list(dict.fromkeys(cut))
