"""TransformerLens 2.x's names on HookLens: `import hooklens.compat.transformer_lens as transformer_lens`.

The modules and what they hold are laid out as there. `hooklens.compat.install_transformer_lens()` makes
`import transformer_lens` mean this package, for code of others. Where it differs stands in docs/transformer_lens.md.
"""

import sys

from hooklens.compat.transformer_lens import (
    _absent,
    components,
    evals,
    factories,
    head_detector,
    hook_points,
    patching,
    pretrained,
    train,
    utils,
)
from hooklens.compat.transformer_lens import loading_from_pretrained as loading
from hooklens.compat.transformer_lens._absent import BertNextSentencePrediction, HookedEncoder, HookedEncoderDecoder
from hooklens.compat.transformer_lens.ActivationCache import ActivationCache
from hooklens.compat.transformer_lens.FactoredMatrix import FactoredMatrix
from hooklens.compat.transformer_lens.HookedTransformer import HookedTransformer
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.past_key_value_caching import (
    HookedTransformerKeyValueCache,
    HookedTransformerKeyValueCacheEntry,
)
from hooklens.compat.transformer_lens.SVDInterpreter import SVDInterpreter

for _name in ("HookedEncoder", "HookedEncoderDecoder", "BertNextSentencePrediction"):
    sys.modules[f"{__name__}.{_name}"] = _absent

EasyTransformer, EasyTransformerConfig = HookedTransformer, HookedTransformerConfig
EasyTransformerKeyValueCache = HookedTransformerKeyValueCache
EasyTransformerKeyValueCacheEntry = HookedTransformerKeyValueCacheEntry

__all__ = [
    "ActivationCache", "BertNextSentencePrediction", "FactoredMatrix", "HookedEncoder", "HookedEncoderDecoder",
    "HookedTransformer", "HookedTransformerConfig", "HookedTransformerKeyValueCache",
    "HookedTransformerKeyValueCacheEntry", "SVDInterpreter", "components", "evals", "factories", "head_detector",
    "hook_points", "loading", "patching", "pretrained", "train", "utils",
]  # fmt: skip
