"""A model as Hugging Face's `Trainer` and Accelerate drive it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hooklens.arguments import reads, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.optional import import_package
from hooklens.training.batches import TokenBatch, label_loss, read_token_batch

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutput


class TrainerModel(nn.Module):
    """Calls a model as transformers models are called in training; made by `for_trainer`.

    Attributes:
        module: the model, whose parameters these are. Its name in a state dict, `module.`, is left out when a
            `HookedCausalLM` loads one.
    """

    # What Trainer asks: that `num_items_in_batch` is taken, and that labels are shifted in here.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, model: HookedCausalLM) -> None:
        super().__init__()
        self.module = model

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute blocks again in the backward pass, see `HookedCausalLM.gradient_checkpointing_enable`.

        `Trainer` calls it for `TrainingArguments(gradient_checkpointing=True)`.

        Raises:
            InputError: options that would have to be done otherwise.
        """
        self.module.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, object] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under the name that younger versions of transformers call it by."""
        self.gradient_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def gradient_checkpointing_disable(self) -> None:
        """From here on keep all that the backward pass needs."""
        self.module.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> "CausalLMOutput":
        """Logits, and with labels the loss.

        Args:
            input_ids: `[batch pos]`.
            attention_mask: 1 for tokens, 0 for padding.
            labels: tokens to predict, each at its own place; -100 does not count.
            document_ids: as a call of the model takes them.
            num_items_in_batch: by what the sum of losses is divided, where several batches make one step. None: by how
                many labels count.

        Raises:
            InputError: tensors that do not fit each other, or labels that are no tokens.
        """
        batch = read_token_batch(
            TokenBatch(input_ids, attention_mask=attention_mask, labels=labels, document_ids=document_ids)
        )
        output = import_package("transformers.modeling_outputs").CausalLMOutput
        if labels is None:
            logits = self.module(input_ids, attention_mask=attention_mask, document_ids=document_ids)
            made: CausalLMOutput = output(logits=logits)
            return made
        of_labels = label_loss(self.module, batch)
        divisor = of_labels.n_counted if num_items_in_batch is None else num_items_in_batch
        made = output(loss=of_labels.total / divisor, logits=of_labels.logits)
        return made


@reads()
def for_trainer(model: HookedCausalLM) -> TrainerModel:
    """A model for Hugging Face's `Trainer`, or for a loop with Accelerate; the weights are the model's own.

    It is called with `input_ids`, `attention_mask`, `labels` and `document_ids`, and gives `.loss` and `.logits`. Hooks
    and edits on the model act. What `Trainer` saves, `model.load_state_dict` reads.

    Raises:
        InputError: something else than a `HookedCausalLM`.
    """
    require(model, kind=HookedCausalLM, what="for_trainer: model", expected="a HookedCausalLM")
    return TrainerModel(model)
