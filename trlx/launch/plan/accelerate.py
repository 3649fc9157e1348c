"""What a run on the Accelerate backend holds: one process, DDP or FSDP."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trlx.backends.base import ModelNeeds
from trlx.config import TRLConfig
from trlx.launch.plan.phases import Phase
from trlx.launch.plan.rehearsal import Pass, Rehearsal, Weights
from trlx.launch.plan.work import Work, rows_of_a_step
from trlx.models.adapters import adapted_model
from trlx.presets import preset_path
from trlx.registry import trainers
from trlx.strict import ConfigError
from trlx.yaml_files import read_yaml

MOMENTS = {"adam": 2.0, "adamw": 2.0, "adam_8bit_bnb": 0.5, "adamw_8bit_bnb": 0.5, "sgd": 0.0}
"""Bytes of an optimizer's state for each byte of the weights that train; SGD with momentum has 1."""
AHEAD = 2
"""Blocks that FSDP holds whole at once: the one that runs, and the next one."""


@dataclass(frozen=True)
class Launch:
    """How processes are started, as in configs/accelerate/."""

    processes: int = 1
    shards: bool = False
    """FSDP2: weights, gradients and moments are divided over the processes."""
    reshards: bool = True
    """Blocks are whole only while they run; otherwise from the forward pass to the end of the backward pass."""
    mixed_precision: str | None = None

    @classmethod
    def read(cls, name: str | None, processes: int | None) -> Launch:
        """The launch that a file of configs/accelerate/ describes, by its name or path; None: DDP.

        Raises:
            ConfigError: it is about DeepSpeed.
            ValueError: there is no such file.
        """
        if name is None:
            return cls(processes or 1)
        known = preset_path("ppo").parent / "accelerate" / f"{name}.yaml"
        settings = read_yaml(known if known.is_file() else preset_path(name))
        kind, fsdp = settings.get("distributed_type"), settings.get("fsdp_config") or {}
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
            raise ConfigError(f"trlx plan does not know {kind} ({name}): write ddp, fsdp2 or fsdp2_whole_step")
        count = processes or int(settings.get("num_processes", 1))
        shards = kind == "FSDP" and count > 1
        return cls(count, shards, bool(fsdp.get("fsdp_reshard_after_forward", True)), settings.get("mixed_precision"))


