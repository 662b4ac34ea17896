"""Hugging Face's `Trainer` and Accelerate drive a model as they drive the transformers model it came from."""

import accelerate
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from hooklens import HookedCausalLM, edits
from hooklens.errors import InputError
from hooklens.training import for_trainer
from tests.annotations import unchecked
from tests.training.networks import copy_state, equal_states, make_model, make_rotary_model, make_rows


def make_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip


def examples(n=24):
    """Rows of several lengths, padded on the right, whose padding and first tokens do not count."""
    rows = []
    for index, ids in enumerate(make_rows(n, 8)):
        length = 3 + index % 6
        mask = (torch.arange(8) < length).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[1 : 1 + index % 3] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def fit(model, folder, **given):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        **given,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(4),
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_it_as_it_trains_the_transformers_model(tmp_path) -> None:
    theirs = make_llama()
    ours = HookedCausalLM.from_hf(theirs, share=False)
    reference = fit(theirs, tmp_path / "theirs")
    wrapped = fit(for_trainer(ours), tmp_path / "ours")
    expected = HookedCausalLM.from_hf(theirs)
    for name, one in ours.state_dict().items():
        # float32 gradients through Adam's division, four steps.
        torch.testing.assert_close(one, expected.state_dict()[name], rtol=2e-3, atol=2e-4, msg=name)
    logged = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (reference, wrapped)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert wrapped.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_trainer_saves_is_read_back(tmp_path) -> None:
    model = make_model()
    trainer = fit(for_trainer(model), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    other = make_model()
    other.load_state_dict(transformers.modeling_utils.load_state_dict(str(tmp_path / "saved" / "model.safetensors")))
    assert equal_states(other.state_dict(), model.state_dict())


def count_runs(model):
    """How often each layer's MLP runs from here on."""
    runs = dict.fromkeys(range(model.cfg.n_layers), 0)

    def count(layer):
        def hook(*_):
            runs[layer] += 1

        return hook

    for layer, block in enumerate(model.block_list()):
        block.mlp.register_forward_pre_hook(count(layer))
    return runs


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A model that was trained without checkpointing, and how often its layers ran."""
    torch.manual_seed(0)
    model = make_model()
    runs = count_runs(model)
    fit(for_trainer(model), tmp_path_factory.mktemp("plain"))
    return model, runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "every"), [(None, 1), ({"use_reentrant": False}, 1), ({"every_n_layers": 2}, 2)])
def test_trainer_turns_gradient_checkpointing_on(tmp_path, plain_run, options, every) -> None:
    """Trainer asks the model for it by a method that what `for_trainer` makes did not have."""
    plain, plain_runs = plain_run
    model = make_model()
    runs = count_runs(model)
    fit(for_trainer(model), tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
    assert {layer: n / plain_runs[layer] for layer, n in runs.items()} == {
        layer: 2 if layer % every == 0 else 1 for layer in runs
    }
    assert equal_states(model.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_trainer_is_told_what_checkpointing_is_not_done(tmp_path) -> None:
    for options, said in (
        ({"use_reentrant": True}, "use_reentrant=True; expected False. The reentrant way runs"),
        ({"offload": True}, "offload=True is not offered"),
    ):
        with pytest.raises(InputError, match=said):
            fit(for_trainer(make_model()), tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)


def test_checkpointing_is_the_models_own() -> None:
    model = make_model()
    wrapped = for_trainer(model)
    # By the names that older and younger versions of transformers call.
    for enable in (wrapped.gradient_checkpointing_enable, wrapped.activation_checkpointing_enable):
        enable({"use_reentrant": False}, every_n_layers=2)
        assert [model.recomputes(layer) for layer in range(3)] == [True, False, True]
        wrapped.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing


def test_hooks_and_edits_act() -> None:
    model = make_model()
    wrapped = for_trainer(model)
    batch = {"input_ids": make_rows(2), "labels": make_rows(2)}
    calls = []
    model.add_hook("blocks.0.hook_mlp_out", lambda tensor, hook: calls.append(hook.name))
    plain = wrapped(**batch).loss
    with model.hooks(edits=[edits.Zero("blocks.0.hook_mlp_out")]):
        edited = wrapped(**batch).loss
    assert len(calls) == 2
    assert plain != edited


def test_accelerate_steps_are_those_of_a_plain_loop() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, plain = make_model(), make_model()
    rows = [{"input_ids": one, "labels": one} for one in make_rows()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, prepared_optimizer, loader = accelerator.prepare(
        for_trainer(model), optimizer, DataLoader(rows, batch_size=4)
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for batch in loader:
        prepared_optimizer.zero_grad()
        accelerator.backward(prepared(**batch).loss)
        prepared_optimizer.step()
        reference.zero_grad()
        plain(batch["input_ids"], return_type="loss").backward()
        reference.step()
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, plain.state_dict()[name], rtol=2e-3, atol=2e-4, msg=name)


def test_logits_without_labels_and_documents() -> None:
    model = make_rotary_model()
    rows, documents = make_rows(2), torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]]).expand(2, -1)
    output = for_trainer(model)(rows, document_ids=documents)
    assert output.loss is None
    assert torch.equal(output.logits, model(rows, document_ids=documents))
    loss = for_trainer(model)(rows, labels=rows, document_ids=documents).loss
    torch.testing.assert_close(loss, model(rows, document_ids=documents, return_type="loss"))


def test_it_takes_the_models_of_this_package() -> None:
    with unchecked(), pytest.raises(InputError, match="for_trainer: model is a Linear, expected a HookedCausalLM"):
        for_trainer(torch.nn.Linear(2, 2))


def test_the_weights_are_shared() -> None:
    model = make_model()
    before = copy_state(model)
    for one in for_trainer(model).parameters():
        one.data.add_(1)
    assert not equal_states(before, model.state_dict())
