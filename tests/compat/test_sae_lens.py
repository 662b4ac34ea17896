"""SAELens on the import layer: its models with autoencoders, its store of activations, a short training.

Needs `pip install --no-deps -r tests/compat/requirements-sae.txt`. In a process of its own, in which the layer is
installed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREAMBLE = f"""
import sys, types
sys.path.insert(0, {str(ROOT)!r})
# It is imported and, with logging off, not used.
sys.modules.setdefault("wandb", types.ModuleType("wandb"))
import hooklens.compat.transformer_lens.install
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
torch.manual_seed(0)
model = HookedSAETransformer.from_pretrained("bundled:tiny-llama", device="cpu")
PLACE = "blocks.1.hook_resid_post"
tokens = model.to_tokens("When Mary and John went to the store")
plain = model(tokens)
"""

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("needs SAELens: pip install --no-deps -r tests/compat/requirements-sae.txt", allow_module_level=True)


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_models_with_autoencoders(tmp_path: Path) -> None:
    """In the place of a hook point: its own points are cached and edited, gradients flow, resetting brings all back."""
    code = """
sae = StandardSAE(StandardSAEConfig(
    d_in=128, d_sae=64, metadata=SAEMetadata(model_name="tiny", hook_name=PLACE, prepend_bos=True)))
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
by_hand = model.run_with_hooks(tokens, fwd_hooks=[(PLACE, lambda x, hook: sae(x))])
out, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
assert torch.equal(out, by_hand)
stream = model.run_with_cache(tokens)[1][PLACE]
torch.testing.assert_close(cache[PLACE + ".hook_sae_acts_post"], sae.encode(stream))
kept = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
torch.testing.assert_close(kept, plain, atol=1e-4, rtol=1e-4)
zeroed = model.run_with_hooks_with_saes(
    tokens, saes=[sae], fwd_hooks=[(PLACE + ".hook_sae_acts_post", lambda acts, hook: acts * 0)])
expected = model.run_with_hooks(tokens, fwd_hooks=[(PLACE, lambda x, hook: sae.decode(sae.encode(x) * 0))])
assert torch.equal(zeroed, expected)
found = {}
with model.saes([sae], use_error_term=True):
    with model.hooks(bwd_hooks=[(PLACE + ".hook_sae_acts_post", lambda g, hook: found.update(g=g))]):
        model(tokens, return_type="loss").backward()
assert found["g"].shape == (1, tokens.shape[1], 64) and found["g"].any()
assert torch.equal(model(tokens), plain)
assert PLACE in model.hook_dict
"""
    run(code, tmp_path)


def test_its_store_and_training(tmp_path: Path) -> None:
    """Activations are those of the model; a trained autoencoder loads in HookLens and gives the same."""
    code = """
import datasets
from sae_lens import (
    SAE, ActivationsStore, LanguageModelSAERunnerConfig, LoggingConfig, SAETrainingRunner, StandardTrainingSAEConfig)
text = "When Mary and John went to the store , John gave a drink to Mary ."
texts = datasets.Dataset.from_dict({"text": [text] * 300})
cfg = LanguageModelSAERunnerConfig(
    sae=StandardTrainingSAEConfig(d_in=128, d_sae=96, l1_coefficient=1.0), model_name="tiny", hook_name=PLACE,
    dataset_path="given", is_dataset_tokenized=False, streaming=False, context_size=12, training_tokens=2000,
    train_batch_size_tokens=64, n_batches_in_buffer=16, store_batch_size_prompts=4, device="cpu", n_checkpoints=0,
    checkpoint_path="checkpoints", output_path="trained", logger=LoggingConfig(log_to_wandb=False), verbose=False)
SAETrainingRunner(cfg, override_dataset=texts, override_model=model).run()
store = ActivationsStore.from_config(model, cfg, override_dataset=texts)
batch = store.get_batch_tokens()
assert torch.equal(store.get_activations(batch).flatten(0, -2), model.run_with_cache(batch)[1][PLACE].flatten(0, -2))
import hooklens as hl
theirs, ours = SAE.load_from_disk("trained"), hl.sae.SAE.load("trained")
x = torch.randn(3, 5, 128)
torch.testing.assert_close(ours.encode(x), theirs.encode(x))
torch.testing.assert_close(ours(x), theirs(x))
assert ours.cfg.training.hook_name == PLACE
ours.save("again")
torch.testing.assert_close(SAE.load_from_disk("again")(x), theirs(x))
"""
    run(code, tmp_path)
