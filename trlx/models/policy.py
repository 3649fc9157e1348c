"""The policy that trains: a language model and its heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trlx import logging
from trlx.background import write
from trlx.batch import TokenOutputs
from trlx.data.hub import first_line, no_bars
from trlx.models.architecture import Architecture, Causal, Scored
from trlx.models.decoder import disable_dropout, freeze, hidden_size, output_head
from trlx.models.heads import QHeads, ValueBranch, ValueHead
from trlx.models.logprobs import Logits, chosen_logprobs, logits_of, spread
from trlx.models.operations import with_fast_operations
from trlx.models.packing import Packed, packed_states
from trlx.models.quantization import quantized

logger = logging.get_logger(__name__)

HEADS_FILE = "trlx_heads.safetensors"
"""The file of an exported folder that holds the heads; plain ``transformers`` ignores it."""


class Policy(nn.Module):
    """A language model with its heads. Training calls only ``forward``, so any data-parallel wrapper fits.

    Raises:
        ValueError: see `logits_of`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        value_head: ValueHead | ValueBranch | None = None,
        q_heads: QHeads | None = None,
        temperature: float = 1.0,
        architecture: Architecture | None = None,
        logits: Logits | None = None,
    ):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.architecture = architecture or Causal(model)
        heads = {name: head for name, head in (("value", value_head), ("q", q_heads)) if head is not None}
        self.heads = nn.ModuleDict(heads) if heads else None
        self.logits = logits or logits_of(model, self.architecture)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        encoder_tokens: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
        rows: Packed | None = None,
        values: bool = True,
    ) -> TokenOutputs:
        """The outputs for the tokens where `response_mask` is True; other entries are 0. All [B, T], rows right-padded.

        The outputs for token t come from the hidden state at t - 1, so ``response_mask[:, 0]`` must be False.

        Args:
            attention_mask: says where rows end, for models with a score; see also `Architecture.states`.
            encoder_tokens, encoder_mask: [B, S], for models with an encoder.
            at: (row, column) of each True of `response_mask`, see `TokenBatch.at`. None: a GPU is asked for them.
            rows: see `packed`; the rows go through the model without padding. Only if `why_unpackable` says nothing.
            values: False skips the heads.
        """
        if at is None:
            assert not response_mask[:, 0].any(), "the first token of a row has no state before it"
            at = response_mask.nonzero(as_tuple=True)
        value_head, q_heads = (self.value_head, self.q_heads) if values else (None, None)
        with nullcontext() if value_head is None else value_head.watching():
            if rows is None:
                hidden = self.architecture.states(tokens, encoder_tokens, encoder_mask)
            else:
                hidden = packed_states(self.model, tokens, rows)
        places = torch.arange(tokens.numel(), device=tokens.device) if rows is None else rows.places.flatten()
        if isinstance(self.architecture, Scored):
            nothing = torch.zeros(tokens.shape, device=tokens.device)
            return TokenOutputs(nothing, last=self._at_last(hidden, places, attention_mask))
        at = at[0] * tokens.shape[1] + at[1]
        chosen, at_state = tokens.flatten().index_select(0, at), places.index_select(0, at - 1)
        before = _rows(hidden, at_state)
        logprobs = chosen_logprobs(before, chosen, self.logits, self.temperature)
        outputs = TokenOutputs(spread(logprobs, at, tokens.shape))
        if value_head is not None:
            outputs.values = spread(value_head(_rows(value_head.states(hidden), at_state)), at, tokens.shape)
        if q_heads is not None:
            q = [spread(each, at, tokens.shape) for each in q_heads(before, chosen)]
            outputs.q, outputs.target_q, outputs.q_logprobs = q
        return outputs

    def _at_last(self, hidden: Tensor, places: Tensor, attention_mask: Tensor) -> Tensor:
        """The score [B] float32 of the last token of each row."""
        rows, width = attention_mask.shape
        ends = attention_mask.sum(dim=1) - 1 + torch.arange(rows, device=hidden.device) * width
        return self.logits(_rows(hidden, places[ends])).squeeze(-1).float()

    def save_model(self, folder: Path | str, merge: bool = False) -> None:
        """Writes the language model so that plain ``transformers`` loads it; `merge` is for adapters."""
        write(partial(_save_pretrained, self.model, folder), self.model.state_dict())

    def plain_weights(self) -> Iterable[tuple[str, Tensor]]:
        """(name, weight) of the language model as plain ``transformers`` has it; tied weights once."""
        return self.model.named_parameters()

    @property
    def value_head(self) -> ValueHead | ValueBranch | None:
        """The value head, if there is one."""
        return self.heads["value"] if self.heads and "value" in self.heads else None

    @property
    def q_heads(self) -> QHeads | None:
        """The Q heads, if there are any."""
        return self.heads["q"] if self.heads and "q" in self.heads else None


def build_policy(
    model: PreTrainedModel,
    *,
    num_layers_unfrozen: int = -1,
    value_head: bool = False,
    value_layers: int = 0,
    q_heads: int = 0,
    dropout: bool = True,
    temperature: float = 1.0,
    architecture: type[Architecture] = Causal,
) -> Policy:
    """A policy of `model` with new heads; freezes all but `num_layers_unfrozen` blocks. Arguments as in ``ModelNeeds``.

    Raises:
        ValueError: the model has too few blocks, is not supported, or is quantized although its weights must train.
    """
    if num_layers_unfrozen and getattr(model, "is_quantized", False):
        raise ValueError("Quantized weights cannot train: set model.peft_config, or model.num_layers_unfrozen to 0")
    freeze(model, num_layers_unfrozen)
    if not dropout:
        disable_dropout(model)
    built = architecture(model)  # before the heads: their check runs the model
    return Policy(model, *make_heads(model, value_head, value_layers, q_heads), temperature, built)


