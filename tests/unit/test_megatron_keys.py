"""Every key of a NeMo config file is honoured, refused or known to have no effect, and the documentation says which."""

import pytest

from tests.unit.megatron_configs import ROOT, nested
from trlx.backends.megatron.nemo.keys import HONOURED, KEYS, NO_EFFECT, REFUSED, check_keys
from trlx.strict import ConfigError

ORIGINAL_KEYS = """
name restore_from_path
trainer: devices num_nodes accelerator precision logger enable_checkpointing replace_sampler_ddp max_epochs max_steps
 log_every_n_steps val_check_interval limit_val_batches limit_test_batches accumulate_grad_batches gradient_clip_val
 benchmark
exp_manager: explicit_log_dir exp_dir name create_tensorboard_logger create_wandb_logger wandb_logger_kwargs
 resume_if_exists resume_ignore_no_checkpoint create_checkpoint_callback log_step_timing
exp_manager.checkpoint_callback_params: monitor save_top_k mode always_save_nemo save_nemo_on_train_end filename
 model_parallel_size
exp_manager.step_timing_kwargs: sync_cuda buffer_size
model: global_batch_size micro_batch_size tensor_model_parallel_size pipeline_model_parallel_size encoder_seq_length
 virtual_pipeline_model_parallel_size max_position_embeddings num_layers hidden_size ffn_hidden_size kv_channels
 num_attention_heads init_method_std use_scaled_init_method hidden_dropout attention_dropout ffn_dropout
 apply_query_key_layer_scaling normalization layernorm_epsilon do_layer_norm_weight_decay make_vocab_size_divisible_by
 pre_process post_process persist_layer_norm bias activation headscale transformer_block_type openai_gelu
 normalize_attention_scores position_embedding_type rotary_percentage attention_type megatron_legacy padded_vocab_size
 share_embeddings_and_output_weights native_amp_init_scale native_amp_growth_interval hysteresis seed
 fp32_residual_connection fp16_lm_cross_entropy megatron_amp_O2 grad_allreduce_chunk_size_mb grad_div_ar_fusion
 gradient_accumulation_fusion bias_activation_fusion bias_dropout_add_fusion masked_softmax_fusion precision
 resume_from_checkpoint use_cpu_initialization onnx_safe apex_transformer_log_level gradient_as_bucket_view
 sync_batch_comm activations_checkpoint_granularity activations_checkpoint_method activations_checkpoint_num_layers
 num_micro_batches_with_partial_activation_checkpoints activations_checkpoint_layers_per_pipeline sequence_parallel
 transformer_engine fp8 fp8_e4m3 fp8_hybrid fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
 reduce_amax use_emha target nemo_version vocab_file merges_file
model.tokenizer: library type model vocab_file merge_file delimiter sentencepiece_legacy tokenizer_model
model.data: data_prefix index_mapping_dir data_impl splits_string seq_length skip_warmup num_workers dataloader_type
 reset_position_ids reset_attention_mask eod_mask_loss add_bos add_eos
model.nsys_profile: enabled start_step end_step ranks gen_shape
model.optim: name lr weight_decay betas
model.optim.sched: name warmup_steps constant_steps min_lr max_steps
"""


def original_keys() -> list[str]:
    keys, prefix = [], ""
    for word in ORIGINAL_KEYS.split():
        if word.endswith(":"):
            prefix = f"{word[:-1]}."
        else:
            keys.append(prefix + word)
    return keys


def test_every_key_of_the_originals_files_stands_in_one_table():
    assert set(original_keys()) - set(KEYS) == set()
    assert len(KEYS) == len(set(KEYS))


def test_no_known_key_is_refused_when_it_is_null():
    for key in original_keys():
        check_keys(nested(key, None))


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_accepts_what_is_done_anyway_and_says_what_to_do_instead(key):
    accepted, advice = REFUSED[key]
    for value in accepted:
        check_keys(nested(key, value))
    with pytest.raises(ConfigError) as caught:
        check_keys(nested(key, "something else"))
    assert key in str(caught.value) and advice in str(caught.value)


def test_every_honoured_key_is_asked_for():
    folder = ROOT / "trlx/backends/megatron"
    text = "".join((folder / f"{name}.py").read_text() for name in ("settings", "nemo/decoder", "learning_rate"))
    assert [key for key in HONOURED if f'"{key.rpartition(".")[2]}"' not in text] == []


def tables() -> str:
    """The tables of docs/megatron-config.md."""
    refused = {
        key: f"{', '.join(f'`{_yaml(value)}`' for value in accepted) or 'null'} | {advice}"
        for key, (accepted, advice) in REFUSED.items()
    }
    parts = (
        ("Honoured", "| key | what it does |", HONOURED),
        ("Refused", "| key | accepted | instead of another value |", refused),
        ("Without effect", "| key | what decides in its place |", NO_EFFECT),
    )
    return "".join(
        f"\n## {title}\n\n{header}\n|{'---|' * (header.count('|') - 1)}\n"
        + "".join(f"| `{key}` | {text} |\n" for key, text in table.items())
        for title, header, table in parts
    )


def _yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_documentation_has_the_tables_of_the_code():
    page = (ROOT / "docs/megatron-config.md").read_text()
    mark = "<!-- Below this line everything is written from trlx/backends/megatron/nemo/keys.py. -->\n"
    assert page.partition(mark)[2] == tables()
