import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hooklens.bundled import BUNDLED, train
from hooklens.bundled.architectures import build_model, describe
from hooklens.bundled.words import VOCABULARY
from hooklens.errors import ConfigError, UnsupportedModelError

SHORT = train.Recipe(steps=3, tokens_per_step=256, threads=1, row_lengths=((32, 0.5), (64, 0.5)))


@pytest.fixture(autouse=True)
def keep_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_weights_and_losses():
    first, second = (train.train("tiny-llama", SHORT, progress=False) for _ in range(2))
    assert first.losses == second.losses
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_another_seed_gives_another_run():
    other = train.Recipe(seed=1, steps=3, tokens_per_step=256, threads=1, row_lengths=SHORT.row_lengths)
    first = train.train("tiny-llama", SHORT, progress=False)
    assert train.train("tiny-llama", other, progress=False).losses != first.losses


@pytest.mark.parametrize("name", BUNDLED)
def test_the_first_loss_is_that_of_a_uniform_guess_and_training_lowers_it(name):
    recipe = train.Recipe(steps=12, tokens_per_step=512, threads=1, row_lengths=((64, 1.0),))
    losses = train.train(name, recipe, progress=False).losses
    # Fresh logits have a spread of about 0.6, which costs some tenths of a nat more than equal ones.
    assert losses[0] == pytest.approx(torch.tensor(len(VOCABULARY)).log().item(), abs=0.6)
    assert min(losses[-3:]) < losses[0] - 0.1


def test_batches_hold_the_promised_tokens_in_rows_of_the_listed_lengths():
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    rng = random.Random(0)
    batches = [train.sample_batch(rng, train.Recipe(), ids, step=step) for step in range(1200, 1260)]
    assert {tuple(tokens.shape) for tokens, _ in batches} == {(48, 64), (24, 128), (12, 256)}
    for tokens, weights in batches:
        assert weights.shape == tokens.shape
        assert set(weights.unique().tolist()) == set(torch.tensor([0.1, 1.0, 5.0]).tolist())


def test_the_loss_is_the_weighted_mean_of_the_next_token_losses():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    weights = torch.rand(2, 5, dtype=torch.float64)
    total = norm = 0.0
    for row in range(2):
        for position in range(4):
            weight = weights[row, position + 1].item()
            total -= weight * logits[row, position].log_softmax(-1)[tokens[row, position + 1]].item()
            norm += weight
    assert train.weighted_loss(logits, tokens, weights).item() == pytest.approx(total / norm, rel=1e-12)


def test_a_saved_run_loads_in_transformers_and_records_itself(tmp_path):
    run = train.train("tiny-falcon", SHORT, progress=False)
    train.save(run, "tiny-falcon", SHORT, tmp_path / "tiny-falcon")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-falcon")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "tiny-falcon")("Mary and John", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.model(tokens).logits)
    record = json.loads((tmp_path / "tiny-falcon" / "training.json").read_text())
    assert record["recipe"]["steps"] == len(run.losses) == 3
    assert record["loss_curve"][-1]["step"] == 3
    assert record["loss_curve"][-1]["loss"] == pytest.approx(run.losses[-1], abs=1e-4)
    assert record["history"] == []
    assert "--steps 3" in (tmp_path / "tiny-falcon" / "README.md").read_text()


def test_the_command_line_refuses_unknown_names_before_training(capsys, tmp_path):
    with pytest.raises(SystemExit):
        train.main(["tiny-gpt2", "--out", str(tmp_path)])
    assert "unknown checkpoints tiny-gpt2; there are tiny-gpt-neox, tiny-llama, tiny-falcon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 1}, "steps=1; the one-cycle schedule needs 2"), ({"row_lengths": ((512, 1.0),)}, r"rows of \[512\]")],
)
def test_a_recipe_that_cannot_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        train.Recipe(**change)


@pytest.mark.parametrize("build", [build_model, describe])
def test_an_unknown_architecture_is_refused_with_the_names_there_are(build):
    with pytest.raises(UnsupportedModelError, match=r"'tiny-gpt2'.*There are 'tiny-gpt-neox', 'tiny-llama'"):
        build("tiny-gpt2")


def test_the_architectures_differ_in_what_makes_their_families_differ():
    configs = {name: build_model(name).config for name in BUNDLED}
    assert configs["tiny-gpt-neox"].use_parallel_residual
    assert configs["tiny-gpt-neox"].rope_parameters["partial_rotary_factor"] == 0.5
    assert configs["tiny-llama"].num_key_value_heads == 2
    falcon = configs["tiny-falcon"]
    assert (falcon.multi_query, falcon.parallel_attn, falcon.new_decoder_architecture, falcon.bias, falcon.alibi) == (
        True, True, False, False, False,
    )  # fmt: skip
    assert all(config.max_position_embeddings == 256 for config in configs.values())