class AccelerateRun:
    """What an Accelerate trainer would make of `config`, on paper.

    Args:
        limit: bytes of a GPU; they decide how many rows fit into one pass, and how many hidden states are kept.
        rehearsals: those that were made before for runs that differ from this one, which adds its own.

    Raises:
        ConfigError, OSError: see `Rehearsal`.
    """

    def __init__(self, config: TRLConfig, launch: Launch, limit: float, rehearsals: dict[str, Rehearsal] | None = None):
        self.config, self.launch, self.limit = config, launch, limit
        self.kind = trainers.get(config.train.trainer)
        self.needs: ModelNeeds = self.kind.needs(config.method)
        asked = config.train.mixed_precision or launch.mixed_precision
        self.half = asked in ("bf16", "fp16")
        model = config.model
        if adapted_model(model.model_path) is not None:
            raise ConfigError(f"{model.model_path} is an adapter: write its model there, and model.peft_config")
        rehearsals = {} if rehearsals is None else rehearsals
        key = f"{model} {self.needs} {self.half} {launch.shards}"
        if key not in rehearsals:
            # transformers writes the dtype into the model's config, which is a part of the key
            rehearsals[key] = Rehearsal(copy.deepcopy(model), self.needs, self.half, launch.shards)
        self.rehearsal = rehearsals[key]

    @property
    def weights(self) -> Weights:
        return self.rehearsal.weights

    @property
    def length(self) -> int:
        return self.config.train.seq_length

    @property
    def response(self) -> int:
        """The longest response: all tokens but the first, or as many as are generated; of a reward model the eos."""
        if self.needs.score_head:
            return 1
        return min(self.length - 1, self.new_tokens) if self.kind.online else self.length - 1

    @property
    def new_tokens(self) -> int:
        """Tokens that a response may have when it is sampled."""
        method = self.config.method
        given = getattr(method, "sampling", None) or getattr(method, "gen_kwargs", None) or {}
        asked = given.get("max_new_tokens") or 1
        return min(max(asked) if isinstance(asked, list) else int(asked), self.length - 1)

    @property
    def rows_sampled(self) -> int:
        """Rows that a process samples at once."""
        rows = int(getattr(self.config.method, "chunk_size", self.config.train.batch_size))
        asked = self.config.train.sampler
        places = asked.get("places") if isinstance(asked, Mapping) else None
        return min(rows, places or rows)

    @cached_property
    def rows(self) -> int:
        """Rows of a microbatch, if all have the most tokens."""
        train, most = self.config.train, self.config.train.minibatch_size or self.config.train.batch_size
        tokens = train.tokens_per_microbatch
        free = not (train.minibatch_size or train.gradient_checkpointing or self.launch.shards or self.needs.dropout)
        if tokens is None and free:  # as `AccelerateBackend` does it
            one = self.rehearsal.update(1, self.length, self.response).kept
            each = max((self.rehearsal.update(2, self.length, self.response).kept - one) / self.length, 1)
            held = self.weights.size + self._reference
            tokens = max((self.limit - held - 3 * self.weights.trained_size) / 2 / each, 1)
        return most if tokens is None else min(most, max(int(tokens // self.length), 1))

    @property
    def microbatches(self) -> int:
        return -(-self.config.train.batch_size // self.rows)

    @cached_property
    def kept_states(self) -> float:
        """Bytes of the hidden states that are kept on the device."""
        setting, frozen = self.config.train.cache_hidden_states, self.rehearsal.layers - self.rehearsal.trained_layers
        if not frozen or setting == "off" or self.launch.shards or self.needs.dropout or self._embeddings_train:
            return 0
        room = (self.limit - self.weights.size - self._reference) / 4 if setting == "auto" else setting
        return max(min(room, self.rehearsal.states_size(self.rows_held * self.length)), 0)

    @property
    def rows_held(self) -> int:
        """Rows whose hidden states a process can keep: its part of a collection; of an offline method those of a
        step, because no data is read."""
        step = self.config.train.batch_size * self.launch.processes
        return -(-int(getattr(self.config.method, "num_rollouts", step)) // self.launch.processes)

    def phases(self) -> list[Phase]:
        """Memory of one process, without that of CUDA, NCCL and gaps of the allocator."""
        lasting = self._lasting
        found = [Phase("sampling", self._without_moments | self._sampling)] if self.samples else []
        if self.kind.online or self.needs.reference or self.needs.score_head:
            found.append(Phase("scoring", self._without_moments | self._scoring))
        found.append(Phase("update", lasting | self._update))
        return [*found, Phase("save", lasting | {"temporary": self._largest})]

    @property
    def work(self) -> Work:
        """What a step computes."""
        weights, train, launch = self.weights, self.config.train, self.launch
        frozen, kept = weights.blocks - weights.trained_blocks, self.kept_states > 0
        step = rows_of_a_step(self.config, train.batch_size * launch.processes, self.needs.reference, not self.half)
        passes = 4 if self.config.model.peft_config is not None else 0 if kept else 2
        cache = self._sampling["keys, values"] if self.samples else 0
        return Work(
            **step,
            # frozen blocks run once, however often a row is read
            kept=max(step["scored"] - step["sampled"], 0) if kept else 0,
            length=self.length,
            response=self.response,
            new=self.new_tokens,
            trained=weights.trained_blocks,
            frozen=frozen,
            output=weights.output,
            heads=weights.heads,
            passes_frozen=passes,
            again=2 if train.gradient_checkpointing is True else 0,
            half=self.half,
            gpus=launch.processes,
            draws=step["sampled"] * self.new_tokens / (self.rows_sampled * launch.processes),
            read=weights.model * (2 if self.half else 4) + cache / 2,
        )

    @property
    def samples(self) -> bool:
        """Whether it samples, in training or in evaluations."""
        return not self.needs.score_head

    @property
    def saved(self) -> float:
        """Bytes that the main process copies to the host for a checkpoint: what trains with its moments, and the model
        or the adapter alone."""
        moments = self._moments if self.config.train.save_optimizer else 0
        adapted = self.config.model.peft_config is not None
        exported = self.weights.trained_size if adapted else self.weights.size
        return self.weights.trained_size * (1 + moments) + exported

    @property
    def _embeddings_train(self) -> bool:
        return self.config.model.peft_config is None and self.config.model.num_layers_unfrozen == -1

    @property
    def _share(self) -> float:
        return 1 / self.launch.processes if self.launch.shards else 1

    @property
    def _moments(self) -> float:
        optimizer = self.config.optimizer
        return 1.0 if optimizer.kwargs.get("momentum") else MOMENTS[optimizer.name]

    @property
    def _reference(self) -> float:
        return self.weights.reference * self._share if self.needs.reference else 0

    @property
    def _lasting(self) -> dict[str, float]:
        """What is held in every phase. DDP has buckets as large as the gradients."""
        buckets = self.launch.processes > 1 and not self.launch.shards
        return {
            "weights": self.weights.size * self._share,
            "reference": self._reference,
            "optimizer": self._moments * self.weights.trained_size * self._share,
            "gradients": self.weights.trained_size if buckets else 0,
            "kept states": self.kept_states,
        }

    @property
    def _without_moments(self) -> dict[str, float]:
        return self._lasting | ({"optimizer": 0.0} if self.config.train.offload_optimizer else {})

    @property
    def _sampling(self) -> dict[str, float]:
        prompt = max(self.length - self.new_tokens, 1)
        found = self.rehearsal.sampling(self.rows_sampled, prompt, min(prompt + self.new_tokens, self.length))
        return {"keys, values": found.kept, "temporary": found.temporary + self._gathered(whole=True)}

    @property
    def _scoring(self) -> dict[str, float]:
        found = self.rehearsal.scoring(self.rows, self.length, self.response)
        return {"temporary": found.kept + found.temporary + self._gathered(whole=True)}

    @property
    def _update(self) -> dict[str, float]:
        """With one microbatch the first gradients come when all activations are there, the last ones when none are."""
        again = self.config.train.gradient_checkpointing
        found: Pass = self.rehearsal.update(self.rows, self.length, self.response, again)
        lasting, several = self._lasting["gradients"], self.microbatches > 1
        # DDP and FSDP with blocks that stay whole exchange gradients after the last microbatch, and add up whole ones
        waits = several and not (self.launch.shards and self.launch.reshards)
        gradients = self.weights.trained_size * (1 if waits else self._share)
        gathered = self._gathered(whole=not self.launch.reshards)
        if self.launch.shards and self.half and not waits:
            gathered += self.weights.block_size  # FSDP exchanges gradients in float32
        parts = {"gradients": lasting + gradients, "activations": found.kept}
        if not several and gradients > found.kept + found.temporary:
            return {"gradients": lasting + gradients, "temporary": gathered}
        if not several:  # DDP's buckets are there, gradients are not
            parts["gradients"] = lasting
        return parts | {"temporary": found.temporary + gathered}

    def _gathered(self, whole: bool) -> float:
        """Bytes of weights that FSDP gathers: all at once, or the blocks that run and what is in no block."""
        if not self.launch.shards:
            return 0
        blocks = self.weights.block_size * (self.rehearsal.layers if whole else AHEAD)
        return blocks * (0.5 if self.half else 1) + self.weights.outside_size

    @property
    def _largest(self) -> float:
        """Bytes of the largest weight, which FSDP gathers to save it."""
        return self.weights.largest if self.launch.shards else 0
