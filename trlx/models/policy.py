"""The policy that is trained: a language model and the heads beside it, scored token by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trlx import logging
from trlx.batch import TokenOutputs
from trlx.data.hub import first_line, no_bars
from trlx.models.architecture import Causal, EncoderDecoder
from trlx.models.decoder import disable_dropout, freeze, hidden_size, output_head
from trlx.models.heads import QHeads, ValueBranch, ValueHead
from trlx.models.logprobs import chosen_logprobs, logits_of, spread
from trlx.models.quantization import quantized

logger = logging.get_logger(__name__)

HEADS_FILE = "trlx_heads.safetensors"
"""Where an exported folder keeps the heads, which plain ``transformers`` does not know."""


class Policy(nn.Module):
    """A language model with its heads. ``forward`` is all that training needs, so any data-parallel wrapper fits.

    Raises:
        ValueError: logits cannot be computed from the model's hidden states (see ``logits_of``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        value_head: ValueHead | ValueBranch | None = None,
        q_heads: QHeads | None = None,
        temperature: float = 1.0,
        architecture: Causal | EncoderDecoder | None = None,
    ):
        super().__init__()
        self.model = model
        self.architecture = architecture or Causal(model)
        named = {"value": value_head, "q": q_heads}
        present = {name: head for name, head in named.items() if head is not None}
        self.heads = nn.ModuleDict(present) if present else None
        self.temperature = temperature
        self.logits = logits_of(model, self.architecture)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        encoder_tokens: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        values: bool = True,
    ) -> TokenOutputs:
        """Scores the tokens where `response_mask` is True; every other entry is 0. All [B, T], rows right-padded.

        The token at t is scored from the hidden state at t - 1, so ``response_mask[:, 0]`` must be False. With
        `values` False the heads are skipped. The encoder's columns [B, S] are for models with an encoder;
        `attention_mask` needs not be passed on (see `Causal.states`).
        """
        assert not response_mask[:, 0].any(), "the first token of a row has no state before it"
        value_head, q_heads = (self.value_head, self.q_heads) if values else (None, None)
        with nullcontext() if value_head is None else value_head.watching():
            hidden = self.architecture.states(tokens, encoder_tokens, encoder_mask)
        at = response_mask.flatten().nonzero().squeeze(1)
        chosen = tokens.flatten().index_select(0, at)
        before = _rows(hidden, at - 1)
        logprobs = chosen_logprobs(before, chosen, self.logits, self.temperature)
        scores = TokenOutputs(spread(logprobs, at, tokens.shape))
        if value_head is not None:
            scores.values = spread(value_head(_rows(value_head.states(hidden), at - 1)), at, tokens.shape)
        if q_heads is not None:
            q = [spread(each, at, tokens.shape) for each in q_heads(before, chosen)]
            scores.q, scores.target_q, scores.q_logprobs = q
        return scores

    def save_model(self, folder: Path | str, merge: bool = False) -> None:
        """Writes the language model so that plain ``transformers`` loads it; `merge` is for adapters."""
        self.model.save_pretrained(folder)

    @property
    def value_head(self) -> ValueHead | ValueBranch | None:
        """The head that gives values, if there is one."""
        return self._head("value")

    @property
    def q_heads(self) -> QHeads | None:
        """The heads that give Q, if there are any."""
        return self._head("q")

    def _head(self, name: str) -> nn.Module | None:
        return self.heads[name] if self.heads is not None and name in self.heads else None


def build_policy(
    model: PreTrainedModel,
    *,
    num_layers_unfrozen: int = -1,
    value_head: bool = False,
    value_layers: int = 0,
    q_heads: int = 0,
    dropout: bool = True,
    temperature: float = 1.0,
    architecture: type[Causal] | type[EncoderDecoder] = Causal,
) -> Policy:
    """Freezes `model`, gives it the heads asked for (see ``ModelNeeds``) and makes it a policy.

    Raises:
        ValueError: more blocks are asked for than there are, or the architecture is not supported, or the model is
            quantized and its weights are to train.
    """
    if num_layers_unfrozen and getattr(model, "is_quantized", False):
        raise ValueError("Quantized weights cannot train: set model.peft_config, or model.num_layers_unfrozen to 0")
    freeze(model, num_layers_unfrozen)
    if not dropout:
        disable_dropout(model)
    rows = architecture(model)
    value, q = make_heads(model, value_head, value_layers, q_heads)
    return Policy(model, value, q, temperature, rows)


