"""What one optimizer step asks of the machine: how often it waits for a GPU, and how much memory it takes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from tests.builders import tiny_gpt2, tiny_gpt2_config
from tests.runs import run, share_of_a, tiny_config
from tests.waits import ON_HOST, Waits
from trlx.backends import accelerate
from trlx.backends import optimizer as optimizers
from trlx.backends.accelerate import AccelerateBackend
from trlx.batch import Rollout
from trlx.data.collate import collate
from trlx.models import compiled
from trlx.models import packing as packing_of_rows
from trlx.models.architecture import Causal
from trlx.models.heads import QHeads
from trlx.models.logprobs import chosen_logprobs
from trlx.sampling.settings import SamplingConfig
from trlx.trainer.accelerate import AcceleratePPOTrainer


@pytest.mark.parametrize(
    ("method", "packing"),
    [
        *((name, "off") for name in "PPO GRPO ILQL SFT DPO KTO Reward".split()),
        ("PPO", "on"),
        ("Reward", "on"),
        ("PPO", "kernel"),
    ],
)
def test_a_step_waits_for_a_gpu_twice_however_many_microbatches_it_has(tmp_path, monkeypatch, method, packing):
    trainer = run(method, tmp_path, train={"total_steps": 1, "minibatch_size": 2, "packing": packing != "off"})
    if packing == "kernel":
        monkeypatch.setattr(packing_of_rows, "kernel_for", lambda *_: lambda queries, *rest, **settings: queries)
    monkeypatch.setattr(AccelerateBackend, "sum_across", lambda self, count: float(count))
    own = [(AccelerateBackend, "microbatches"), (AccelerateBackend, "sum_across"), (accelerate, "packed"), *ON_HOST]
    # transformers itself asks in every pass whether positions are those of one text or of several
    waits = Waits(monkeypatch, *own, (masking_utils, "find_packed_sequence_indices"))
    batch, moves = trainer.store.rows(range(4)), []
    trainer.backend.move_state = moves.append
    with waits:
        trainer.backend.train_step(batch, trainer.loss, trainer.unit, trainer.rows_together)
    # the norm of the gradients, which says whether there is a step, and all metrics
    assert waits.found == {"_local_scalar_dense": 1, "tolist": 1}
    trainer.backend.evaluate(batch)
    with trainer.backend.for_sampling():
        assert moves == [trainer.backend.device, "cpu", "cpu"]  # where the optimizer's state goes


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors that operations inside the block made and that still exist."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        made = fn(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self.known:
            self.known[place] = weakref.finalize(storage, self._gone, place, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, place, size):
        del self.known[place]
        self.now -= size


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_numbers_for_every_token_of_the_vocabulary_are_kept_once_for_each_head(heads):
    torch.manual_seed(0)
    rows, hidden, vocabulary = 64, 4, 4000
    states, actions = torch.randn(rows, hidden, requires_grad=True), torch.randint(vocabulary, (rows,))
    kept = max(heads, 1)  # the output head alone, or Q heads alone
    module = QHeads(hidden, vocabulary, heads) if heads else torch.nn.Linear(hidden, vocabulary)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    with Live() as live:
        if heads:
            q, _, logprobs = module(states, actions)
            loss = (q.square() - logprobs).sum()
        else:
            loss = chosen_logprobs(states, actions, module).sum()
        between, forward = live.now, live.peak
        live.peak = live.now
        gradients = torch.autograd.grad(loss, weights)
    table = rows * vocabulary * 4
    ours = sum(gradient.numel() * 4 for gradient in gradients)
    # the backward pass writes into what the forward pass kept; with torch's own functions its peak is 3, 4 and 6
    assert max(between, forward, live.peak - ours) < (kept + 0.1) * table


def test_selective_recomputation_keeps_what_is_costly_and_changes_no_gradient():
    tokens, kept, found = torch.arange(64).reshape(4, 16) % 20, {}, {}
    for setting in ("all", "selective", "none"):
        model = tiny_gpt2(hidden=64).train()
        if setting != "all":
            Causal(model).recompute(selective=setting == "selective")
        with Live() as live:
            states = model.transformer(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]
            kept[setting] = live.now
        states.square().sum().backward()
        found[setting] = [weight.grad for weight in model.parameters()]
    assert kept["none"] < 0.5 * kept["selective"] and kept["selective"] < 0.5 * kept["all"]
    for other in ("selective", "none"):
        torch.testing.assert_close(found[other], found["all"], rtol=0, atol=1e-6)


def test_running_averages_leave_the_device_and_come_back_unchanged(monkeypatch):
    away = []

    def copied(tensor, device):
        if device.type == "cpu":
            return away.pop(0)
        away.append(tensor.clone())
        return tensor.to(device)  # the numbers are gone: the meta device has none

    monkeypatch.setattr(optimizers, "_copied", copied)
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    both = [torch.optim.AdamW([weight], lr=0.1, fused=True) for weight in weights]
    for _ in range(3):
        for weight, optimizer in zip(weights, both, strict=True):
            weight.grad = weight.detach() ** 2
            optimizer.step()
        optimizers.move_state(both[0], "meta")
        assert {value.device.type for value in both[0].state[weights[0]].values()} == {"meta"}
        optimizers.move_state(both[0], "cpu")
    assert torch.equal(*weights)


def test_compiled_blocks_give_the_same_gradients_with_one_graph_for_all_widths_and_do_not_sample(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("WARNING", "torch.__trace")  # its lines take a second
    graphs, runs, after, moved = [], [], [], {}

    def compiler(graph, inputs):
        graphs.append(graph)
        return lambda *given: runs.append(graph) or graph.forward(*given)

    monkeypatch.setattr(compiled, "COMPILER", compiler)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    settings = {
        "model": {"model_path": tiny_gpt2_config(), "num_layers_unfrozen": 1},
        "optimizer": {"name": "sgd", "kwargs": {"lr": 1.0}},
        "method": {"num_value_layers_unfrozen": 1},
    }
    for setting in (False, True):
        train = {"compile": setting, "max_grad_norm": None}
        config = tiny_config(tmp_path, "PPO", train=train, **settings)
        backend = AcceleratePPOTrainer(config, reward_fn=share_of_a).backend
        assert backend.packs != setting
        before = {name: weight.clone() for name, weight in backend.policy.named_parameters()}
        for width in (3, 5):
            batch = collate([Rollout(list(range(width)), [7, 8]), Rollout([9] * width, [7])], 0)
            backend.train_step(batch, lambda outputs, _: ((outputs.logprobs + outputs.values).sum(), {}))
            after.append(len(graphs))
        moved[setting] = {name: weight - before[name] for name, weight in backend.policy.named_parameters()}
        backend.sampler().generate([[5, 6], [7]], SamplingConfig(max_new_tokens=3))
    # the frozen block without gradients, and the trained one with its copy in the value function
    assert after == [0, 0, 2, 2] and len(graphs) == 2
    # in two steps: the first reads each of two rows alone, the second both, in the policy and in the value function
    assert [runs.count(graph) for graph in graphs] == [4, 4]
    assert torch._dynamo.config.recompile_limit == compiled.MOST_GRAPHS
    assert moved[True].keys() == moved[False].keys()
    trained = ["model.transformer.h.1.ln_1.bias", "heads.value.blocks.0.ln_1.bias"]
    assert all(moved[False][name].abs().max() > 1e-3 for name in trained)
    for name, expected in moved[False].items():
        torch.testing.assert_close(moved[True][name], expected, rtol=0, atol=1e-6)
