"""`.nemo` archives: what is written comes back in all forms of NeMo, and a stranger's archive can do no harm."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.builders import UNPACK
from trlx.backends.megatron.nemo.archive import opened, write_archive

CONFIG = {"hidden_size": 2, "optim": {"lr": 1e-5, "betas": [0.9, 0.98]}, "precision": "bf16", "tokenizer": None}
WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def tar_of(path, *members, mode="w:"):
    """A tar made by hand, as one could come from anywhere."""
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def plain(path, config="hidden_size: 2", weights=None, mode="w:"):
    content = saved({"w": WEIGHT}) if weights is None else weights
    files = member("./model_config.yaml", config.encode()), member("./model_weights.ckpt", content)
    return tar_of(path, *files, mode=mode)


def read_config(path):
    with opened(path) as archive:
        return archive.config


def test_what_is_written_comes_back_also_after_the_archive_is_closed(tmp_path):
    write_archive(tmp_path / "new" / "m.nemo", CONFIG, {(0, 0): {"w": WEIGHT, "h": WEIGHT.bfloat16()}})
    with opened(tmp_path / "new" / "m.nemo") as archive:
        folder, weights = archive.folder, archive.weights()
        assert archive.config == CONFIG and archive.parallel_sizes() == (1, 1)
    assert not folder.exists()
    assert weights["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]] and weights["h"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        ([(0, 0)], ["model_weights.ckpt"]),
        ([(0, 0), (1, 0)], ["mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"]),
        (
            [(0, 0), (0, 1), (1, 0), (1, 1)],
            [f"tp_rank_0{tp}_pp_rank_00{pp}/model_weights.ckpt" for tp in (0, 1) for pp in (0, 1)],
        ),
        ([(0, 0), (0, 1)], [f"tp_rank_00_pp_rank_00{pp}/model_weights.ckpt" for pp in (0, 1)]),
    ],
)
def test_every_rank_has_the_file_that_nemo_gives_it(tmp_path, ranks, names):
    write_archive(tmp_path / "m.nemo", CONFIG, {(tp, pp): {"w": WEIGHT + 10 * tp + pp} for tp, pp in ranks})
    with tarfile.open(tmp_path / "m.nemo", "r:") as tar:
        assert tar.getnames() == ["./model_config.yaml", *(f"./{name}" for name in names)]
        tar.extractall(tmp_path / "unpacked", **UNPACK)
    for source in (tmp_path / "m.nemo", tmp_path / "unpacked"):
        with opened(source) as archive:
            assert archive.parallel_sizes() == tuple(size + 1 for size in max(ranks))
            assert [archive.weights(*rank)["w"][0, 0].item() for rank in ranks] == [
                1 + 10 * tp + pp for tp, pp in ranks
            ]


def test_only_the_files_of_the_rank_that_asks_are_unpacked(tmp_path):
    ranks = {(tp, 0): {"w": WEIGHT} for tp in range(3)}
    write_archive(tmp_path / "m.nemo", CONFIG, ranks, files={"abc_vocab.json": b"{}"})
    with opened(tmp_path / "m.nemo") as archive:
        archive.weights(tp_rank=2)
        unpacked = sorted(p.relative_to(archive.folder).as_posix() for p in archive.folder.rglob("*") if p.is_file())
    assert unpacked == ["model_config.yaml", "mp_rank_02/model_weights.ckpt"]


def test_an_unpacked_folder_is_read_where_it_lies_also_through_a_linked_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save({"w": WEIGHT}, elsewhere / "model_weights.ckpt")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_config.yaml").write_text("a: 1")
    (tmp_path / "m" / "mp_rank_00").symlink_to(elsewhere)
    with opened(str(tmp_path / "m")) as archive:
        assert archive.folder == tmp_path / "m" and archive.parallel_sizes() == (1, 1)
        assert torch.equal(archive.weights()["w"], WEIGHT)
    assert (elsewhere / "model_weights.ckpt").exists()


def test_compressed_archives_and_weights_from_before_zip_files_are_read(tmp_path):
    buffer = io.BytesIO()
    torch.save(OrderedDict(w=WEIGHT), buffer, _use_new_zipfile_serialization=False)
    with opened(plain(tmp_path / "old.nemo", weights=buffer.getvalue(), mode="w:gz")) as archive:
        assert torch.equal(archive.weights()["w"], WEIGHT)


def test_files_come_along_and_are_found_by_the_name_in_the_config(tmp_path):
    (tmp_path / "spm.model").write_bytes(b"pieces")
    files = {"abc_tokenizer.model": tmp_path / "spm.model", "vocab.json": b"{}"}
    write_archive(tmp_path / "m.nemo", {"model": "nemo:abc_tokenizer.model"}, {(0, 0): {"w": WEIGHT}}, files)
    with opened(tmp_path / "m.nemo") as archive:
        assert archive.file(archive.config["model"]).read_bytes() == b"pieces"
        assert archive.file("vocab.json").read_bytes() == b"{}"
        with pytest.raises(
            FileNotFoundError, match="has no merges.txt: it holds abc_tokenizer.model, model_config.yaml"
        ):
            archive.file("nemo:merges.txt")


def test_the_same_model_gives_the_same_bytes_and_a_slice_takes_only_its_own_place(tmp_path):
    shard = torch.zeros(1000, 100)[:10]
    for name in ("a.nemo", "b.nemo"):
        write_archive(tmp_path / name, CONFIG, {(0, 0): {"w": shard}})
    content = (tmp_path / "a.nemo").read_bytes()
    # 10 x 100 float32 are 4,000 bytes, the tensor they were cut from 400,000
    assert content == (tmp_path / "b.nemo").read_bytes() and 4_000 < len(content) < 20_000


def test_a_failure_while_writing_leaves_the_previous_archive_and_nothing_else(tmp_path):
    write_archive(tmp_path / "m.nemo", {"step": 1}, {(0, 0): {"w": WEIGHT}})
    with pytest.raises(AttributeError):
        write_archive(tmp_path / "m.nemo", {"step": 2}, {(0, 0): {"w": "no tensor"}})
    assert read_config(tmp_path / "m.nemo") == {"step": 1} and os.listdir(tmp_path) == ["m.nemo"]
    write_archive(tmp_path / "m.nemo", {"step": 3}, {(0, 0): {"w": WEIGHT}})
    assert read_config(tmp_path / "m.nemo") == {"step": 3}


def test_references_are_filled_in_where_they_lead_somewhere(tmp_path):
    text = """
        hidden_size: 8
        lr: 1e-5
        head: {size: "${..hidden_size}", again: "${head.size}", name: "h${hidden_size}"}
        optim: {betas: "${betas}", max_steps: "${trainer.max_steps}"}
        betas: [0.9, 0.98]
        a: {b: "${c}"}
        c: {d: "${a}"}
    """
    config = read_config(plain(tmp_path / "m.nemo", config=text))
    assert config["lr"] == 0.00001
    assert config["head"] == {"size": 8, "again": 8, "name": "h8"}
    assert config["optim"] == {"betas": [0.9, 0.98], "max_steps": "${trainer.max_steps}"}
    assert (config["a"], config["c"]) == ({"b": "${c}"}, {"d": "${a}"})


def test_no_function_is_called_by_an_interpolation(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    call = "${oc.env:SECRET}"
    lines = f"direct: {call}", "by_name: ${direct}", rf"hidden: \{call}", "spliced: $${word}{oc.env:SECRET}", "word: w"
    config = read_config(plain(tmp_path / "m.nemo", config="\n".join(lines)))
    assert config == dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("../evil", b"x"), r"the name '\.\./evil' leads out"),
        (member("mp_rank_00/../../evil", b"x"), "leads out"),
        (member("/tmp/evil", b"x"), "leads out"),
        (member("C:\\evil", b"x"), "leads out"),
        (member("..\\evil", b"x"), "leads out"),
        (member("../evil", kind=tarfile.DIRTYPE), "leads out"),
        (member("evil", kind=tarfile.SYMTYPE, link="/etc"), "'evil' is a link"),
        (member("evil", kind=tarfile.LNKTYPE, link="../../etc/passwd"), "'evil' is a link"),
        (member("evil", kind=tarfile.CHRTYPE), "'evil' is a device"),
        (member("evil", kind=tarfile.FIFOTYPE), "'evil' is a device or another special file"),
    ],
)
def test_an_archive_with_a_member_that_could_do_harm_is_refused(tmp_path, extra, message):
    config = member("./model_config.yaml", b"a: 1")
    (tmp_path / "deep").mkdir()
    path = tar_of(tmp_path / "deep" / "m.nemo", config, extra)
    with pytest.raises(ValueError, match=f"m.nemo was refused.*{message}"), opened(path):
        pass
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(tmp_path / "deep") == ["m.nemo"]


class Harm:
    """Unpickling it makes the folder it names."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [saved, partial(pickle.dumps, protocol=2)])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, write):
    weights = write({"w": Harm(tmp_path / "harm")})
    with (
        opened(plain(tmp_path / "m.nemo", weights=weights)) as archive,
        pytest.raises(ValueError, match="m.nemo was refused.*which could run code"),
    ):
        archive.weights()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("a: !!python/object/apply:os.mkdir [harm]", "it has a tag"),
        ("a: [", "is not a YAML file"),
        ("5", "is not a YAML file of keys with values"),
        ("- a", "must hold keys with values, not a list"),
    ],
)
def test_a_config_that_is_not_plain_yaml_is_refused(tmp_path, config, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"model_config.yaml of .*m.nemo .*{message}"):
        read_config(plain(tmp_path / "m.nemo", config=config))
    assert os.listdir(tmp_path) == ["m.nemo"]


