import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import hooklens as hl
from hooklens.datasets import ActivationDataset, folder, record
from hooklens.errors import CheckpointError, HookNameError, InputError
from hooklens.hooks import edits
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

MODEL = make_model("grouped")
SITES = ["resid_post", "z", "hook_embed"]
NAMES = [
    "hook_embed",
    *(f"blocks.{layer}.{word}" for layer in (0, 1) for word in ("attn.hook_z", "hook_resid_post")),
]
# float64 rounding through two layers.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def make_documents(n=23, longest=19):
    """Rows of ids of other lengths than each other."""
    rows = random_tokens(n, longest, seed=4)
    return [row[: 1 + (7 * number) % longest].tolist() for number, row in enumerate(rows)]


def record_small(folder, documents=None, **options):
    options = {"batch_tokens": 40, "row_length": 16, "shard_bytes": 4000, "progress": False, **options}
    return record(MODEL, make_documents() if documents is None else documents, SITES, folder, **options)


def contents_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "recording.lock"}


@pytest.mark.parametrize("edit", [(), (edits.Scale("blocks.0.hook_mlp_out", 0.5),)])
def test_every_token_has_what_it_has_when_its_document_runs_alone(tmp_path, edit):
    documents = make_documents()
    found = record_small(tmp_path / "set", documents, edits=edit)
    assert sorted(found.sites) == sorted(NAMES)
    assert len(found.manifest.shards) > 2, "no token stood in another file"
    assert found.is_complete
    assert found.tokens().tolist() == [token for document in documents for token in document]
    start = 0
    for number, document in enumerate(documents):
        span = slice(start, start + len(document))
        assert found.documents(span).tolist() == [number] * len(document)
        assert found.positions(span).tolist() == list(range(len(document)))
        # Rows hold 16 tokens, and pieces of longer documents do not see each other.
        for first in range(0, len(document), 16):
            piece = torch.tensor([document[first : first + 16]])
            _, cache = MODEL.run_with_cache(piece, names_filter=NAMES, edits=edit)
            for name in NAMES:
                part = found.site(name)[start + first : start + first + piece.shape[1]]
                torch.testing.assert_close(part, cache[name][0], **TOLERANCE)
        start += len(document)


def test_tokens_are_chosen_by_position_and_by_function(tmp_path):
    documents = make_documents()
    found = record_small(tmp_path / "set", documents, positions=[0, 2, -1], keep=lambda tokens: tokens % 2 == 0)
    expected = [
        (number, position, document[position])
        for number, document in enumerate(documents)
        for position in sorted({0, 2, len(document) - 1} & set(range(len(document))))
        if document[position] % 2 == 0
    ]
    assert list(zip(found.documents().tolist(), found.positions().tolist(), found.tokens().tolist(), strict=True)) == (
        expected
    )
    whole = record_small(tmp_path / "all", documents)
    of_all = {
        (document, position): index
        for index, (document, position) in enumerate(
            zip(whole.documents().tolist(), whole.positions().tolist(), strict=True)
        )
    }
    for name in NAMES:
        places = [of_all[document, position] for document, position, _ in expected]
        assert torch.equal(found.site(name)[:], whole.site(name)[places])


def test_texts_mappings_and_files_give_the_same(tmp_path):
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
    texts = ["Mary gave a drink to John .", "When Mary and John went to the store , John gave a drink to Mary ."]
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    rows = [model.to_tokens(text)[0].tolist() for text in texts]
    corpora = [texts, [{"text": text} for text in texts], lines, rows, [{"tokens": row} for row in rows]]
    found = [
        record(model, corpus, "resid_post", tmp_path / str(number), max_tokens=100, progress=False)
        for number, corpus in enumerate(corpora)
    ]
    for one in found:
        assert one.tokens().tolist() == [token for row in rows for token in row]
        assert torch.equal(one.site("blocks.1.hook_resid_post")[:], found[0].site("blocks.1.hook_resid_post")[:])


def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path):
    documents = make_documents()
    found = record_small(tmp_path / "set", documents, max_tokens=25)
    lengths = [len(document) for document in documents]
    n = next(n for n in range(len(lengths)) if sum(lengths[:n]) >= 25)
    assert len(found) == sum(lengths[:n])


@pytest.mark.parametrize("stops_after", [0, 1, 60, 130, 200])
def test_an_interrupted_recording_goes_on_and_leaves_the_same_bytes(tmp_path, stops_after):
    documents = make_documents()
    record_small(tmp_path / "whole", documents, keep=lambda tokens: tokens < 20)

    class Stops:
        def __iter__(self):
            for number, document in enumerate(documents):
                if sum(map(len, documents[:number])) >= stops_after:
                    raise KeyboardInterrupt
                yield document

    with pytest.raises(KeyboardInterrupt):
        record_small(tmp_path / "set", Stops(), keep=lambda tokens: tokens < 20)
    partial = ActivationDataset(tmp_path / "set")
    assert not partial.is_complete
    assert (len(partial.manifest.shards) > 1) == (stops_after > 100)
    record_small(tmp_path / "set", documents, keep=lambda tokens: tokens < 20)
    assert contents_of(tmp_path / "set") == contents_of(tmp_path / "whole")


