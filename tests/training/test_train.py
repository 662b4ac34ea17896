"""`train` against plain torch, and what it refuses."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from hooklens import documents, edits
from hooklens.errors import InputError
from hooklens.training import DivergedError, TrainConfig, train
from tests.annotations import unchecked
from tests.training.networks import (
    D_VOCAB,
    classify,
    copy_state,
    equal_states,
    make_classifier,
    make_model,
    make_rotary_model,
    make_rows,
)


def batches(n=6, size=4, length=8):
    return list(make_rows(n * size, length).split(size))


def quiet(model, data, config, **keywords):
    return train(model, data, config, progress=False, **keywords)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_steps_are_those_of_a_plain_loop(schedule, decay) -> None:
    """Bit for bit: the same operations in the same order."""
    data = batches()
    model, plain = make_model(), make_model()
    config = TrainConfig(
        steps=9, learning_rate=3e-3, weight_decay=0.1, decay=decay, schedule=schedule, warmup_steps=2,
        max_grad_norm=0.5, optimizer_options={"betas": [0.8, 0.95]},
    )  # fmt: skip
    result = quiet(model, data, config)

    is_matrix = {name: one.ndim > 1 and "embed.table" not in name for name, one in plain.named_parameters()}
    groups = [
        {"params": [one for name, one in plain.named_parameters() if is_matrix[name] or decay == "all"]},
        {"params": [one for name, one in plain.named_parameters() if not (is_matrix[name] or decay == "all")],
         "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95)
    )
    make = {
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, 2),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, 2, 9),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, 2, 9),
        "inverse_sqrt": lambda: transformers.get_inverse_sqrt_schedule(optimizer, 2),
    }
    rates = make[schedule]()
    losses = []
    for step in range(9):
        loss = plain(data[step % len(data)], return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], 0.5)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
    assert equal_states(model.state_dict(), plain.state_dict())
    assert result.step == 9
    (record,) = result.records
    # Sums of nine float32 numbers, in another order.
    assert record["loss"] == pytest.approx(sum(losses) / 9, rel=1e-6)


def test_the_loss_falls_and_the_model_is_left_as_it_was() -> None:
    model = make_model()
    model.blocks[0].train()
    modes = [module.training for module in model.modules()]
    result = quiet(model, batches(1), TrainConfig(steps=60, log_every=20, learning_rate=1e-2))
    losses = [record["loss"] for record in result.records]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4
    assert [module.training for module in model.modules()] == modes
    assert all(one.grad is None for one in model.parameters())
    assert result.model is model
    assert list(result.to_dataframe()["step"]) == [20, 40, 60]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "Adafactor", "RMSprop", "NAdam", "Adagrad"])
def test_optimisers_by_name(optimizer) -> None:
    model = make_model()
    before = copy_state(model)
    quiet(model, batches(), TrainConfig(steps=2, optimizer=optimizer, learning_rate=1e-2))
    assert not equal_states(before, copy_state(model))


def test_accumulated_batches_are_one_large_batch() -> None:
    """A mean of the batches' means would count the tokens of a short batch more."""
    rows = make_rows(8).long()
    mask = torch.ones_like(rows)
    mask[:3, 3:] = 0
    labels = rows.masked_fill(mask == 0, -100)
    labels[5, :4] = -100
    model, whole = make_model().double(), make_model().double()
    parts = [{"input_ids": rows[i : i + 2], "attention_mask": mask[i : i + 2], "labels": labels[i : i + 2]}
             for i in range(0, 8, 2)]  # fmt: skip
    config = TrainConfig(steps=3, learning_rate=1e-2, optimizer="SGD")
    quiet(model, parts, config.replace(accumulate=4))
    quiet(whole, [{"input_ids": rows, "attention_mask": mask, "labels": labels}], config)
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, whole.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


def test_losses_of_somebodys_own_count_alike() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(2)]
    model, plain = make_classifier(), make_classifier()
    for one in (model, plain):
        one[1], one[3] = nn.Identity(), nn.Identity()
    quiet(model, data, TrainConfig(steps=1, optimizer="SGD", accumulate=2, max_grad_norm=None), loss=classify)
    (0.5 * classify(plain, data[0]) + 0.5 * classify(plain, data[1])).backward()
    torch.optim.SGD(plain.parameters(), lr=1e-3).step()
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, plain.state_dict()[name], msg=name)