def test_extra_states_of_layers_are_left_out_and_other_objects_are_an_error(tmp_path):
    with opened(plain(tmp_path / "a.nemo", weights=saved({"w": WEIGHT, "qkv._extra_state": None}))) as archive:
        assert list(archive.weights()) == ["w"]
    for content, message in (({"w": WEIGHT, "step": 3}, r"\['step'\] are not"), ([WEIGHT], "holds a list")):
        with (
            opened(plain(tmp_path / "b.nemo", weights=saved(content))) as archive,
            pytest.raises(ValueError, match=message),
        ):
            archive.weights()


def test_what_is_no_archive_or_not_a_whole_one_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .nemo file or folder at .*nowhere"), opened(tmp_path / "nowhere"):
        pass
    (tmp_path / "text.nemo").write_text("hello")
    with pytest.raises(ValueError, match="is not a .nemo file: it is not a tar"), opened(tmp_path / "text.nemo"):
        pass
    for mode in ("w:", "w:gz"):
        whole = plain(tmp_path / "m.nemo", weights=torch.randn(5000).numpy().tobytes(), mode=mode).read_bytes()
        (tmp_path / "half.nemo").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="half.nemo is cut off or damaged"), opened(tmp_path / "half.nemo"):
            pass
    without = tar_of(tmp_path / "w.nemo", member("./model_weights.ckpt", saved({})))
    with (
        pytest.raises(FileNotFoundError, match="w.nemo has no model_config.yaml: it holds model_weights"),
        opened(without),
    ):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no model_config.yaml"), opened(tmp_path / "empty"):
        pass


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"holds no model_weights.ckpt: it must have"),
        (["model_weights.ckpt", "mp_rank_00/model_weights.ckpt"], "holds weights under more than one form of name"),
        (["model_weights/metadata.json"], "are a distributed checkpoint"),
        (["mp_rank_00/model_weights.ckpt", "mp_rank_02/model_weights.ckpt"], "tensor rank 1 with pipeline rank 0 are"),
        (["tp_rank_00_pp_rank_001/model_weights.ckpt"], "tensor rank 0 with pipeline rank 0 are missing"),
        (["mp_rank_987654321/model_weights.ckpt"], "987654322 tensor-parallel times 1"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path, names, message):
    members = [member("model_config.yaml", b"a: 1"), *(member(name, saved({"w": WEIGHT})) for name in names)]
    with opened(tar_of(tmp_path / "m.nemo", *members)) as archive, pytest.raises(ValueError, match=message):
        archive.parallel_sizes()