def make_heads(
    model: PreTrainedModel, value_head: bool, value_layers: int, q_heads: int
) -> tuple[ValueHead | ValueBranch | None, QHeads | None]:
    """(new value head, new Q heads) for `model`, or None; arguments as in ``ModelNeeds``."""
    value = None
    if value_head:
        value = ValueBranch(model, value_layers) if value_layers else ValueHead(hidden_size(model))
    return value, QHeads(hidden_size(model), output_head(model).weight.shape[0], q_heads) if q_heads else None


def load_model(
    model_path: str | Path | PretrainedConfig,
    model_extra_configs: dict[str, Any],
    architecture: type[Architecture] = Causal,
) -> PreTrainedModel:
    """The pretrained model at `model_path`; if that is a config, a model with random weights.

    Args:
        model_extra_configs: arguments of ``from_pretrained``. Weights are float32 if there is no ``dtype`` (or
            ``torch_dtype``). ``load_in_8bit`` and ``load_in_4bit`` quantize them.

    Raises:
        ImportError: bitsandbytes is missing for quantization.
        ValueError: the architecture is not the model's, or `model_path` is an adapter on the hub.
        OSError: there is no model at `model_path`.
    """
    options = quantized(model_extra_configs)
    options.setdefault("dtype", options.pop("torch_dtype", torch.float32))
    if isinstance(model_path, PretrainedConfig):
        model = architecture.loader.from_config(copy.deepcopy(model_path), **options)
        return _with_trained_pad(with_fast_operations(model), is_new=True)
    try:
        with no_bars():
            model = architecture.loader.from_pretrained(model_path, **options)
    except OSError as error:
        raise OSError(
            f"No model at {str(model_path)!r}: it is neither a folder with a config.json and weights, nor a model "
            f"on the Hugging Face hub that can be reached from here or is in the local cache ({first_line(error)})"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers found it on the hub
        raise ValueError(f"{model_path} on the hub is an adapter: download it and write its folder in model.model_path")
    return _with_trained_pad(with_fast_operations(model), is_new=False)


def save_hf(policy: Policy, tokenizer: PreTrainedTokenizerBase | None, folder: Path | str, merge: bool = False) -> None:
    """Writes the model so that plain ``transformers`` loads it with the same logits (to 1e-6), and the heads beside it.

    For an adapted policy it writes the adapter or, with `merge`, the model with the adapter merged into its weights.
    """
    with no_bars():
        policy.save_model(folder, merge)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if policy.heads is not None:
        write(partial(save_file, filename=Path(folder) / HEADS_FILE), policy.heads.state_dict())


def _save_pretrained(model: PreTrainedModel, folder: Path | str, weights: dict[str, Tensor]) -> None:
    with no_bars():
        model.save_pretrained(folder, state_dict=weights)


def load_heads(policy: Policy, folder: Path | str) -> None:
    """Loads from `folder` the heads that this policy has too (see `fitting_heads`); other heads stay as they are."""
    file = Path(folder) / HEADS_FILE
    if policy.heads is None or not file.is_file():
        return
    shapes = {name: weight.shape for name, weight in policy.heads.state_dict().items()}
    policy.heads.load_state_dict(fitting_heads(load_file(file), shapes, str(file)), strict=False)


def fitting_heads(found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> dict[str, Tensor]:
    """Those saved weights whose kind of head ("value" or "q") this method has too.

    Args:
        found: the saved weights.
        shapes: the shapes of this method's heads, by the same names.
        where: the place of `found`, for messages.

    Raises:
        ValueError: heads of one kind have other sizes.
    """
    saved, own = ({name.partition(".")[0] for name in names} for names in (found, shapes))
    taken = {name: weight for name, weight in found.items() if name.partition(".")[0] in own}
    needed = {name: shape for name, shape in shapes.items() if name.partition(".")[0] in saved}
    if {name: weight.shape for name, weight in taken.items()} != needed:
        raise ValueError(
            f"The heads in {where} have other sizes than those this method needs: move the file to start with new ones"
        )
    if own and saved != own:
        said = {"takes": saved & own, "leaves out": saved - own, "makes new": own - saved}
        listed = ", ".join(f"{verb} {' and '.join(sorted(kinds))}" for verb, kinds in said.items() if kinds)
        logger.info(f"Of the heads in {where}, this method {listed}")
    return taken


@torch.no_grad()
def _with_trained_pad(model: PreTrainedModel, is_new: bool) -> PreTrainedModel:
    """`model` with a pad token whose embedding trains like any other, because pad may be eos, which the model reads.
    With ``padding_idx`` torch would keep its gradient 0."""
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table and module.padding_idx is not None:
            if is_new:  # transformers made the row 0, and a norm multiplies the gradient of a row of zeros by 1000
                draws = torch.Generator(table.device).manual_seed(0)
                table[module.padding_idx].normal_(std=float(table.std()), generator=draws)
            module.padding_idx = None
    return model


def _rows(states: Tensor, at: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, at)
