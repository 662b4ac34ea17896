"""The small trained checkpoints that come with HookLens, and how they were made.

Each is a folder in Hugging Face format beside this file: weights, config, tokenizer, model card and
training record. They know three things that interpretability tutorials need: indirect objects, repeated
sequences (induction) and capitals. `corpus` generates what they read, `train` trains them, `evaluate`
measures them.
"""

from pathlib import Path

from hooklens.errors import CheckpointError, UnsupportedModelError, join_names, suggest_names

BUNDLED: tuple[str, ...] = ("tiny-gpt-neox", "tiny-llama", "tiny-falcon")


def bundled_path(name: str) -> Path:
    """The folder of a bundled checkpoint.

    Args:
        name: one of `BUNDLED`, without the `bundled:` in front.

    Raises:
        UnsupportedModelError: no bundled checkpoint has that name.
        CheckpointError: the checkpoint's folder did not come with this installation.
    """
    if name not in BUNDLED:
        raise UnsupportedModelError(
            f"no bundled checkpoint is called {name!r}.{suggest_names(name, BUNDLED)} There are {join_names(BUNDLED)}"
        )
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the bundled checkpoint {name!r} is not part of this installation: no config.json in {folder}. "
            f"Install HookLens again, or train it: python -m hooklens.bundled.train {name} --out FOLDER"
        )
    return folder
