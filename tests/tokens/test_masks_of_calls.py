"""Calls, generation, patching and evaluation take the same ids for tokens, and no row depends on its neighbours."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM, evaluation, patching
from hooklens.errors import HookLensError, InputError, PaddingWarning, UnknownTokenWarning
from tests.annotations import unchecked
from tests.checkpoints import save_variant
from tests.tokens.test_inputs import FORMS, REFUSED
from tests.tokens.tokenizers import KINDS, WITHOUT_DEDICATED_PAD

BATCHES = st.integers(2, 5).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 8), min_size=width, max_size=width), min_size=1, max_size=3)
)
METRIC = patching.LogitDiff(5, 6, pos=-1)
# Single rows and batches multiply in another order: a few float32 roundings (1e-7) of logits of size 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ignores_likely_padding = pytest.mark.filterwarnings("ignore::hooklens.errors.PaddingWarning")


@cache
def models(kind):
    """A checkpoint saved with a tokenizer: ours and transformers'."""
    with TemporaryDirectory() as name:
        folder = save_variant("neox-parallel", Path(name))
        KINDS[kind].save_pretrained(folder)
        ours = HookedCausalLM.from_pretrained(folder)
        return ours, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


def strip(row):
    """A row without the runs of id 0 at its ends."""
    real = [index for index, token in enumerate(row) if token]
    return row[real[0] : real[-1] + 1]


@torch.no_grad()
def reference(model, row):
    return model(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits[0]


@ignores_likely_padding
class TestRows:
    @settings(max_examples=60)
    @given(rows=BATCHES, kind=st.sampled_from(sorted(WITHOUT_DEDICATED_PAD)))
    @torch.no_grad()
    def test_without_a_dedicated_pad_id_ids_run_as_transformers_runs_them(self, rows, kind):
        """With `[[0, 5, 6, 7, 8], [9, ...]]` and 0 both BOS and EOS, the first row lost its BOS: 1.5 off in logits."""
        ours, theirs = models(kind)
        together = ours(torch.tensor(rows))
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits, reference(theirs, row), **CLOSE)
            torch.testing.assert_close(logits, ours(torch.tensor([row]))[0], **CLOSE)

    @settings(max_examples=40)
    @given(rows=BATCHES)
    @torch.no_grad()
    def test_with_one_each_row_runs_as_without_its_padding(self, rows):
        rows = [row if any(row) else [4] * len(row) for row in rows]
        ours, theirs = models("dedicated pad")
        logits = ours(torch.tensor(rows), logits_at=-1)[:, 0]
        for row, last in zip(rows, logits, strict=True):
            torch.testing.assert_close(last, reference(theirs, strip(row))[-1], **CLOSE)

    @settings(max_examples=40)
    @given(rows=BATCHES, kind=st.sampled_from(sorted(KINDS)))
    @torch.no_grad()
    def test_everything_agrees_with_a_call(self, rows, kind):
        """`generate` dropped the first token, and a sweep ran what a call hid."""
        rows = [row if any(row) else [4] * len(row) for row in rows]
        ours, _ = models(kind)
        ids = torch.tensor(rows)
        last = ours(ids, logits_at=-1)[:, 0]
        real = [strip(row) if kind == "dedicated pad" else row for row in rows]

        made = ours.generate(
            ids, max_new_tokens=1, do_sample=False, stop_at_eos=False, return_type="output", verbose=False
        )
        assert made.prompt_lengths == [len(row) for row in real]
        assert [new.tolist() for new in made.new_tokens] == last.argmax(-1)[:, None].tolist()

        swept = patching.sweep(ours, ids, ids, patching.grid("z", layers=[0]), METRIC, progress=False)
        torch.testing.assert_close(swept.clean_per_pair, last[:, 5] - last[:, 6], **CLOSE)

        kv = ours.prefill(ids)
        torch.testing.assert_close(kv.last_logits, last, **CLOSE)

        for row, logits in zip(rows, last, strict=True):
            table = evaluation.score_continuations(ours, row, [[5], [6]], progress=False)
            difference = table["logprob"][0] - table["logprob"][1]
            assert difference == pytest.approx(float(logits[5] - logits[6]), abs=1e-4)

    def test_numbers_of_ids_that_begin_with_a_token_that_is_bos_and_eos(self):
        ours, theirs = models("BOS is EOS, no pad")
        rows = [[2, 5, 6, 7, 8], [3, 4, 5, 6, 7]]
        ids = torch.tensor(rows)
        with torch.no_grad():
            expected = torch.stack([reference(theirs, row) for row in rows])
            torch.testing.assert_close(ours(ids), expected, **CLOSE)
        made = ours.generate(ids, max_new_tokens=1, do_sample=False, verbose=False)
        assert made[:, :5].tolist() == rows
        assert patching.sweep(ours, ids, ids.flip(0), "resid_pre", METRIC, progress=False).values.isfinite().all()


