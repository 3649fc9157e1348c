"""Sampling through tensor ranks and pipeline stages gives what one process gives, token by token."""

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper

from tests.builders import char_tokenizer, responses
from tests.processes import together
from tests.runs import tiny_config
from tests.vllm_server import StandIn
from trlx.backends.base import ModelNeeds
from trlx.backends.vllm.sampler import VLLMSampler
from trlx.batch import Rollout
from trlx.data.collate import collate
from trlx.data.store import own_rows
from trlx.models.heads import QHeads, ValueHead
from trlx.models.policy import HEADS_FILE, build_policy, load_heads
from trlx.sampling.settings import SamplingConfig
from trlx.sampling.stopping import Stopper

pytestmark = pytest.mark.distributed

VOCAB, WIDTH = 61, 32
SPECIAL = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0, vocab_size=VOCAB, initializer_range=0.5)
SIZES = dict(SPECIAL, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
GROUPED = dict(SIZES, num_key_value_heads=2, max_position_embeddings=32)
CONFIGS = {
    "gpt2": hf.GPT2Config(**SPECIAL, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=32),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES, max_position_embeddings=32),
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen2": hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": hf.GemmaConfig(**GROUPED, head_dim=8),
}

TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SEQUENCE, CHUNKS = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = [
    {},
    TENSOR,
    TENSOR | SEQUENCE,
    PIPELINE,
    PIPELINE | CHUNKS,
    TENSOR | PIPELINE,
    TENSOR | PIPELINE | SEQUENCE | CHUNKS,
]
"""Of four processes: what is not needed for a copy of the model are data ranks, four, two or one."""

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [5, 16], [17, 9, 30, 31]]


