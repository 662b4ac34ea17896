"""circuit-tracer's attribution graphs on the import layer.

Needs circuit-tracer, `pip install --no-deps circuit-tracer`; it asks for older versions of what HookLens needs, and is
not part of CI. In a process of its own, in which the layer is installed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import huggingface_hub.constants
# It reads a setting that is no longer there.
huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False
import hooklens.compat.transformer_lens.install
import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
import hooklens as hl

torch.manual_seed(0)
hooked = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
cfg = hooked.cfg
def make(layer):
    transcoder = SingleLayerTranscoder(cfg.d_model, 32, torch.nn.functional.relu, layer_idx=layer)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return transcoder
transcoders = TranscoderSet(
    {{layer: make(layer) for layer in range(cfg.n_layers)}}, feature_input_hook="mlp.hook_in",
    feature_output_hook="mlp.hook_out")
model = TransformerLensReplacementModel.from_pretrained_and_transcoders("bundled:tiny-llama", transcoders, device="cpu")
prompt = "When Mary and John went"
tokens = model.ensure_tokenized(prompt)
logits, acts = model.get_activations(tokens)
# Without a BOS of its own it starts with another special token, which is no padding.
expected = hooked(tokens[None], attention_mask=torch.ones(1, len(tokens)))
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
graph = attribute(tokens, model, batch_size=8, max_n_logits=3)
edges = graph.adjacency_matrix
# Edges into logits come from features of every layer, errors and tokens.
n_logits, n_pos = len(graph.logit_token_ids), len(tokens)
assert edges[-n_logits:].any(1).all()
assert edges[-n_logits:, -n_logits - n_pos : -n_logits].any()
assert edges[-n_logits:, : len(graph.selected_features)].any()
changed = model.feature_intervention(tokens, [(1, 2, 3, 5.0)])[0]
assert not torch.allclose(changed, logits, atol=1e-3)
"""

if importlib.util.find_spec("circuit_tracer") is None:
    pytest.skip("needs circuit-tracer: pip install --no-deps circuit-tracer", allow_module_level=True)

pytestmark = pytest.mark.slow


def test_an_attribution_graph(tmp_path: Path) -> None:
    """Held against TransformerLens 3.9 by hand: edges, activations and interventions were equal to 5e-6."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
