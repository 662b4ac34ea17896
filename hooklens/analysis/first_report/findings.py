"""The findings of a report: each runs one call of the package, and says what stands out in its table."""

from typing import TYPE_CHECKING, Any

from hooklens.analysis.attribution import attribute_to_components, attribute_to_heads
from hooklens.analysis.first_report.page import Finding
from hooklens.analysis.first_report.question import Question
from hooklens.analysis.heads import head_scores
from hooklens.analysis.lens.table import logit_lens
from hooklens.analysis.sources import attribute_to_sources
from hooklens.analysis.tokens_of_logits import logits_to_frame
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

KNOWN = 0.5
"""A head whose score for a kind is this or more is named as one of that kind: most of its attention goes there."""

_REST = ["remainder", "bias"]
_MOST_SHOWN = 12
_MOST_NAMED = 6


def find_predictions(question: Question, k: int) -> Finding:
    """The likeliest next tokens."""
    table = logits_to_frame(question.logits, question.model.tokenizer, k=k)
    first = table.iloc[0]
    second = f", then {question.name(int(table.token[1]))} at {_p(table.probability[1])}" if len(table) > 1 else ""
    return Finding(
        name="predictions",
        title="What comes next?",
        sentences=(f"{question.name(int(first.token))} with probability {_p(first.probability)}{second}.",),
        code=f"analysis.logits_to_frame(logits, model.tokenizer, k={k})",
        table=table,
        shown=table if "text" not in table else table.assign(text=[repr(text) for text in table.text]),
        brief=_first(table, 3),
        bars=("probability",),
    )


def find_layers(question: Question, k: int) -> Finding:
    """Where in the layers the prediction is made up."""
    table = logit_lens(
        question.model,
        question.cache,
        k=k,
        pos_slice=question.pos,
        target=question.answer,
        transport=question.transport,
    )
    through = "" if question.transport is None else ", transport=transport"
    shown = table[["stream", "kl", "target_rank", "target_logprob"]].assign(
        top=[_list_tops(*pair) for pair in zip(table.top_tokens, table.top_probs, strict=True)]
    )
    sentences = [_tell_rank(question, table)]
    if len(table) > 1:
        falls = table.kl.diff().iloc[1:]
        place = int(falls.to_numpy().argmin()) + 1
        above, below = table.iloc[place], table.iloc[place - 1]
        sentences.append(
            f"The largest step towards the end is from {below.stream} to {above.stream}: KL {below.kl:.2f} to "
            f"{above.kl:.2f} nats."
        )
    return Finding(
        name="lens",
        title="In which layers is it made up? (logit lens)",
        sentences=tuple(sentences),
        code=f"analysis.lens.logit_lens(model, cache, k={k}, target=answer{question.at('pos_slice')}{through})",
        table=table,
        shown=shown,
        brief=_spread(len(table), 5),
        bars=("kl",),
    )


def _tell_rank(question: Question, table: "pandas.DataFrame") -> str:
    """From which stream on the answer is the likeliest token."""
    ranks, answer = table.target_rank.tolist(), question.name(question.answer)
    leads = next((place for place in range(len(ranks)) if not any(ranks[place:])), None)
    if leads is None:
        return f"{answer} is not the likeliest token at the end either (rank {ranks[-1]}, 0 is the likeliest)."
    if leads == 0:
        return f"{answer} is the likeliest token in all streams."
    before = table.iloc[leads - 1]
    token = before.top_tokens[0]
    told = repr(token) if isinstance(token, str) else f"token {token}"
    where = "only at the end" if leads == len(ranks) - 1 else f"from {table.stream.iloc[leads]} on"
    return (
        f"{answer} is the likeliest token {where}; in {before.stream} it is {told} ({_p(before.top_probs[0])}), and "
        f"{answer} has rank {before.target_rank}."
    )


def find_components(question: Question) -> Finding:
    """Which layers' attention and MLPs the difference of two logits comes from."""
    table = attribute_to_components(question.model, question.cache, question.answer, question.wrong, pos=question.pos)
    shown = _largest(table[["component", "value"]])
    return Finding(
        name="components",
        title=f"Which components speak for {question.name(question.answer)}? ({question.unit})",
        sentences=(_tell_ends(table, float(table.value.sum())),),
        code=f"analysis.attribution.attribute_to_components(model, cache, answer, wrong{question.at('pos')})",
        table=table,
        shown=shown,
        brief=_first(shown, 3),
        bars=("value",),
    )


def find_heads(question: Question) -> Finding:
    """Which heads it comes from."""
    table = attribute_to_heads(question.model, question.cache, question.answer, question.wrong, pos=question.pos)
    is_head = ~table.component.isin(_REST)
    heads = table[is_head]
    columns = ["component", "value"]
    shown = import_package("pandas").concat([_largest(heads[columns]), table[~is_head][columns]], ignore_index=True)
    share = float(heads.value.sum())
    return Finding(
        name="heads",
        title=f"Which heads? ({question.unit})",
        sentences=(
            _tell_ends(heads, float(table.value.sum())),
            f"All heads together add {share:+.2f} directly; the rest is of MLPs, embeddings and biases.",
        ),
        code=f"analysis.attribution.attribute_to_heads(model, cache, answer, wrong{question.at('pos')})",
        table=table,
        shown=shown,
        brief=_first(shown, 3),
        bars=("value",),
    )


