"""Replacing several files of a folder in one step: whoever opens it finds all the old ones, or all the new ones.

New files are written into a draft inside the folder and forced to the disk. The one step is the renaming of the draft
to `.hooklens-save`: before it the folder is as it was, and from then on the save is done, whatever happens. Files are
then moved to their places, `config.json` being taken away first and put back last, so that no other program can load a
mixture; where that is interrupted, the next `finish_replacement` goes on with it. Moving can be repeated and is done
under a lock, so any number of processes may open the folder meanwhile.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hooklens.arguments import show
from hooklens.errors import CheckpointError
from hooklens.files import force_folder_to_disk, force_to_disk, make_draft

_PENDING = ".hooklens-save"
_PLAN = "plan.json"
_FILES = "files"
_LAST = "config.json"


@contextmanager
def replace_files(folder: Path, *, stale: Sequence[str]) -> Iterator[Path]:
    """Gives the folder to write new files into; when the block ends they take their places in one step.

    If the block raises, or the process is killed in it, `folder` stays as it was. Drafts that killed processes of this
    host left in it are removed.

    Args:
        folder: where the files belong; made if it is not there.
        stale: glob patterns of files that go where no new one takes their place.

    Raises:
        CheckpointError: the files cannot be written or put in their places.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_replacement(folder)
        draft = make_draft(folder / _PENDING)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error})") from error
    try:
        files = draft / _FILES
        files.mkdir()
        yield files
        _prepare(draft, folder, stale)
        _commit(draft, folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the save failed, and nothing in the folder changed ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    finish_replacement(folder)


def finish_replacement(folder: Path) -> None:
    """Put the files of a save that was interrupted after its one step in their places.

    Raises:
        CheckpointError: the folder cannot be written to, or what is left of the save is damaged.
    """
    pending = folder / _PENDING
    if not pending.is_dir():
        return
    try:
        with _alone(pending) as is_there:
            if is_there:
                _move(pending, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: a save into this folder was interrupted when its files were being put in place, and finishing "
            f"it failed ({error}). Open it where it can be written to; the saved files are in {pending / _FILES}"
        ) from error


def _prepare(draft: Path, folder: Path, stale: Sequence[str]) -> None:
    """Say what is to be done, and force all of it to the disk."""
    new = sorted(str(path.relative_to(draft / _FILES)) for path in (draft / _FILES).rglob("*") if path.is_file())
    (draft / _PLAN).write_text(json.dumps({"new": new, "stale": list(stale)}), encoding="utf-8")
    for name in new:
        written = draft / _FILES / name
        written.chmod(_mode_for(folder / name, new_file=draft / _PLAN))
        force_to_disk(written)
    force_to_disk(draft / _PLAN)
    for place in {draft, *(path for path in draft.rglob("*") if path.is_dir())}:
        force_folder_to_disk(place)


def _mode_for(replaced: Path, *, new_file: Path) -> int:
    """The mode of the file that is replaced; where there is none, that of any new file, since writers differ in it."""
    # Another process that puts its save in place takes files away at any moment.
    with contextlib.suppress(OSError):
        mode = replaced.stat().st_mode
        if stat.S_ISREG(mode):
            return stat.S_IMODE(mode)
    return stat.S_IMODE(new_file.stat().st_mode)


def _commit(draft: Path, folder: Path) -> None:
    """The one step. Another process's save that came first is finished before."""
    while True:
        try:
            os.rename(draft, folder / _PENDING)
            return
        except OSError as error:
            # What stood in the way may have been finished by somebody else since.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not (folder / _PENDING).is_dir():
                raise
            finish_replacement(folder)


if sys.platform == "win32":

    @contextmanager
    def _alone(pending: Path) -> Iterator[bool]:
        """Gives True: Windows has no lock of folders, and there one process opens one at a time."""
        yield True

else:
    import fcntl

    @contextmanager
    def _alone(pending: Path) -> Iterator[bool]:
        """Waits for other processes that finish the same save; gives whether there is something left to do."""
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(pending, os.O_RDONLY)
            except FileNotFoundError:
                yield False
                return
            stack.callback(os.close, descriptor)
            # Some network file systems have no locks for folders.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                is_there = os.path.samestat(os.fstat(descriptor), pending.stat())
            except FileNotFoundError:
                is_there = False
            yield is_there


def _move(pending: Path, folder: Path) -> None:
    """Put the files in their places; every step may have been taken before."""
    files = pending / _FILES
    names = [path.relative_to(files) for path in sorted(files.rglob("*")) if path.is_file()]
    names.sort(key=lambda name: str(name) == _LAST)
    new, stale = _read_plan(pending / _PLAN)
    force_folder_to_disk(folder)
    if names:
        (folder / _LAST).unlink(missing_ok=True)
        # Looked up only now: another save may have come between.
        for old in {path for pattern in stale for path in folder.glob(pattern)}:
            if old.name not in new and (old.is_symlink() or old.is_file()):
                old.unlink(missing_ok=True)
    for name in names:
        if str(name) == _LAST:
            # What is on the disk of the folder is then all of the new files but this one.
            force_folder_to_disk(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(files / name, folder / name)
    force_folder_to_disk(folder)
    # Taken away whole: half of it would be taken for a damaged save.
    done = make_draft(pending)
    os.rename(pending, done / _PENDING)
    shutil.rmtree(done, ignore_errors=True)


def _read_plan(plan: Path) -> tuple[list[str], list[str]]:
    """The files that the save brings, and patterns of those that it takes away."""
    try:
        content = json.loads(plan.read_text(encoding="utf-8"))
        new, stale = content["new"], content["stale"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{plan}: is damaged, so the save cannot be finished ({error})") from error
    if not _are_texts(new):
        raise CheckpointError(f"{plan}: 'new' is {show(new)}; expected names of files")
    # Wherever a plan may come from: only files in the folder itself.
    if not _are_texts(stale) or any(Path(pattern).name != pattern or "**" in pattern for pattern in stale):
        raise CheckpointError(f"{plan}: 'stale' is {show(stale)}; expected patterns of names in the folder")
    return new, stale


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