def test_documents_in_batches() -> None:
    """A packed row trains as its documents do: the mean over the tokens that are predicted."""
    lists = [make_rows(1, n, seed=n)[0].tolist() for n in (3, 5, 4, 2)]
    packed = documents.pack(lists, 8)
    one, other = make_rotary_model().double(), make_rotary_model().double()
    config = TrainConfig(steps=2, optimizer="SGD", learning_rate=0.1)
    quiet(one, [packed], config)
    quiet(other, [torch.tensor([tokens]) for tokens in lists], config.replace(accumulate=len(lists)))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype) -> None:
    """Weights and losses stay float32, and the loss is near the one in full precision."""
    full, mixed = make_model(), make_model()
    config = TrainConfig(steps=20, learning_rate=3e-3)
    exact = quiet(full, batches(), config).records[-1]["loss"]
    rounded = quiet(mixed, batches(), config.replace(autocast=dtype)).records[-1]["loss"]
    assert {one.dtype for one in mixed.parameters()} == {torch.float32}
    assert rounded != exact
    # bfloat16 has 8 bits: a few thousandths of a loss near 3.
    assert rounded == pytest.approx(exact, abs=0.03)


def test_hooks_captures_and_edits_act_in_every_step() -> None:
    model = make_model()
    seen = []
    model.add_hook("blocks.0.hook_resid_post", lambda tensor, hook: seen.append(tensor.requires_grad))
    before = copy_state(model)
    with model.hooks(edits=[edits.Zero("blocks.1.hook_mlp_out")]):
        quiet(model, batches(), TrainConfig(steps=3, accumulate=2, optimizer="SGD"))
    assert seen == [True] * 6
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    # What the edit cuts off gets no gradient; everything that reaches the loss around it does.
    cut = {name for name in before if name.startswith(("blocks.1.mlp", "blocks.1.ln2"))}
    assert changed == before.keys() - cut


def test_a_gradient_goes_through_an_edit() -> None:
    """An edit that scales an activation scales the gradients above it: those of plain autograd."""
    model, plain = make_model().double(), make_model().double()
    (batch,) = batches(1)
    with model.hooks(edits=[edits.Scale("blocks.0.hook_mlp_out", 3.0)]):
        quiet(model, [batch], TrainConfig(steps=1, optimizer="SGD", max_grad_norm=None, learning_rate=1.0))
    plain.blocks[0].mlp.W_out.data.mul_(3.0)
    plain.blocks[0].mlp.b_out.data.mul_(3.0)
    plain(batch, return_type="loss").backward()
    for name, one in plain.named_parameters():
        # With weights three times as large in place of the edit the gradient is a third.
        factor = 3.0 if name.startswith("blocks.0.mlp.out_proj") else 1.0
        moved = make_model().double().state_dict()[name] - model.state_dict()[name]
        torch.testing.assert_close(moved, one.grad * factor, rtol=1e-8, atol=1e-12, msg=name)