class TestPatchingFunctions:
    def run(self, kind, rows, clean):
        ours, _ = models(kind)
        ids = torch.tensor(rows)
        clean_cache = ours.run_with_cache(torch.tensor(clean))[1]
        metric = patching.LogitDiff(5, 6, pos=2)
        return ours, ids, clean_cache, metric

    @pytest.mark.parametrize("kind", sorted(KINDS))
    @ignores_likely_padding
    def test_agree_with_hooks_on_a_call(self, kind):
        """They ran padding as tokens, which a call hides."""
        ours, ids, clean, metric = self.run(
            kind, [[4, 5, 6, 0, 0], [7, 8, 4, 5, 6]], [[4, 7, 6, 0, 0], [7, 4, 4, 5, 6]]
        )

        def measure(logits):
            return (logits[:, 2, 5] - logits[:, 2, 6]).mean()

        heads = patching.get_act_patch_attn_head_out_all_pos(ours, ids, clean, metric)
        positions = patching.generic_activation_patch(
            ours, ids, clean, measure, set_position, "resid_pre", index_axis_names=("layer", "pos")
        )
        for layer, entry in ((0, 1), (1, 1), (2, 2)):

            def put_head(tensor, hook, entry=entry, value=clean["z", layer]):
                tensor[:, :, entry] = value[:, :, entry]
                return tensor

            def put_position(tensor, hook, entry=entry, value=clean["resid_pre", layer]):
                tensor[:, entry] = value[:, entry]
                return tensor

            for name, put, found in (("attn.hook_z", put_head, heads), ("hook_resid_pre", put_position, positions)):
                with torch.no_grad():
                    logits = ours.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.{name}", put)])
                torch.testing.assert_close(found[layer, entry], measure(logits), **CLOSE)

    def test_refuse_padding_on_the_left(self):
        """Columns of the cache would be put at other positions."""
        ours, ids, clean, metric = self.run("dedicated pad", [[0, 4, 5], [4, 5, 6]], [[0, 4, 7], [4, 5, 6]])
        with pytest.raises(
            InputError, match=r"padded on the left: columns are no positions; pad both prompts on the right"
        ):
            patching.get_act_patch_resid_pre(ours, ids, clean, metric)

    def test_a_row_without_a_token_is_refused(self):
        ours, ids, *_ = self.run("BOS only", [[4, 5], [6, 7]], [[4, 5]])
        mask = torch.tensor([[1, 1], [0, 0]])
        with pytest.raises(InputError, match=r"attention_mask hides every token of rows \[1\]"):
            patching.sweep(ours, ids, ids, "resid_pre", METRIC, attention_mask=mask, progress=False)


def set_position(corrupted, index, clean):
    _, pos = index
    corrupted[:, pos] = clean[:, pos]
    return corrupted


