"""Sparse autoencoders and transcoders: loaded from the field's formats, and spliced into a model.

sae = hl.sae.SAE.load("folder")
splice = sae.at("blocks.8.hook_resid_post")
with model.hooks(splices=[splice]):
    logits, cache = model.run_with_cache(prompt, names_filter="sae_acts")
"""

from hooklens.sae.config import SAEConfig, SAETraining
from hooklens.sae.latents import attribute_latents, sweep_latents
from hooklens.sae.sae import SAE
from hooklens.sae.splice import SAESplice

__all__ = ["SAE", "SAEConfig", "SAESplice", "SAETraining", "attribute_latents", "sweep_latents"]
