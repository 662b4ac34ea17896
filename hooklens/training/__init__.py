"""Training models, and looking at them while they learn.

    from hooklens import training

    config = training.TrainConfig(steps=2000, learning_rate=1e-3, schedule="cosine", warmup_steps=100, seed=0,
                                  checkpoint_every=100)
    training.train(model, loader, config, folder="run")

    table = training.checkpoints("run").curve(lambda model: model(held_out, return_type="loss"))

A run that is killed goes on by the same call and ends as if nothing had happened, bit for bit. `for_trainer` puts a
model into Hugging Face's `Trainer`, for everything that a training loop of a few hundred lines leaves out.
"""

from hooklens.training.config import TrainConfig
from hooklens.training.keeping.sequence import Checkpoints, CurveInterruptedError, checkpoints
from hooklens.training.result import DivergedError, TrainingInterruptedError, TrainResult
from hooklens.training.train import train
from hooklens.training.trainer import TrainerModel, for_trainer

__all__ = [
    "Checkpoints",
    "CurveInterruptedError",
    "DivergedError",
    "TrainConfig",
    "TrainResult",
    "TrainerModel",
    "TrainingInterruptedError",
    "checkpoints",
    "for_trainer",
    "train",
]
