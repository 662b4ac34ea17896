"""Tests of hooklens.files: whatever happens while a file is written, the old one or the new one is there."""

import errno
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooklens import HookedKeyValueCache, files
from hooklens.activation_cache import ActivationCache
from hooklens.errors import CacheError
from hooklens.files import read_safetensors, replace_file, write_safetensors
from tests.activation_cache.captures import assert_same_tensors, make_cache
from tests.forks import needs_fork, run_in_child, wait_for
from tests.kv_cache.test_cache import assert_same, fill, read


def fail_half_way(error: BaseException):
    """A writer of safetensors files that leaves rubbish and raises."""

    def write(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        path.with_name("the writer's own draft").write_bytes(b"rubbish")
        raise error

    return write


def test_new_file_takes_the_old_ones_place_and_keeps_its_mode(tmp_path):
    target = tmp_path / "file"
    with replace_file(target) as draft:
        draft.write_text("first")
        assert not target.exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode
    target.chmod(0o640)
    with replace_file(target) as draft:
        draft.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plain"]


def test_a_link_goes_on_pointing_to_the_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replace_file(tmp_path / "link") as draft:
        draft.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_folders_and_devices_are_refused(tmp_path):
    """Replacing a device, as root may, would take it from the whole machine."""
    for path in (tmp_path, os.devnull):
        with pytest.raises(OSError, match="is no regular file"), replace_file(path):
            raise AssertionError("not reached")
    assert not Path(os.devnull).is_file()
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "no folder" / "file"):
        raise AssertionError("not reached")


