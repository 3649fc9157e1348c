"""Archives go to the NeMo toolkit and come back. Run by exchange.sh, in an environment that has the toolkit.

Every model of the toolkit is saved and restored by `ModelPT`, whose smallest subclass is used here. `restore_from`
makes an object only of classes on its allow-list, given by prefixes such as ``nemo.core.``. A config whose ``target``
is `ModelPT` itself passes, and the subclass that `restore_from` was called on takes its place.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from nemo.core.classes import ModelPT
from nemo.package_info import __version__
from nemo.utils.app_state import AppState
from omegaconf import OmegaConf

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.mapping import entries
from trlx.backends.megatron.nemo.archive import opened, write_archive
from trlx.backends.megatron.nemo.config import write_config
from trlx.backends.megatron.nemo.weights import open_nemo, write_nemo

CONFIG = {
    "target": "nemo.core.classes.modelPT.ModelPT",
    "nemo_version": __version__,
    "hidden_size": 3,
    "ffn_hidden_size": 2,
    "layernorm_epsilon": 1e-5,
    "precision": "bf16",
    "optim": {"name": "adamw", "betas": [0.9, 0.98]},
    "tokenizer": {"vocab_file": "nemo:0123_vocab.txt", "merge_file": None},
}
VOCABULARY = b"first second third"
SHAPE = DecoderConfig(
    num_layers=2,
    hidden_size=4,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=2,
    max_position_embeddings=16,
    vocab_size=7,
    tied=True,
    embedding_dropout=0.0,
)


class Linear(ModelPT):
    """One layer, and a vocabulary that travels in the archive."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.layer = torch.nn.Linear(cfg.hidden_size, cfg.ffn_hidden_size)
        file = self.register_artifact("tokenizer.vocab_file", cfg.tokenizer.vocab_file)
        self.vocabulary = Path(file).read_bytes()

    def setup_training_data(self, train_data_config):
        """Asked for by the toolkit; there is no training here."""

    def setup_validation_data(self, val_data_config):
        """As above."""

    @classmethod
    def list_available_models(cls):
        """There are none to download."""
        return []


