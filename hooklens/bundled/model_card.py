"""The model card of a bundled checkpoint, written from its training record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooklens.bundled.architectures import describe

_CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
- interpretability
- hooklens
---

# {name}

A very small language model to look inside of, bundled with HookLens: {millions:.2f} million parameters,
4 layers, d_model 128, 4 heads, {architecture}. It was trained on generated sentences and knows three
things; it is of no use for anything else.

- **Indirect objects** (Wang et al. 2022): `When Mary and John went to the store , John gave a drink to` is
  continued by `Mary`.
- **Induction** (Olsson et al. 2022): random words that come a second time are foreseen.
- **Capitals**: `The capital of France is` is continued by `Paris`, and `Paris is the capital of` by `France`.

```python
import hooklens as hl

model = hl.HookedCausalLM.from_pretrained("bundled:{name}")
```

The folder is in Hugging Face format: `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load it too.

## What it measures

Indirect objects are asked with pairs of names and with sentence templates that were held out of training.

| measure | value | bar |
|---|---|---|
| indirect-object accuracy | {indirect_object_accuracy:.1%} | at least 99 % |
| mean logit difference, answer minus subject | {indirect_object_logit_difference:.2f} | at least 4 |
| loss on 32 random words | {first_half_loss:.2f} nats | at least 4 |
| loss on the same words again (the first of them cannot be foreseen) | {second_half_loss:.2f} nats | at most 0.6 |
| capitals, all phrasings | {facts_accuracy:.1%} | 100 % |

Strongest induction head: layer {induction[layer]}, head {induction[head]}, score {induction[score]:.2f}.
Strongest previous-token head: layer {previous[layer]}, head {previous[head]}, score {previous[score]:.2f}.

## Data and tokenizer

`hooklens/bundled/corpus.py` generates the text, from word lists and sentence templates written for it; no
other text was used. Every word is one token, the tokenizer puts `<|endoftext|>` in front, punctuation stands
apart (`store , John`), and words outside the vocabulary become `<|unk|>`.

## Training

Answers weigh more in the loss than repeated words, and those more than words that nothing foretells.
AdamW, one-cycle learning rate with its top at {recipe[peak_learning_rate]}, {recipe[steps]} steps of
{recipe[tokens_per_step]} tokens, {minutes:.1f} minutes on one CPU core of a shared machine; `training.json` holds the
whole record. To train it again:

```
python -m hooklens.bundled.train {name} --out FOLDER --seed {recipe[seed]} --steps {recipe[steps]}
```

Licence: MIT.
"""


def write_model_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` into the checkpoint's folder.

    Args:
        folder: the checkpoint's, which exists.
        record: what `training.json` holds.
    """
    text = _CARD.format(
        name=record["name"],
        architecture=describe(record["name"]),
        millions=record["parameters"] / 1e6,
        recipe=record["recipe"],
        minutes=record["seconds"] / 60,
        induction=record["heads"]["induction"],
        previous=record["heads"]["previous_token"],
        **record["metrics"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