class TestPadding:
    def test_text_without_any_pad_token_runs_as_its_prompts_alone(self):
        ours, _ = models("BOS only")
        texts = ["the cat sat on", "the"]
        with torch.no_grad():
            for side in ("left", "right"):
                together = ours(texts, padding_side=side, logits_at=-1)
                ids, mask = ours.to_tokens(texts, padding_side=side, return_attention_mask=True)
                torch.testing.assert_close(ours(ids, attention_mask=mask, logits_at=-1), together, rtol=0, atol=0)
                for row, text in enumerate(texts):
                    torch.testing.assert_close(together[row], ours(text, logits_at=-1)[0], **CLOSE)

    def test_to_tokens_gives_the_mask_on_the_models_device(self):
        ours, _ = models("pad is EOS")
        ids, mask = ours.to_tokens(["the cat", "the"], padding_side="right", return_attention_mask=True)
        assert ids.tolist() == [[1, 4, 5, 2], [1, 4, 2, 2]]
        assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        assert mask.dtype == torch.int64
        assert mask.device == ids.device == ours.device
        assert torch.equal(ours.to_tokens(["the cat", "the"], padding_side="right"), ids)

    @pytest.mark.parametrize(
        "call",
        [
            lambda model, ids: model(ids),
            lambda model, ids: model.prefill(ids),
            lambda model, ids: model.generate(ids, max_new_tokens=1, verbose=False),
            lambda model, ids: patching.sweep(model, ids, ids, "resid_pre", METRIC, progress=False),
        ],
        ids=["call", "prefill", "generate", "sweep"],
    )
    def test_what_looks_padded_is_warned_of_at_the_callers_line(self, call):
        ours, _ = models("pad is EOS")
        with pytest.warns(PaddingWarning, match=r"rows \[0\] .* begin with several '</s>'") as record:
            call(ours, torch.tensor([[2, 2, 5], [4, 5, 6]]))
        assert {warning.filename for warning in record} == {__file__}

    def test_padding_beyond_the_vocabulary_runs(self):
        ours, _ = models("dedicated pad")
        extended = HookedCausalLM.from_state_dict(dict(ours.named_weights()), ours.cfg, tokenizer=None)
        extended.tokenizer = BeyondVocabulary()
        ids = torch.tensor([[4, 5, 6], [4, 5, 97]])
        with torch.no_grad():
            last = extended(ids, logits_at=-1)
            torch.testing.assert_close(last[1], extended(torch.tensor([[4, 5]]), logits_at=-1)[0], **CLOSE)
        made = extended.generate(ids, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
        assert made[1, :2].tolist() == [4, 5]
        assert int(made.max()) < 97


class BeyondVocabulary:
    """Its pad token was added after the model was made."""

    pad_token_id, bos_token_id, eos_token_id, unk_token_id = 97, None, None, None

    def __call__(self, text, **options):
        raise AssertionError("no text in this test")

    def __len__(self):
        return 98

    def decode(self, token_ids, **options):
        return str(token_ids)


CALLS = {
    "call": lambda model, given: model(given),
    "cache": lambda model, given: model.run_with_cache(given, names_filter="hook_embed")[0],
    "prefill": lambda model, given: model.prefill(given).last_logits,
    "generate": lambda model, given: model.generate(
        given, max_new_tokens=2, do_sample=False, verbose=False, return_type="tokens"
    ),
    "sweep": lambda model, given: (
        patching.sweep(model, given, given, "resid_pre", METRIC, progress=False).clean_per_pair
    ),
}


class TestInputs:
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("form", FORMS)
    def test_ids_in_every_form_run_as_the_tensor(self, call, form):
        ours, _ = models("BOS only")
        expected = CALLS[call](ours, torch.tensor([[4, 5, 6], [6, 5, 4]]))
        assert torch.equal(CALLS[call](ours, FORMS[form]), expected)

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("kind", REFUSED)
    def test_everything_else_is_refused(self, call, kind):
        ours, _ = models("BOS only")
        with unchecked(), pytest.raises(HookLensError):
            CALLS[call](ours, REFUSED[kind][0])

    def test_an_encoding_is_told_from_text(self):
        """Its keys ran as two prompts, "input_ids" and "attention_mask"."""
        ours, _ = models("BOS only")
        encoding = KINDS["BOS only"](["the cat"])
        text = r'is a BatchEncoding .*pass its ids and its mask: encoding\["input_ids"\], attention_mask=encoding'
        with unchecked(), pytest.raises(InputError, match=text):
            ours(encoding)
        with unchecked(), torch.no_grad():
            found = ours(encoding["input_ids"], attention_mask=encoding["attention_mask"])
        assert torch.equal(found, ours("the cat"))

    @pytest.mark.parametrize(("form", "kind"), [([4, 5], str), (np.array([[4, 5]]), str), ([[4, 5], [5, 6]], list)])
    def test_generate_gives_text_of_ids_where_it_is_asked_to(self, form, kind):
        ours, _ = models("BOS only")
        options = {"max_new_tokens": 1, "do_sample": False, "verbose": False, "eos_token_id": 96}
        assert isinstance(ours.generate(form, **options), torch.Tensor)
        assert isinstance(ours.generate(form, return_type="str", **options), kind)

    def test_unknown_words_are_warned_of_at_the_callers_line(self):
        ours, _ = models("dedicated pad")
        with pytest.warns(UnknownTokenWarning, match="lacks 'zebra'") as record:
            ours("the zebra")
        assert [warning.filename for warning in record] == [__file__]
        with pytest.raises(InputError, match="'zebra' is not in the tokenizer's vocabulary"):
            ours.to_single_token("zebra")
        with pytest.raises(InputError, match="'zebra' is not in the tokenizer's vocabulary"):
            ours.get_token_position("zebra", "the <unk>")

    def test_a_bundled_model_refuses_a_name_that_it_lacks(self):
        model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
        with pytest.raises(InputError, match="' Lisa' is not in the tokenizer's vocabulary"):
            model.to_single_token(" Lisa")
        ids = model.to_tokens("Mary went")
        with pytest.raises(InputError, match="' Lisa' is not in the tokenizer's vocabulary"):
            patching.sweep(model, ids, ids, "resid_pre", patching.LogitDiff(" Lisa", " Mary"), progress=False)

    def test_directions_of_tokens(self):
        """Negative ids gave other tokens' directions."""
        ours, _ = models("dedicated pad")
        assert torch.equal(
            ours.tokens_to_residual_directions(torch.tensor([[4]], dtype=torch.int32))[0, 0], ours.W_U[:, 4]
        )
        for wrong, text in ((-1, "outside the vocabulary: -1"), (97, "outside the vocabulary: 97")):
            with pytest.raises(InputError, match=text):
                ours.tokens_to_residual_directions(wrong)
        with (
            unchecked(),
            pytest.raises(InputError, match=r"^tokens is 2.0, expected a text of one token, or token ids"),
        ):
            ours.tokens_to_residual_directions(2.0)

    def test_text_longer_than_the_context_is_cut_or_refused_as_asked(self):
        """Both ways, so that an argument that is ignored or turned round shows."""
        ours, _ = models("dedicated pad")
        long = "the " * 65
        for keywords in ({}, {"truncate": True}):
            with pytest.warns(UserWarning, match="to_tokens cut 1 tokens") as record:
                ids = ours.to_tokens(long, **keywords)
            assert ids.shape == (1, 64)
            assert [warning.filename for warning in record] == [__file__]
        with pytest.raises(InputError, match="longer than n_ctx=64 tokens"):
            ours.to_tokens(long, truncate=False)
        with pytest.raises(InputError, match="longer than n_ctx=64 tokens"):
            ours(long)