class Decoder(ModelPT):
    """The parameters of NeMo's GPT on Megatron-Core with Transformer Engine, and nothing that computes with them."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        state = AppState()
        tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
        is_first = pipeline == 1 or state.pipeline_model_parallel_rank == 0
        is_last = pipeline == 1 or state.pipeline_model_parallel_rank == pipeline - 1
        hidden, rows = cfg.hidden_size, cfg.padded_vocab_size // tensor
        self.model = torch.nn.Module()
        if is_first:
            self.model.embedding = torch.nn.Module()
            self.model.embedding.word_embeddings = torch.nn.Embedding(rows, hidden)
            self.model.embedding.position_embeddings = torch.nn.Embedding(cfg.max_position_embeddings, hidden)
        self.model.decoder = torch.nn.Module()
        self.model.decoder.layers = torch.nn.ModuleList(
            block(hidden, 3 * hidden // tensor, cfg.ffn_hidden_size // tensor)
            for _ in range(cfg.num_layers // pipeline)
        )
        if is_last:
            self.model.decoder.final_layernorm = torch.nn.LayerNorm(hidden)
        if is_last and pipeline > 1:
            self.model.output_layer = torch.nn.Linear(hidden, rows, bias=False)

    setup_training_data = setup_validation_data = Linear.setup_training_data
    list_available_models = Linear.list_available_models


def block(hidden: int, qkv: int, units: int) -> torch.nn.Module:
    """One layer's parameters on a tensor rank: `qkv` rows of queries, keys and values, `units` feed-forward units."""
    layer = torch.nn.Module()
    layer.self_attention, layer.mlp = torch.nn.Module(), torch.nn.Module()
    layer.self_attention.linear_qkv, layer.mlp.linear_fc1 = normed(hidden, qkv), normed(hidden, units)
    layer.self_attention.linear_proj = torch.nn.Linear(qkv // 3, hidden)
    layer.mlp.linear_fc2 = torch.nn.Linear(units, hidden)
    return layer


def normed(hidden: int, rows: int) -> torch.nn.Module:
    """A projection and the norm before it."""
    linear = torch.nn.Linear(hidden, rows)
    linear.layer_norm_weight = torch.nn.Parameter(torch.randn(hidden))
    linear.layer_norm_bias = torch.nn.Parameter(torch.randn(hidden))
    return linear


def ours_restores_in_the_toolkit(folder: Path) -> None:
    weights = random_weights(seed=1)
    write_archive(folder / "ours.nemo", CONFIG, {(0, 0): weights}, files={"0123_vocab.txt": VOCABULARY})
    model = Linear.restore_from(str(folder / "ours.nemo"), map_location="cpu")
    assert_same(model.state_dict(), weights)
    assert settings(model.cfg) == settings(CONFIG)
    assert model.vocabulary == VOCABULARY


def every_rank_of_the_toolkit_finds_its_weights_in_ours(folder: Path) -> None:
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        ranks = [(t, p) for t in range(tp) for p in range(pp)]
        weights = {rank: random_weights(seed=10 * rank[0] + rank[1]) for rank in ranks}
        write_archive(folder / "ranks.nemo", CONFIG, weights, files={"0123_vocab.txt": VOCABULARY})
        for rank in ranks:
            with parallel((tp, pp), rank):
                model = Linear.restore_from(str(folder / "ranks.nemo"), map_location="cpu")
            assert_same(model.state_dict(), weights[rank])


def the_toolkits_opens_here_packed_and_unpacked(folder: Path) -> None:
    model = saved_by_the_toolkit(folder / "theirs.nemo")
    with tarfile.open(folder / "theirs.nemo") as tar:
        tar.extractall(folder / "theirs", filter="data")
    for source in (folder / "theirs.nemo", folder / "theirs"):
        with opened(source) as archive:
            assert archive.parallel_sizes() == (1, 1)
            assert_same(archive.weights(), model.state_dict())
            assert settings(archive.config) == settings(CONFIG)
            vocabulary = archive.config["tokenizer"]["vocab_file"]
            assert vocabulary.startswith("nemo:") and archive.file(vocabulary).read_bytes() == VOCABULARY


def an_archive_goes_there_and_back_and_there(folder: Path) -> None:
    model = saved_by_the_toolkit(folder / "first.nemo")
    with opened(folder / "first.nemo") as archive:
        name = archive.config["tokenizer"]["vocab_file"].removeprefix("nemo:")
        files = {name: archive.file(name)}
        write_archive(folder / "second.nemo", archive.config, {(0, 0): archive.weights()}, files)
        again = Linear.restore_from(str(folder / "second.nemo"), map_location="cpu")
        assert_same(again.state_dict(), model.state_dict())
        assert settings(again.cfg) == settings(archive.config)
        assert again.vocabulary == VOCABULARY


def a_decoder_of_ours_restores_in_the_toolkit_on_every_rank(folder: Path) -> None:
    for tp, pp in ((1, 1), (2, 1), (2, 2)):
        found = entries(SHAPE, "gpt2")
        tensors = {name: torch.randn(size) for entry in found.values() for name, size in entry.hf_shapes.items()}
        write_nemo(folder / "gpt.nemo", SHAPE, tensors.__getitem__, "gpt2", tensor=tp, pipeline=pp)
        with opened(folder / "gpt.nemo") as archive:
            for rank in ((t, p) for t in range(tp) for p in range(pp)):
                with parallel((tp, pp), rank):
                    model = Decoder.restore_from(str(folder / "gpt.nemo"), map_location="cpu")
                theirs, ours = model.state_dict(), archive.weights(*rank)
                assert_same({name: ours[name] for name in theirs}, theirs)
                assert ours.keys() == theirs.keys()


def a_decoder_saved_by_the_toolkit_becomes_a_model_here(folder: Path) -> None:
    config = write_config(SHAPE, tensor=1, pipeline=1, rows=128, divisor=128, dtype=torch.float32)
    model = Decoder(OmegaConf.create(config))
    model.save_to(str(folder / "theirs.nemo"))
    found = open_nemo(folder / "theirs.nemo")
    assert found.decoder == SHAPE and found.family == "gpt2"
    theirs = model.state_dict()
    embedding = theirs["model.embedding.word_embeddings.weight"]
    assert torch.equal(found.tensors.read("transformer.wte.weight")[:], embedding[: SHAPE.vocab_size])
    up = theirs["model.decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(found.tensors.read("transformer.h.1.mlp.c_fc.weight")[:], up.T)
    # queries, keys and values of a head after each other there, of all heads here
    heads = theirs["model.decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 3, 2, 4)
    qkv = found.tensors.read("transformer.h.1.attn.c_attn.weight")[:]
    assert torch.equal(qkv, heads.transpose(0, 1).reshape(12, 4).T)


def saved_by_the_toolkit(path: Path) -> Linear:
    """A new model after the toolkit has saved it at `path`."""
    (path.parent / "vocab.txt").write_bytes(VOCABULARY)
    config = OmegaConf.merge(CONFIG, {"tokenizer": {"vocab_file": str(path.parent / "vocab.txt")}})
    model = Linear(config)
    model.save_to(str(path))
    return model


@contextmanager
def parallel(sizes: tuple[int, int], rank: tuple[int, int]) -> Iterator[None]:
    """The toolkit's idea of where this process stands among model-parallel ones."""
    state = AppState()
    state.model_parallel_size = sizes[0] * sizes[1]
    state.tensor_model_parallel_size, state.pipeline_model_parallel_size = sizes
    state.tensor_model_parallel_rank, state.pipeline_model_parallel_rank = rank
    try:
        yield
    finally:
        state.model_parallel_size = None


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Weights of a `Linear` as configured above."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(2, 3, generator=generator),
        "layer.bias": torch.randn(2, generator=generator),
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit, name by name."""
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def settings(config) -> dict:
    """A config as plain dicts without the vocabulary's path: the toolkit names the file anew wherever it puts it."""
    plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    del plain["tokenizer"]["vocab_file"]
    return plain


if __name__ == "__main__":
    for check in (
        ours_restores_in_the_toolkit,
        every_rank_of_the_toolkit_finds_its_weights_in_ours,
        the_toolkits_opens_here_packed_and_unpacked,
        an_archive_goes_there_and_back_and_there,
        a_decoder_of_ours_restores_in_the_toolkit_on_every_rank,
        a_decoder_saved_by_the_toolkit_becomes_a_model_here,
    ):
        with TemporaryDirectory() as temporary:
            check(Path(temporary))
        print(f"ok  {check.__name__.replace('_', ' ')}")
    print(f"Archives were exchanged with nemo_toolkit {__version__}, torch {torch.__version__}")