def find_sources(question: Question) -> Finding:
    """From which tokens heads take it."""
    table = attribute_to_sources(question.model, question.cache, question.answer, question.wrong, pos=question.pos)
    by_source = table.groupby(["source", "token"], sort=False, dropna=False).value.sum().reset_index()
    best = by_source.iloc[int(by_source.value.abs().to_numpy().argmax())]
    pair = table.iloc[int(table.value.abs().to_numpy().argmax())]
    shown = _largest(table[["component", "source", "token", "value"]])
    return Finding(
        name="sources",
        title=f"From which tokens do heads take it? ({question.unit})",
        sentences=(
            f"Through all heads, {_show(best.token)} at position {best.source} counts most: {best.value:+.2f}.",
            f"The strongest pair is {pair.component} reading {_show(pair.token)} at position {pair.source}: "
            f"{pair.value:+.2f}.",
        ),
        code=f"analysis.sources.attribute_to_sources(model, cache, answer, wrong{question.at('pos')})",
        table=table,
        shown=shown.assign(token=[_show(token) for token in shown.token]),
        brief=_first(shown, 3),
        bars=("value",),
    )


def find_kinds(question: Question, heads: Finding | None) -> Finding:
    """Which heads are of a known kind, on repeated random tokens, and which of them count in this prompt."""
    table = head_scores(question.model)
    kinds = ["previous_token", "duplicate_token", "induction"]
    scores = table[kinds]
    named = {kind: scores[kind][scores[kind] >= KNOWN].sort_values(ascending=False) for kind in kinds}
    told = [f"{kind.replace('_', '-')} {_list_heads(found)}" for kind, found in named.items() if len(found)]
    best = scores.max(axis=1)
    sentence = (
        f"On repeated random tokens: {'; '.join(told)}."
        if told
        else f"On repeated random tokens no head scores {KNOWN} for a known kind; the highest is {best.idxmax()} with "
        f"{best.max():.2f}."
    )
    sentences = [sentence]
    if heads is not None and told:
        sentences.append(_tell_known(heads.table, named))
    order = best.sort_values(ascending=False).index[:_MOST_SHOWN]
    shown = scores.loc[order].rename_axis("component").reset_index()
    return Finding(
        name="kinds",
        title="Which heads are of a known kind? (share of attention)",
        sentences=tuple(sentences),
        code="analysis.heads.head_scores(model)",
        table=table,
        shown=shown,
        brief=_first(shown, 3),
        bars=tuple(kinds),
    )


def _tell_known(heads: "pandas.DataFrame", named: dict[str, Any]) -> str:
    """The heads of a known kind that add or take much here: a tenth of what the strongest head does."""
    values = heads[~heads.component.isin(_REST)].set_index("component").value
    least = values.abs().max() / 10
    found = [
        (label, kind, float(values[label]))
        for kind, scores in named.items()
        for label in scores.index
        if label in values and abs(values[label]) >= least
    ]
    if not found:
        return "None of them adds much to the difference directly."
    found.sort(key=lambda one: -abs(one[2]))
    listed = ", ".join(
        f"{label} ({kind.replace('_', '-')}, {value:+.2f})" for label, kind, value in found[:_MOST_NAMED]
    )
    return f"Of these count here, directly: {listed}."


def _tell_ends(table: "pandas.DataFrame", difference: float) -> str:
    """The largest values on both sides, beside what all of them sum to."""
    values = table.value.to_numpy()
    best, worst = table.iloc[int(values.argmax())], table.iloc[int(values.argmin())]
    against = f"; {worst.component} speaks most against it ({worst.value:+.2f})" if worst.value < 0 else ""
    return f"{best.component} speaks most for it ({best.value:+.2f} of the difference of {difference:+.2f}){against}."


def _list_heads(scores: Any) -> str:
    listed = ", ".join(f"{label} ({score:.2f})" for label, score in scores.head(_MOST_NAMED).items())
    return listed + (f" and {len(scores) - _MOST_NAMED} more" if len(scores) > _MOST_NAMED else "")


def _list_tops(tokens: tuple[str | int, ...], probabilities: tuple[float, ...]) -> str:
    return ", ".join(f"{_show(token)} {_p(p)}" for token, p in zip(tokens, probabilities, strict=True))


def _show(token: object) -> str:
    return repr(token) if isinstance(token, str) else f"token {token}"


def _largest(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """The lines with the largest values, whatever their sign."""
    return table.sort_values("value", key=abs, ascending=False).head(_MOST_SHOWN).reset_index(drop=True)


def _first(table: "pandas.DataFrame", n: int) -> tuple[int, ...]:
    return tuple(range(min(n, len(table))))


def _spread(n: int, most: int) -> tuple[int, ...]:
    """Places from the first to the last, evenly."""
    if n <= most:
        return tuple(range(n))
    return tuple(sorted({round(place * (n - 1) / (most - 1)) for place in range(most)}))


def _p(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.0e}"