def make_heads(
    model: PreTrainedModel, value_head: bool, value_layers: int, q_heads: int
) -> tuple[ValueHead | ValueBranch | None, QHeads | None]:
    """New heads for `model`, those that are asked for (see ``ModelNeeds``)."""
    value = None
    if value_head:
        value = ValueBranch(model, value_layers) if value_layers else ValueHead(hidden_size(model))
    return value, QHeads(hidden_size(model), output_head(model).weight.shape[0], q_heads) if q_heads else None


def load_model(
    model_path: str | Path | PretrainedConfig,
    model_extra_configs: dict[str, Any],
    architecture: type[Causal] | type[EncoderDecoder] = Causal,
) -> PreTrainedModel:
    """The pretrained model at `model_path`, or a freshly initialised one when that is a config.

    Weights are float32 unless `model_extra_configs`, which goes to ``transformers`` as it is, names a ``dtype``
    (or ``torch_dtype``). ``load_in_8bit`` or ``load_in_4bit`` quantizes them.

    Raises:
        ImportError: quantization without bitsandbytes.
        ValueError: the architecture is not that of the model.
        OSError: `model_path` is neither a folder with a model nor a name that can be reached or is cached.
    """
    options = quantized(model_extra_configs)
    options.setdefault("dtype", options.pop("torch_dtype", torch.float32))
    if isinstance(model_path, PretrainedConfig):
        return _with_trained_pad(architecture.loader.from_config(copy.deepcopy(model_path), **options), is_new=True)
    try:
        with no_bars():
            model = architecture.loader.from_pretrained(model_path, **options)
    except OSError as error:
        raise OSError(
            f"No model at {str(model_path)!r}: it is neither a folder with a config.json and weights, nor the name of "
            "a model on the Hugging Face hub that can be reached from here or is in the local cache "
            f"({first_line(error)})"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has looked for one on the hub by itself
        raise ValueError(
            f"{model_path} on the hub is an adapter: download it, and write its folder in model.model_path"
        )
    return _with_trained_pad(model, is_new=False)


def save_hf(policy: Policy, tokenizer: PreTrainedTokenizerBase | None, folder: Path | str, merge: bool = False) -> None:
    """Writes `folder` so that plain ``transformers`` loads it with identical logits; heads go beside the model.

    Of an adapted policy it is the adapter that is written, or with `merge` a model that has it folded in.
    """
    with no_bars():
        policy.save_model(folder, merge)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if policy.heads is not None:
        save_file(policy.heads.state_dict(), Path(folder) / HEADS_FILE)


def load_heads(policy: Policy, folder: Path | str) -> None:
    """Restores those heads that `save_hf` wrote which this policy has, too; leaves new ones as they are (see
    `fitting_heads`)."""
    file = Path(folder) / HEADS_FILE
    if policy.heads is None or not file.is_file():
        return
    shapes = {name: weight.shape for name, weight in policy.heads.state_dict().items()}
    policy.heads.load_state_dict(fitting_heads(load_file(file), shapes, str(file)), strict=False)


def fitting_heads(found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> dict[str, Tensor]:
    """What a method begins with of the heads that another one trained: those of a kind (value, q) that both have.

    Args:
        found: the weights that were saved; `where` is what messages call their place.
        shapes: of the method's own heads, by the same names.

    Raises:
        ValueError: both have heads of a kind, but of other sizes.
    """
    saved, own = ({name.partition(".")[0] for name in names} for names in (found, shapes))
    taken, needed = (
        {name: value for name, value in each.items() if name.partition(".")[0] in saved & own}
        for each in (found, shapes)
    )
    if {name: weight.shape for name, weight in taken.items()} != needed:
        raise ValueError(
            f"The heads in {where} have other sizes than those this method needs; move the file away to start with new "
            "ones"
        )
    if own and saved != own:
        said = {"takes": saved & own, "leaves out": saved - own, "makes new": own - saved}
        listed = ", ".join(f"{verb} {' and '.join(sorted(kinds))}" for verb, kinds in said.items() if kinds)
        logger.info(f"Of the heads in {where}, this method {listed}")
    return taken


@torch.no_grad()
def _with_trained_pad(model: PreTrainedModel, is_new: bool) -> PreTrainedModel:
    """`model` with an embedding of the pad token that trains like any other: where pad is eos, it is a token that is
    read. transformers keeps its gradient 0 (``padding_idx``); a token that only pads has none anyway."""
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table and module.padding_idx is not None:
            if is_new:  # transformers made the row zeros, and a norm multiplies gradients of zeros by a thousand
                draws = torch.Generator(table.device).manual_seed(0)
                table[module.padding_idx].normal_(std=float(table.std()), generator=draws)
            module.padding_idx = None
    return model


def _rows(states: Tensor, at: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, at)