def made(name, folder):
    """A random model, which is also in `folder`."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.dim() == 1):
            weight.add_(0.3 * torch.randn_like(weight))  # norms and biases matter, too
    model.save_pretrained(folder)
    return model


def alone(model, prompts, **settings):
    """What transformers samples greedily from each prompt by itself, without any padding."""
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    config, rows = hf.GenerationConfig(**settings), []
    for prompt in map(torch.tensor, ([ids] for ids in prompts)):
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        rows.append(found[0, prompt.shape[1] :].tolist())
    return rows


def backend_of(folder, layout, needs=None):
    from trlx.backends.megatron.backend import MegatronBackend

    train = {"trainer_kwargs": layout, "minibatch_size": 2}
    config = tiny_config(folder, "SFT", model={"model_path": str(folder)}, train=train)
    sections = {name: getattr(config, name) for name in ("model", "optimizer", "scheduler", "train")}
    return MegatronBackend(**sections, tokenizer=char_tokenizer(), needs=needs or ModelNeeds())


def check(folder, cases, layouts=LAYOUTS, needs=None):
    """In every layout each data rank samples what is expected of its share of the prompts."""
    for layout in layouts:
        backend = backend_of(folder, layout, needs)
        for prompts, sampling, expected in cases:
            rows = own_rows(len(prompts), backend.data_rank, backend.data_size)
            found = responses(backend.sampler(), prompts[rows], sampling)
            assert found == expected[rows], (layout, sampling, found, expected[rows])


def greedy(**settings):
    return SamplingConfig(**{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **settings})


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, name):
    model = made(name, tmp_path)
    free = alone(model, PROMPTS, eos_token_id=None)
    assert len({tuple(row) for row in free}) == len(free) and len({token for row in free for token in row}) > 5
    eos = [free[0][2], free[1][5], free[2][0]]  # rows of one batch end at different steps
    ended = alone(model, PROMPTS, eos_token_id=eos)
    lengths = [len(row) for row in ended]
    assert ended[2] == free[2][:1] and min(lengths) < max(lengths)
    # over four data ranks 5 prompts leave one of them none, and a single prompt leaves one of two stages without a row
    cases = [
        (PROMPTS, greedy(eos_token_id=eos), ended),
        (PROMPTS[:1], greedy(), free[:1]),
    ]
    layouts = LAYOUTS if name in ("gpt2", "llama") else [LAYOUTS[-1]]
    together(4, check, tmp_path, cases, layouts)


def test_penalties_and_the_least_length_are_those_of_transformers(tmp_path):
    model = made("llama", tmp_path)
    free = alone(model, PROMPTS, eos_token_id=None)
    eos = [row[1] for row in free]
    cases = []
    for settings in (
        {"min_new_tokens": 4},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 3, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    ):
        expected = alone(model, PROMPTS, eos_token_id=eos, **settings)
        assert expected != alone(model, PROMPTS, eos_token_id=eos)
        least = settings.get("min_new_tokens", 0)
        extra = {key: value for key, value in settings.items() if key != "min_new_tokens"}
        cases.append((PROMPTS, greedy(eos_token_id=eos, min_new_tokens=least, extra=extra), expected))
    together(4, check, tmp_path, cases, [{}, TENSOR | PIPELINE])


def check_drawn(folder, prompts, cases):
    """In every layout, and on every process, the same seed draws the same tokens, and says what the policy says."""
    first = None
    for layout in LAYOUTS:
        backend = backend_of(folder, layout, ModelNeeds(value_head=True, temperature=cases[0][0].temperature))
        read = []
        backend.stage[0].decoder.register_forward_hook(lambda *call, read=read: read.append(call[-1].shape[1]))
        drawn, sampler = [], backend.sampler()
        for sampling, seed in cases:
            torch.manual_seed(seed)
            drawn.append(sampler.generate(prompts, sampling))
        if backend.parallel.sizes.pipeline == 1:
            # two of six prompts are equal, and rows that have ended leave
            steps = max(len(sample.ids) for sample in drawn[0])
            assert read[0] == 5 and read[steps - 1] < 4 and read[-6:] == [5, 6, 6, 6, 6, 6]
        check_said(backend, prompts, drawn[0])
        assert drawn[-1][0].logprobs is drawn[-1][0].values is None  # top_p is no part of the policy
        ids = [[sample.ids for sample in samples] for samples in drawn]
        first = first or ids
        assert ids == first, layout
    assert len({str(rows) for rows in first}) == len(first)


def check_said(backend, prompts, samples):
    """Log-probabilities and values of samples are those of a pass over them."""
    assert backend.sampler().exact
    batch = collate([Rollout(prompt, sample.ids) for prompt, sample in zip(prompts, samples, strict=True)], 0)
    outputs = backend.evaluate(batch)
    assert outputs.values.abs().max() > 0.01
    for row, sample in enumerate(samples):
        at = batch.response_mask[row]
        torch.testing.assert_close(torch.tensor(sample.logprobs), outputs.logprobs[row][at], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(sample.values), outputs.values[row][at], atol=1e-5, rtol=0)


def test_a_seed_draws_the_same_tokens_in_every_layout(tmp_path):
    made("qwen2", tmp_path)
    head = ValueHead(WIDTH).state_dict()
    save_file({f"value.{name}": 0.1 * torch.randn_like(tensor) for name, tensor in head.items()}, tmp_path / HEADS_FILE)
    plain = SamplingConfig(max_new_tokens=6, temperature=5.0, eos_token_id=list(range(4, 24)))
    others = [
        SamplingConfig(max_new_tokens=6, temperature=2.5, top_k=20),
        SamplingConfig(max_new_tokens=6, temperature=4.0, top_p=0.6),
    ]
    cases = [(plain, 1), (plain, 2), *((sampling, 1) for sampling in others)]
    together(4, check_drawn, tmp_path, [*PROMPTS, PROMPTS[1]], cases)


ROWS = 4000
DRAWN = [
    SamplingConfig(max_new_tokens=1, temperature=4.0),
    SamplingConfig(max_new_tokens=1, temperature=8.0, top_k=7),
    SamplingConfig(max_new_tokens=1, temperature=6.0, top_k=30, top_p=0.5),
]


def check_frequencies(folder, expected):
    """Pearson's statistic of first tokens is within 4 standard deviations of its mean, the degrees of freedom."""
    backend = backend_of(folder, TENSOR | PIPELINE)
    torch.manual_seed(5)
    for sampling, probabilities in zip(DRAWN, expected, strict=True):
        tokens = [row[0] for row in responses(backend.sampler(), [PROMPTS[0]] * ROWS, sampling)]
        counts, means = torch.bincount(torch.tensor(tokens), minlength=VOCAB), ROWS * probabilities
        assert counts[means == 0].sum() == 0
        common = means >= 5
        counts, means = (torch.cat([each[common], each[~common].sum()[None]]).double() for each in (counts, means))
        counts, means = counts[means > 0], means[means > 0]
        freedom = len(means) - 1
        assert freedom >= 5
        assert float(((counts - means) ** 2 / means).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_first_tokens_are_as_frequent_as_transformers_makes_them_likely(tmp_path):
    model = made("gpt2", tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[:, -1]
    expected = []
    for sampling in DRAWN:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        expected.append(warpers(None, logits).double().softmax(dim=-1)[0])
    together(4, check_frequencies, tmp_path, expected)


def check_steps(folder, prompts, sampling, expected, steps):
    """Every stage works until the last of its rows is done, and not longer."""
    for layout in (TENSOR, PIPELINE | CHUNKS):
        backend = backend_of(folder, layout)
        with pytest.raises(ValueError, match="Prompt 0 has the token 99, but the model knows"):
            backend.check_prompts([[99]], sampling.max_new_tokens)
        passes = []
        backend.stage[0].decoder.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        sampler = backend.sampler()
        sampler.sync(3, backend.weights_by_name)
        samples = sampler.generate(prompts, sampling)
        assert [sample.ids for sample in samples] == expected and {sample.version for sample in samples} == {3}
        assert len(passes) == steps[backend.parallel.sizes.pipeline - 1], layout


def test_a_stop_sequence_stops_sampling(tmp_path):
    model, tokenizer = made("llama", tmp_path), char_tokenizer()
    prompts = PROMPTS[:4]
    free = alone(model, prompts, eos_token_id=None, max_new_tokens=12)
    # two tokens in a row of the first response end it, and one token each of the others theirs
    ends = [free[0][3:5], free[1][1:2], free[2][3:4], free[3][5:6]]
    stopper = Stopper(tokenizer, [text for text in map(tokenizer.decode, ends) if text])
    expected = [row[: next(i for i in range(1, 13) if stopper.done(row[:i]))] for row in free]
    lengths = [len(row) for row in expected]
    assert max(lengths) < 12 and len(set(lengths)) > 1
    # alone on a stage all rows go together; with two stages the first two rows are a group, and the others one
    steps = [max(lengths), max(lengths[:2]) + max(lengths[2:])]
    sampling = greedy(max_new_tokens=12, stop=stopper)
    together(2, check_steps, tmp_path, prompts, sampling, expected, steps)


def test_sampling_with_beta_and_a_mask_is_that_of_the_accelerate_backend(tmp_path):
    made("gpt2", tmp_path)
    needs = ModelNeeds(value_head=True, q_heads=2)
    heads = {"value": ValueHead(WIDTH), "q": QHeads(WIDTH, VOCAB, 2)}
    tensors = {f"{name}.{key}": tensor for name, head in heads.items() for key, tensor in head.state_dict().items()}
    save_file({name: 0.3 * torch.randn_like(tensor) for name, tensor in tensors.items()}, tmp_path / HEADS_FILE)
    policy = build_policy(AutoModelForCausalLM.from_pretrained(tmp_path), value_head=True, q_heads=2).eval()
    load_heads(policy, tmp_path)
    mask = torch.rand(VOCAB, VOCAB) < 0.5
    extras = [{"beta": 0}, {"beta": 1.0}, {"beta": 100.0}, {"logit_mask": mask}, {"beta": 1.0, "logit_mask": mask}]
    cases = []
    for extra in extras:
        sampling = greedy(eos_token_id=[4, 5, 6], extra=extra)
        cases.append((PROMPTS, sampling, responses(policy, PROMPTS, sampling)))
    assert len({str(expected) for *_, expected in cases}) == len(cases)
    for prompt, row in zip(PROMPTS, cases[-1][2], strict=True):
        assert not any(mask[before, after] for before, after in zip([prompt[-1], *row], row, strict=False))
    together(4, check, tmp_path, cases, [{}, TENSOR | PIPELINE | CHUNKS | SEQUENCE], needs)


def check_weights(folder, expected):
    """Each weight comes whole, under its Hugging Face name, and on the main process."""
    backend = backend_of(folder, TENSOR | PIPELINE)
    found = {name: weight.sum().item() for name, weight in backend.weights_by_name()}
    assert found == (pytest.approx(expected, abs=1e-5) if backend.is_main else {})


def test_a_sampler_with_a_copy_gets_the_weights_of_every_stage(tmp_path):
    model = made("llama", tmp_path)
    together(4, check_weights, tmp_path, {name: weight.sum().item() for name, weight in model.named_parameters()})


def check_served(folder, url, expected):
    backend = backend_of(folder, TENSOR | PIPELINE)
    sampler = VLLMSampler(backend, char_tokenizer(), url)
    sampler.check(greedy())
    sampler.sync(3, backend.weights_by_name)
    samples = sampler.generate(PROMPTS, greedy())
    assert [sample.ids for sample in samples] == expected and {sample.version for sample in samples} == {3}
    sampler.close()


def test_a_vllm_server_with_other_weights_answers_as_the_divided_model(tmp_path):
    model = made("llama", tmp_path)
    server = StandIn(hf.LlamaForCausalLM(model.config), char_tokenizer())
    together(4, check_served, tmp_path, server.url, alone(model, PROMPTS))
    server.close()
