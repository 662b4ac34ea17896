"""`hooklens generate` against the method."""

from pathlib import Path

import hooklens as hl
from tests.cli.conftest import Run


def test_text_is_that_of_the_method(run: Run, checkpoint: Path) -> None:
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    result = run("generate", checkpoint, "Mary went to", "--max-new-tokens", 6, "--greedy")
    assert result.exit_code == 0, result.output
    expected = model.generate("Mary went to", max_new_tokens=6, do_sample=False, verbose=False)
    assert result.stdout == f"{expected}\n"


def test_a_temperature_of_0_is_greedy(run: Run, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "Mary went to", "--max-new-tokens", 6)
    greedy = run(*arguments, "--greedy")
    assert run(*arguments, "--temperature", 0).stdout == greedy.stdout


def test_options_reach_the_method(run: Run, checkpoint: Path) -> None:
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    arguments = "--max-new-tokens 9 --temperature 0.8 --top-k 50 --top-p 0.9 --min-p 0.001 --repetition-penalty 1.2"
    result = run("generate", checkpoint, "Mary went to", *arguments.split(), "--seed", 3)
    expected = model.generate(
        "Mary went to",
        max_new_tokens=9,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.001,
        repetition_penalty=1.2,
        seed=3,
        verbose=False,
    )
    assert result.stdout == f"{expected}\n"
    word = expected.removeprefix("Mary went to ").split()[2]
    stopped = run("generate", checkpoint, "Mary went to", *arguments.split(), "--seed", 3, "--stop", word)
    assert stopped.stdout.strip() == " ".join(expected.split()[: expected.split().index(word, 3) + 1])


def test_bad_values_are_a_message(run: Run, checkpoint: Path) -> None:
    result = run("generate", checkpoint, "Mary", "--temperature", -1)
    assert result.exit_code == 2
    assert "temperature is -1.0" in result.stderr
    assert result.stdout == ""