def test_names_as_long_as_the_file_system_takes(tmp_path):
    target = tmp_path / ("ü" * 127)
    write_safetensors(target, {"x": torch.ones(2)})
    assert load_file(target)["x"].tolist() == [1, 1]


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda place: (order.append(stat.S_IFMT(os.fstat(place).st_mode)), fsync(place)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    write_safetensors(tmp_path / "file", {"x": torch.ones(2)})
    assert order == [stat.S_IFREG, "replace", stat.S_IFDIR]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_forced_is_no_failure_and_a_broken_disk_is(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse_folders(place):
        if stat.S_ISDIR(os.fstat(place).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(place)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_safetensors(tmp_path / "file", {"x": torch.ones(2)})
    else:
        write_safetensors(tmp_path / "file", {"x": torch.ones(2)})
    assert load_file(tmp_path / "file")["x"].tolist() == [1, 1]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), MemoryError()])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    target = tmp_path / "file"
    write_safetensors(target, {"x": torch.ones(2)})
    before = target.read_bytes()
    monkeypatch.setattr(files, "save_file", fail_half_way(error))
    with pytest.raises(type(error)):
        write_safetensors(target, {"x": torch.zeros(2)})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_loses_no_cache_that_is_saved_over_its_own_file(tmp_path, monkeypatch):
    """The key-value cache was written in place: the file that its tensors are mapped from was lost with the disk."""
    kv, run = fill(frozen=True), make_cache()
    kv.save(tmp_path / "kv")
    run.save(tmp_path / "run")
    loaded_kv, loaded_run = HookedKeyValueCache.load(tmp_path / "kv"), ActivationCache.load(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fail_half_way(FULL))
        with pytest.raises(CacheError, match=r"cannot write the key-value cache to .*/kv: .*No space left on device"):
            loaded_kv.crop(3).save(tmp_path / "kv")
        with pytest.raises(CacheError, match=r"cannot write the activation cache to .*/run': .*No space left on dev"):
            loaded_run.save(tmp_path / "run")
    for cache in (loaded_kv, HookedKeyValueCache.load(tmp_path / "kv")):
        assert_same(read(cache), read(kv))
    for cache in (loaded_run, ActivationCache.load(tmp_path / "run")):
        assert_same_tensors(cache, run)
    loaded_kv.crop(3).save(tmp_path / "kv")
    assert_same(read(loaded_kv), read(kv))
    assert_same(read(HookedKeyValueCache.load(tmp_path / "kv")), read(kv.crop(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv", "run"]


@needs_fork
def test_a_write_that_the_system_cuts_off(tmp_path):
    """The same with the real writer: the system lets no file grow past 4 kB."""
    resource = pytest.importorskip("resource")
    target = tmp_path / "file"
    write_safetensors(target, {"x": torch.zeros(10)})

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match="File too large"):
            write_safetensors(target, {"x": torch.ones(100_000)})

    assert wait_for(run_in_child(work)) == 0
    assert load_file(target)["x"].tolist() == [0] * 10
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_fork
@pytest.mark.parametrize("place", ["writing", "fsync", "replace"])
def test_kill_at_any_step_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path, place):
    target = tmp_path / "file"
    # Neither another target's draft nor that of a process that runs is anybody else's to remove.
    others = [tmp_path / ".hooklens-0123456789abcdef-999999999-1.draft"]
    others.append(tmp_path / f"{files._draft_prefix(target)}{os.getppid()}-1.draft")
    for other in others:
        other.mkdir()

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(tensors, draft, metadata):
        draft.write_bytes(b"half of it")
        die()

    def work():
        write_safetensors(target, {"x": torch.zeros(10)})
        if place == "writing":
            files.save_file = write_half
        else:
            setattr(os, place, die)
        write_safetensors(target, {"x": torch.ones(10)})

    assert wait_for(run_in_child(work)) == -signal.SIGKILL
    assert load_file(target)["x"].tolist() == [0] * 10
    assert len(list(tmp_path.iterdir())) == 4
    write_safetensors(target, {"x": torch.full((10,), 2.0)})
    assert load_file(target)["x"].tolist() == [2] * 10
    assert set(tmp_path.iterdir()) == {target, *others}


@needs_fork
@pytest.mark.parametrize("n_writes", [1, 4, 9])
def test_kill_at_a_moment_of_chance_leaves_a_whole_file(tmp_path, n_writes):
    target = tmp_path / "file"
    reader, writer = os.pipe()

    def rewrite():
        while True:
            for value in (0.0, 1.0):
                write_safetensors(target, {"x": torch.full((300_000,), value)})
                os.write(writer, b".")

    process = run_in_child(rewrite)
    os.close(writer)
    for _ in range(n_writes):
        assert os.read(reader, 1) == b"."
    os.kill(process, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL
    os.close(reader)
    found = read_safetensors(target)[0]["x"]
    assert found.shape == (300_000,)
    assert (found == found[0]).all()
    write_safetensors(target, {"x": found})
    assert list(tmp_path.iterdir()) == [target]


def test_tensors_that_share_memory_or_are_views_are_written_whole(tmp_path):
    whole = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    given = {"whole": whole, "again": whole, "part": whole[:2], "turned": whole.mT, "row": whole[1].expand(2, 4)}
    write_safetensors(tmp_path / "file", given, {"note": "text"})
    found, metadata = read_safetensors(tmp_path / "file")
    assert metadata == {"note": "text"}
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_what_is_no_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "missing")
    (tmp_path / "text").write_text("some text")
    with pytest.raises(ValueError, match="header"):
        read_safetensors(tmp_path / "text")


def test_a_header_that_was_changed_is_told_by_its_digest(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, {"x": torch.ones(2)}, {"note": "text"})
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="its header is damaged: names, shapes, dtypes or metadata"):
        read_safetensors(path)
    # Files of other writers have none.
    save_file({"x": torch.ones(2)}, path)
    assert read_safetensors(path)[1] == {}


def test_tensors_that_the_format_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="on the meta device hold no data: 'x'"):
        write_safetensors(tmp_path / "file", {"x": torch.zeros(2, device="meta"), "y": torch.zeros(2)})
    with pytest.raises((ValueError, OSError)):
        write_safetensors(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []
