"""Disks and paths as users have them: read-only, full, with spaces, and shared by two processes."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from bpe import byte_tokenizer
from packed import EVEN, modules_cache, packed_model  # noqa: F401
from tiny import token_ids

import gatepack as gp
from gatepack import files
from gatepack.exporters.run import ExportConfig
from gatepack.models import load_model

pytestmark = pytest.mark.usefixtures("modules_cache")
SIZES = {"closed": ([1, 4], [0, 3]), "widths": (256, 256), "intermediate_size": 512}
FORMATS = ["uniform", "hf", "gguf", "decilm"]


@pytest.fixture(scope="module")
def model():
    return packed_model(vocab_size=300, **SIZES)


def tokenizer():
    return byte_tokenizer(("t", "h"))


def write(model, folder, format):
    if format == "save":
        return gp.save_pretrained(model, folder)
    if format == "gguf":
        pytest.importorskip("gguf")
    return gp.export(model, folder, format, tokenizer=tokenizer())


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be made; root ignores the mode of others."""
    if os.geteuid() == 0:
        yield Path("/sys")
        return
    folder = tmp_path / "mine"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.parametrize("format", ["save", *FORMATS])
def test_read_only_folder(model, read_only, format):
    with pytest.raises(OSError, match=f"cannot write beside {read_only}/new"):
        write(model, read_only / "new", format)


@pytest.mark.parametrize("format", ["save", *FORMATS])
def test_full_disk(model, tmp_path, format):
    """A limit on the size of files stops writers that are not Python's, too."""
    write(model, tmp_path / "m", format)
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="what was there is unchanged"):
            write(model, tmp_path / "m", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "name", ["two words", "größe 模型 🙂", "a'b\"c$d", "-rf", "x[1]*?", ".m.tmp"]
)
def test_names_of_folders(model, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        gp.save_pretrained(model, name, tokenizer())
    loaded = gp.from_pretrained(name).eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    load_model(tmp_path / name)
    gp.export(model, f"{name} of", "uniform")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        [name, f"{name} of"]
    )


@pytest.mark.parametrize("name", ["", ".", "..", "../../here"])
@pytest.mark.parametrize("format", ["save", "uniform"])
def test_the_working_directory_is_not_replaced(model, tmp_path, name, format, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(ValueError, match="is the working directory or holds it"):
        write(model, name, format)
    assert Path.cwd() == tmp_path / "here" / "below"
    write(model, "small", format)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_does_not_replace_what_its_model_was_loaded_from(model, tmp_path, format):
    write(model, tmp_path / "m", "save")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "m")
    loaded = gp.from_pretrained(tmp_path / "m")
    for folder in ("m", "link"):
        with pytest.raises(ValueError, match="m is the folder of the model itself"):
            write(loaded, tmp_path / folder, format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    for _ in range(2):
        write(loaded, tmp_path / "m" / "inside", format)


def test_gguf_in_a_folder_with_an_odd_name(model, tmp_path):
    folder = tmp_path / "größe 模型"
    assert write(model, folder, "gguf")["files"].keys() >= {"model.gguf"}
    assert load_model(folder)[0].config.vocab_size == 300


def test_mode_of_every_file_follows_the_umask(model, tmp_path):
    before = os.umask(0o027)
    try:
        write(model, tmp_path / "m", "hf")
        files.write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    for path in (*(tmp_path / "m").iterdir(), tmp_path / "x.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640, path


@pytest.mark.parametrize("mode", [0o700, 0o2775, 0o750])
def test_permissions_of_a_folder_stay(model, tmp_path, mode, monkeypatch):
    folder = tmp_path / "m"
    folder.mkdir()
    folder.chmod(mode)
    during = []

    def save(to, *args, **kwargs):
        during.append(to.stat().st_mode & 0o7777)
        return type(model).save_pretrained(model, to, *args, **kwargs)

    monkeypatch.setattr(model, "save_pretrained", save)
    for _ in range(2):
        write(model, folder, "save")
        assert folder.stat().st_mode & 0o7777 == mode
    assert during == [mode | 0o700] * 2


def test_a_mount_point_is_refused_before_any_work(model, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "m")
    message = "m is a mount point or part of another file system.*a folder in it .--out."
    with pytest.raises(ValueError, match=message):
        ExportConfig(model="smollm2", out=tmp_path / "m")
    for format in ("save", "uniform"):
        with pytest.raises(ValueError, match=message):
            write(model, tmp_path / "m", format)
    write(model, tmp_path / "m" / "inside", "save")


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_the_system_does_not_let_go_is_named(
    model, tmp_path, code, filled, monkeypatch
):
    (tmp_path / "m").mkdir()
    if filled:
        (tmp_path / "m" / "notes").write_text("mine")
    rename = os.rename

    def refuse(source, target):
        if tmp_path / "m" in (Path(source), Path(target)):
            raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="what was there is unchanged: .*m is a mount point or part"):
        write(model, tmp_path / "m", "save")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["notes"] * filled
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_leftovers_of_a_dead_process_go_and_those_of_a_live_one_stay(model, tmp_path):
    dead = tmp_path / f".m.aaaaaaaa{files._STAGING}"
    foreign = tmp_path / f".other.aaaaaaaa{files._STAGING}"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "half").write_text("written")
    with files._staging(tmp_path / "m") as live:
        gp.save_pretrained(model, tmp_path / "m")
        assert live.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([foreign.name, "m"])
