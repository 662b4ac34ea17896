"""Runs under interchanges against plain full forwards with hooks."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.alignment import AlignmentError, Counterfactuals, Site, runs
from hooklens.alignment.runs import InterchangeRuns, check_data, margin_of
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, D_VOCAB, make_model, random_tokens

LENGTH = 5
model_of = functools.cache(make_model)
SITES = [
    ("hook_embed", None), ("blocks.0.hook_resid_pre", None), ("blocks.1.hook_resid_pre", None),
    ("blocks.1.hook_resid_post", None), ("blocks.0.hook_attn_out", None), ("blocks.1.hook_mlp_out", None),
    ("blocks.0.attn.hook_z", 1), ("blocks.1.attn.hook_k", 0), ("blocks.1.mlp.hook_post", None),
    ("ln_final.hook_normalized", None),
]  # fmt: skip


def make_data(n=6, variables=("a",), *, pos=-1, seed=0) -> Counterfactuals:
    tokens = random_tokens(n * (1 + len(variables)), LENGTH, seed=seed).split(n)
    labels = random_tokens(1, n, seed=seed + 9)[0]
    return Counterfactuals(
        base=tokens[0], sources=dict(zip(variables, tokens[1:], strict=True)), labels=labels, pos=pos
    )


def make_bases(variables, d, seed=0):
    drawn = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.linalg.qr(drawn).Q.T
    return {name: (rows[2 * place : 2 * place + 2], None) for place, name in enumerate(variables)}


def run_whole(model, data, name, positions, head, bases):
    """Full forwards of every prompt, with a function that writes coordinate by coordinate."""

    def read(tokens):
        return model.run_with_cache(tokens, names_filter=name)[1][name]

    sources = {variable: read(tokens) for variable, tokens in data.sources.items()}

    def write(tensor, hook):
        new = tensor.clone()
        for row in range(len(tensor)):
            for position in positions:
                at = (row, position) if head is None else (row, position, head)
                for variable, source in sources.items():
                    if bases is None:
                        new[at] = source[at]
                        continue
                    for direction in bases[variable][0]:
                        new[at] = new[at] + direction * (direction @ (source[at] - tensor[at]))
        return new

    return model.run_with_hooks(data.base, fwd_hooks=[(name, write)])[:, data.pos]


@settings(max_examples=40)
@given(
    network=st.sampled_from([name for name in CONFIGS if "encoder" not in name]),
    site=st.sampled_from(SITES),
    pos=st.sampled_from([None, -1, 0, [1, 3], slice(1, 4)]),
    read_at=st.sampled_from([-1, 2]),
    variables=st.sampled_from([("a",), ("a", "b")]),
    whole=st.booleans(),
    batch_size=st.sampled_from(["auto", 1, 4]),
)
def test_an_interchange_is_that_of_whole_runs(network, site, pos, read_at, variables, whole, batch_size):
    model = model_of(network)
    name, head = site
    if name not in model.hook_points() or not model.cfg.causal:
        return
    variables = variables[:1] if whole else variables
    data = make_data(variables=variables, pos=read_at)
    made = InterchangeRuns(model, data, Site(name, pos, head), batch_size=batch_size)
    d = made.batch([0]).sources["a"].shape[-1]
    bases = None if whole else make_bases(variables, d)
    positions = torch.arange(LENGTH)[pos if pos is not None else slice(None)].reshape(-1).tolist()
    with torch.no_grad():
        expected = run_whole(model, data, name, positions, head, bases)
        found = torch.cat([made.logits(made.batch(rows), bases) for rows in made.groups(range(len(data)))])
    # 1e-10: sums of other orders in float64.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made.margins(bases), margin_of(expected, data.labels), rtol=1e-10, atol=1e-10)


def test_only_blocks_and_positions_from_the_site_on_run():
    model, data = make_model("rotary"), make_data()
    made = InterchangeRuns(model, data, Site("blocks.1.hook_resid_pre", -1))
    batch = made.batch(range(len(data)))
    ran = []
    watch = [
        (f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: ran.append((hook.name, tensor.shape[1])))
        for layer in (0, 1)
    ]
    with model.hooks(watch):
        made.logits(batch, make_bases(["a"], 12))
    assert ran == [("blocks.1.hook_resid_pre", 1)]


def test_what_does_not_fit_into_memory_is_made_anew(monkeypatch):
    model, data = make_model("rotary"), make_data()
    site = Site("blocks.1.hook_resid_pre", -1)
    bases = make_bases(["a"], 12)
    kept = InterchangeRuns(model, data, site)
    kept_margins = kept.margins(bases)
    assert kept._kept is not None
    monkeypatch.setattr(runs, "assume_free_bytes", lambda device: 1000)
    anew = InterchangeRuns(model, data, site, batch_size=2)
    torch.testing.assert_close(anew.margins(bases), kept_margins, rtol=1e-10, atol=1e-10)
    assert anew._kept is None


def test_gradients_reach_the_basis_and_no_weight():
    model, data = make_model("rotary"), make_data()
    made = InterchangeRuns(model, data, Site("blocks.0.hook_resid_pre", -1))
    batch, rows = made.batch(range(len(data))), make_bases(["a"], 12)["a"][0].requires_grad_()
    loss = torch.nn.functional.cross_entropy(made.logits(batch, {"a": (rows, None)}), batch.labels)
    [gradient] = torch.autograd.grad(loss, [rows])
    step = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(scale):
        basis = {"a": (torch.linalg.qr((rows + scale * step).detach().T).Q.T, None)}
        return float(torch.nn.functional.cross_entropy(made.logits(batch, basis), batch.labels))

    # Along the change that an orthonormalised step makes, to first order; QR may turn rows' signs, which do not count.
    turned = [torch.linalg.qr((rows + scale * step).detach().T).Q.T for scale in (1e-5, -1e-5)]
    signs = [(one * rows.detach()).sum(1, keepdim=True).sign() for one in turned]
    along = (turned[0] * signs[0] - turned[1] * signs[1]) / 2e-5
    with torch.no_grad():
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
    # 1e-5: central differences are exact to the square of the step, and round at 1e-16 / 1e-5.
    assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-5)
    assert all(weight.grad is None for weight in model.parameters())


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_the_margin_is_above_0_where_the_label_comes_first(seed):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
    margins = margin_of(logits, labels)
    assert torch.equal(margins > 0, logits.argmax(-1) == labels)
    for row, label in enumerate(labels.tolist()):
        others = [float(one) for place, one in enumerate(logits[row]) if place != label]
        assert float(margins[row]) == float(logits[row, label]) - max(others)


def test_data_that_the_model_cannot_run_are_refused():
    model, data = make_model("rotary"), make_data()
    with unchecked(), pytest.raises(AlignmentError, match=r"x: data is 3, expected alignment.Counterfactuals"):
        check_data(model, 3, what="x")
    wrong = Counterfactuals(base=data.base + D_VOCAB, sources=data.sources, labels=data.labels - D_VOCAB)
    with pytest.raises(AlignmentError, match=rf"base go from .* and there are {D_VOCAB}; labels go from -"):
        check_data(model, wrong, what="x")
    long = random_tokens(2, 40)
    with pytest.raises(AlignmentError, match="prompts have 40 tokens, and the model takes 32"):
        check_data(model, Counterfactuals(base=long, sources={"a": long}, labels=long[:, 0]), what="x")
    handle = model.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: None)
    with pytest.raises(InputError, match="hooks are attached"):
        check_data(model, data, what="x")
    handle.remove()