def test_evaluation_leaves_no_trace() -> None:
    """It draws random numbers, and has another mode; training goes on as it would have."""
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(4)]
    shuffled = DataLoader(list(zip(*data[0], strict=True)), batch_size=2, shuffle=True)
    config = TrainConfig(steps=8, seed=0, log_every=4)
    with_it, without = make_classifier(), make_classifier()
    result = quiet(with_it, data, config.replace(eval_every=2), loss=classify, eval_data=shuffled)
    quiet(without, data, config, loss=classify)
    assert equal_states(with_it.state_dict(), without.state_dict())
    assert [record["step"] for record in result.records if "eval_loss" in record] == [2, 4, 6, 8]
    with_it.eval()
    with torch.no_grad():
        losses = [float(classify(with_it, [inputs, labels])) for inputs, labels in shuffled]
    assert result.records[-1]["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_evaluation_counts_tokens_alike() -> None:
    model = make_model()
    long, short = make_rows(4, 8), make_rows(1, 2)
    result = quiet(model, [long], TrainConfig(steps=1, learning_rate=0.0), eval_data=[long, short])
    with torch.no_grad():
        losses = torch.cat([model(one, return_type="loss", loss_per_token=True).flatten() for one in (long, short)])
    assert result.records[-1]["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)


def test_a_seed_decides_everything_and_leaves_the_callers_generators() -> None:
    loader = DataLoader(list(zip(torch.randn(12, 4), torch.arange(12) % 2, strict=True)), batch_size=4, shuffle=True)
    trained = []
    for start in (1, 2):
        torch.manual_seed(start)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(start))
        model = make_classifier()
        torch.manual_seed(start)
        quiet(model, loader, TrainConfig(steps=5, seed=7), loss=classify)
        assert torch.equal(torch.rand(1), expected)
        trained.append(copy_state(model))
    assert equal_states(*trained)


def test_metrics_go_to_a_logger() -> None:
    class Logger:
        def __init__(self) -> None:
            self.entries = []

        def log(self, metrics, step=None):
            self.entries.append((step, sorted(metrics)))

    logger, entries = Logger(), []
    config = TrainConfig(steps=4, log_every=2, eval_every=4)
    quiet(make_model(), batches(), config, logger=logger, eval_data=batches(1))
    quiet(make_model(), batches(), config, logger=lambda metrics, step: entries.append((step, sorted(metrics))),
          eval_data=batches(1))  # fmt: skip
    names = ["grad_norm", "learning_rate", "loss"]
    assert logger.entries == [(2, names), (4, sorted([*names, "eval_loss"]))]
    assert entries == logger.entries


def test_called_where_gradients_are_off() -> None:
    model, other = make_model(), make_model()
    with torch.inference_mode():
        data = [one.clone() for one in batches()]
        quiet(model, data, TrainConfig(steps=2))
    quiet(other, batches(), TrainConfig(steps=2))
    assert equal_states(model.state_dict(), other.state_dict())


def test_frozen_parameters_stay() -> None:
    model = make_model()
    model.embed.requires_grad_(False)
    before = copy_state(model)
    quiet(model, batches(), TrainConfig(steps=2, weight_decay=0.5))
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == before.keys() - {"embed.table.weight"}


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return "text"


def meta_model():
    with torch.device("meta"):
        return nn.Linear(2, 2)


def inference_model():
    with torch.inference_mode():
        return nn.Linear(2, 2)


def frozen_model():
    return nn.Linear(2, 2).requires_grad_(False)


def quantised_model():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (meta_model, "'weight', 'bias' lie on the device 'meta'"),
        (inference_model, "'weight', 'bias' were made under torch.inference_mode"),
        (frozen_model, "all parameters are frozen"),
        (quantised_model, "'weight' are quantised"),
        (nn.ReLU, "it has no parameters"),
        (lambda: WithExtraState(2, 2), "'_extra_state' are no tensors"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(make, words) -> None:
    with pytest.raises(InputError, match="the model cannot be trained") as refused:
        quiet(make(), [torch.zeros(1, 2)], TrainConfig(steps=1), loss=lambda model, batch: model(batch).sum())
    assert words in str(refused.value)


def test_float16_weights_cannot_be_scaled() -> None:
    with pytest.raises(InputError, match="are float16, whose gradients"):
        quiet(make_model().half(), batches(), TrainConfig(steps=1, autocast="float16"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": nn.Linear(2, 2)}, "expected a HookedCausalLM; for other modules give their loss"),
        ({"model": make_model(causal=False)}, "with causal=False every token sees the one after it"),
        ({"model": "model"}, "model is 'model', expected a model, a torch.nn.Module"),
        ({"config": {"steps": 1}}, "expected a TrainConfig"),
        ({"data": 5}, "data is 5, expected an iterable of batches"),
        ({"data": make_rows()}, "DataLoader\\(rows, batch_size=...\\) makes batches"),
        ({"data": documents.pack([[1, 2]], 2)}, "one batch, not several"),
        ({"data": {"input_ids": make_rows()}}, "one batch, not several"),
        ({"data": []}, "the data gives no batch"),
        ({"eval_data": iter([make_rows()])}, "eval_data is an iterator, which gives its batches once"),
        ({"eval_data": []}, "eval_data holds no batch"),
        ({"config": TrainConfig(steps=1, eval_every=1)}, "eval_every=1 asks for evaluations: give eval_data"),
        ({"config": TrainConfig(steps=1, checkpoint_every=1, keep_checkpoints=2)},
         "checkpoint_every=1 asks for checkpoints: give a folder; keep_checkpoints=2 asks"),
        ({"logger": 3}, "logger is 3, expected an object with"),
        ({"loss": 3}, "loss is 3, expected a function"),
        ({"loss": lambda model, batch: 3.0}, "gave 3.0, expected one number, a tensor"),
        ({"loss": lambda model, batch: torch.ones(2)}, "expected one number"),
        ({"loss": lambda model, batch: torch.ones(())}, "depends on no parameter"),
        ({"folder": ""}, "folder is '', expected a path"),
        ({"progress": 1}, "progress is 1, expected True or False"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_refused(change, words) -> None:
    given = {"model": make_model(), "data": batches(), "config": TrainConfig(steps=1), "progress": False, **change}
    with unchecked(), pytest.raises(InputError, match=words):
        train(**given)


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    model = make_model()
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in steps \d+ to \d+"):
        quiet(model, batches(), TrainConfig(steps=50, learning_rate=1e30, log_every=5, max_grad_norm=None))


def test_labels_are_checked_before_they_reach_a_kernel() -> None:
    rows = make_rows(2)
    labels = rows.clone()
    labels[0, 3] = D_VOCAB
    with pytest.raises(InputError, match=rf"labels: \[{D_VOCAB}\] are no tokens"):
        quiet(make_model(), [{"input_ids": rows, "labels": labels}], TrainConfig(steps=1))
