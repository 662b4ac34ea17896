"""Faults of latent attention."""

from tests.verification.mutation import Mutant

LATENT = "model.attention.latent:LatentAttention"

LATENTS = (
    Mutant(
        "what turns of the keys stands last",
        f"{LATENT}._project_latent",
        (
            (
                "torch.cat([turning.expand(*still.shape[:3], -1), still], -1)",
                "torch.cat([still, turning.expand(*still.shape[:3], -1)], -1)",
            ),
        ),
        "latent",
    ),
    Mutant(
        "keys of changed copies are made of what values read",
        f"{LATENT}.forward",
        (('compress("kv", k_input), compress("kv", v_input)', 'compress("kv", v_input), compress("kv", v_input)'),),
        "latent",
        "single edits",
    ),
    Mutant(
        "what listeners made of a latent is lost where a copy was changed",
        f"{LATENT}.forward",
        (
            (
                "made_by_listeners = shown[which] - self._compress(which, stream, call)",
                "made_by_listeners = 0 * shown[which]",
            ),
        ),
        "latent",
        "pairs of edits",
    ),
    Mutant(
        "latents of changed copies are not normed",
        f"{LATENT}._compress",
        (("return self._point_and_norm(which)[1].apply_beside(made, call)", "return made"),),
        "latent",
        "single edits",
    ),
    Mutant(
        "values that are narrower than queries lose an entry",
        "model.attention.attend:_widen_heads",
        (
            (
                "F.pad(tensor, (0, width - tensor.shape[-1]))",
                "F.pad(tensor[..., :-1], (0, width - tensor.shape[-1] + 1))",
            ),
        ),
        "latent",
    ),
)