def test_a_killed_recording_goes_on_and_leaves_the_same_bytes(tmp_path):
    """SIGKILL while shards are written, whatever the writer is at."""
    code = textwrap.dedent(
        """
        import os, sys, threading
        from pathlib import Path
        from tests.datasets.test_recording import make_documents, record_small

        folder = Path(sys.argv[1])

        class Killed:
            def __iter__(self):
                for document in make_documents():
                    if (folder / "shard-00001.safetensors").exists():
                        os.kill(os.getpid(), 9)
                    yield document

        record_small(folder, Killed())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    record_small(tmp_path / "set")
    record_small(tmp_path / "whole")
    assert contents_of(tmp_path / "set") == contents_of(tmp_path / "whole")


def test_a_complete_recording_runs_nothing_again(tmp_path):
    record_small(tmp_path / "set")
    before = contents_of(tmp_path / "set")

    class Unread:
        def __iter__(self):
            raise AssertionError("the corpus was read")

    assert record_small(tmp_path / "set", Unread()).is_complete
    assert contents_of(tmp_path / "set") == before


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    write = folder.write_safetensors

    def fail_at_third(path, tensors):
        if path.name == "shard-00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_safetensors", fail_at_third)
        with pytest.raises(CheckpointError) as told:
            record_small(tmp_path / "set")
    assert "No space left on device; 2 shards with" in str(told.value)
    assert len(ActivationDataset(tmp_path / "set").manifest.shards) == 2
    record_small(tmp_path / "set")
    record_small(tmp_path / "whole")
    assert contents_of(tmp_path / "set") == contents_of(tmp_path / "whole")


def interrupt(folder, **options):
    """A recording that is not complete."""

    class Stops:
        def __iter__(self):
            yield from make_documents()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_small(folder, Stops(), **options)


def test_another_recording_is_not_gone_on_with(tmp_path):
    interrupt(tmp_path / "set")
    changed = make_documents()
    changed[1] = [5, 5, 5]
    with pytest.raises(CheckpointError, match="is no longer the same up to there"):
        record_small(tmp_path / "set", changed)
    with pytest.raises(CheckpointError, match="is no longer the same up to there"):
        record_small(tmp_path / "set", positions=[0])
    with pytest.raises(CheckpointError, match=r"another recording: batch_tokens is 40 there and 41 here"):
        record_small(tmp_path / "set", batch_tokens=41)
    other = make_model("grouped", seed=1)
    with pytest.raises(CheckpointError, match="another recording: model is"):
        record(other, make_documents(), SITES, tmp_path / "set", batch_tokens=40, row_length=16, shard_bytes=4000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is no activation data set, and it holds \['notes.txt'\]"):
        record_small(tmp_path / "full")


def test_two_do_not_write_at_the_same_time(tmp_path):
    class Nested:
        def __iter__(self):
            with pytest.raises(CheckpointError, match="another process is recording into"):
                record_small(tmp_path / "set")
            yield from make_documents()

    record_small(tmp_path / "set", Nested())


def test_what_a_site_cannot_be_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"record: sites: 'blocks.0.attn.hook_pattern' \(axes"):
        record(MODEL, make_documents(), ["pattern"], tmp_path / "set")
    with pytest.raises(HookNameError, match="resid_pots"):
        record(MODEL, make_documents(), ["resid_pots"], tmp_path / "set")
    with pytest.raises(InputError, match=r"dtype is torch\.int8"):
        record(MODEL, make_documents(), SITES, tmp_path / "set", dtype=torch.int8)
    with pytest.raises(InputError, match="row_length"):
        record(MODEL, make_documents(), SITES, tmp_path / "set", row_length=1000)
    with pytest.raises(InputError, match="functions act on the model: Custom"):
        record(
            MODEL, make_documents(), SITES, tmp_path / "set", edits=[edits.Custom("hook_embed", lambda tensor: tensor)]
        )
    assert not (tmp_path / "set").exists()
    with unchecked(), pytest.raises(InputError, match=r"keep gave .* for document 0; expected \[1\] booleans"):
        record_small(tmp_path / "set", keep=lambda tokens: tokens)


@pytest.mark.parametrize(
    ("corpus", "text"),
    [
        ("a text of its own", "one text or another kind of file"),
        ("missing.jsonl", "there is no file missing.jsonl"),
        (iter([[1, 2]]), "gives its documents once"),
        ([[1, 99]], "document 0 is"),
        ([[1], {"words": "x"}], r"document 1 has the keys \['words'\]; expected 'text'"),
        ([1.5, 2.5], "document 0 is 1.5"),
        (7, "corpus is 7"),
    ],
)
def test_corpora_that_are_none(tmp_path, corpus, text):
    with unchecked(), pytest.raises(InputError, match=text):
        record_small(tmp_path / "set", corpus)


def test_dtypes(tmp_path):
    found, whole = record_small(tmp_path / "half", dtype=torch.bfloat16), record_small(tmp_path / "set")
    assert found.site(NAMES[0])[:].dtype == torch.bfloat16
    assert torch.equal(found.site(NAMES[1])[:], whole.site(NAMES[1])[:].bfloat16())


def test_blocks_above_the_last_site_do_not_run(tmp_path):
    ran = []
    hooked = [(f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: ran.append(hook.name)) for layer in (0, 1)]
    model = make_model("grouped")
    for name, fn in hooked:
        model.blocks[int(name.split(".")[1])].register_forward_pre_hook(lambda *args, name=name: ran.append(name))
        assert fn is not None
    with pytest.raises(InputError, match="a hook of torch at"):
        record(model, make_documents(), "blocks.0.hook_resid_post", tmp_path / "set", progress=False)


def test_dropout_in_training_is_refused(tmp_path):
    """A recording that went on would have held activations of other draws."""
    model = make_model(make_config(resid_dropout=0.1)).train()
    with pytest.raises(InputError, match="training mode with dropout"):
        record(model, make_documents(), SITES, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    assert len(record(model.eval(), make_documents(), "resid_post", tmp_path / "set", progress=False))
