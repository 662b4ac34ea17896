"""`transformer_lens.train` of 2.x. `hooklens.training.train` is more than this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from hooklens.compat.transformer_lens import utils
from hooklens.optional import import_package
from hooklens.progress import progress_bar


@dataclass
class HookedTransformerTrainConfig:
    """Settings of `train`."""

    num_epochs: int
    batch_size: int
    lr: float = 1e-3
    seed: int = 0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    optimizer_name: str = "Adam"
    device: Any = None
    warmup_steps: int = 0
    save_every: int | None = None
    save_dir: str | None = None
    wandb: bool = False
    wandb_project_name: str | None = None
    print_every: int | None = 50
    max_steps: int | None = None


def _make_optimizer(model: nn.Module, config: HookedTransformerTrainConfig) -> optim.Optimizer:
    decay = config.weight_decay
    if config.optimizer_name in ("Adam", "AdamW"):
        # With a decay it is AdamW's under either name.
        if decay is None:
            return optim.Adam(model.parameters(), lr=config.lr)
        return optim.AdamW(model.parameters(), lr=config.lr, weight_decay=decay)
    if config.optimizer_name == "SGD":
        return optim.SGD(model.parameters(), lr=config.lr, weight_decay=decay or 0.0, momentum=config.momentum)
    raise ValueError(f"Optimizer {config.optimizer_name} not supported")


def train(model: Any, config: HookedTransformerTrainConfig, dataset: Any) -> Any:
    """Train a model on the next token of a data set whose items have `tokens`; it is trained in place."""
    torch.manual_seed(config.seed)
    model.train()
    wandb = import_package("wandb") if config.wandb else None
    if wandb is not None:
        config.wandb_project_name = config.wandb_project_name or "easy-transformer"
        wandb.init(project=config.wandb_project_name, config=vars(config))
    config.device = config.device or utils.get_device()
    model.to(config.device)
    optimizer = _make_optimizer(model, config)
    warmup = config.warmup_steps
    # Making one sets the rate to that of step 0, which is 0.
    warm_up = optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / warmup)) if warmup > 0 else None
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True)
    with progress_bar("training", range(1, config.num_epochs + 1), unit="epoch", progress=True, stays=True) as epochs:
        for epoch in epochs:
            samples = 0
            with progress_bar(f"epoch {epoch}", loader, unit="batch", progress=True) as batches:
                for step, batch in enumerate(batches):
                    tokens = batch["tokens"].to(config.device)
                    loss = model(tokens, return_type="loss")
                    loss.backward()
                    if config.max_grad_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    if warm_up is not None:
                        warm_up.step()
                    optimizer.zero_grad()
                    samples += len(tokens)
                    if wandb is not None:
                        wandb.log({"train_loss": loss.item(), "samples": samples, "epoch": epoch})
                    if config.print_every is not None and step % config.print_every == 0:
                        print(f"Epoch {epoch} Samples {samples} Step {step} Loss {loss.item()}")
                    if config.save_every is not None and config.save_dir is not None and step % config.save_every == 0:
                        torch.save(model.state_dict(), Path(config.save_dir) / f"model_{step}.pt")
                    if config.max_steps is not None and step >= config.max_steps:
                        break
    return model