def test_a_rank_that_does_not_exist_is_an_error_that_says_what_there_is(tmp_path):
    write_archive(tmp_path / "m.nemo", CONFIG, {(0, 0): {"w": WEIGHT}, (1, 0): {"w": WEIGHT}})
    message = "2 tensor-parallel and 1 pipeline-parallel ranks.* not of tensor rank 2 with pipeline rank 0"
    with opened(tmp_path / "m.nemo") as archive, pytest.raises(ValueError, match=message):
        archive.weights(tp_rank=2)


@pytest.mark.parametrize(
    ("ranks", "files", "message"),
    [
        ([], {}, "no weights to write"),
        ([(0, 0), (1, 1)], {}, "tensor rank 0 with pipeline rank 1 are missing"),
        ([(0, 0)], {"./model_config.yaml": b""}, r"cannot hold the extra files \['model_config.yaml'\]"),
        ([(0, 0)], {"../evil": b""}, "leads out of the archive"),
    ],
)
def test_what_would_make_a_broken_archive_is_not_written(tmp_path, ranks, files, message):
    with pytest.raises(ValueError, match=message):
        write_archive(tmp_path / "m.nemo", CONFIG, {rank: {"w": WEIGHT} for rank in ranks}, files)
    assert os.listdir(tmp_path) == []


def test_archives_are_read_without_megatron():
    code = "import sys; sys.modules['megatron'] = None; import trlx.backends.megatron.nemo.archive"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
