"""The demos run from beginning to end and find what their text says."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hooklens as hl
from hooklens.patching import Circuit

DEMOS = Path(__file__).parents[1] / "demos"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEMOS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_question_and_answer(printed: str) -> None:
    """What is printed begins with a question and ends with its answer."""
    lines = printed.splitlines()
    assert lines[0].endswith("?")
    assert lines[-1].startswith("Answer: ")


@pytest.mark.parametrize(
    "name", ["tiny-gpt-neox", *(pytest.param(name, marks=pytest.mark.long) for name in ("tiny-llama", "tiny-falcon"))]
)
def test_indirect_object(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("indirect_object")
    numbers = demo.main(["--model", f"bundled:{name}", "--pairs", "4", "--out", str(tmp_path / "out")])
    assert numbers["clean"] > 4 > -4 > numbers["corrupted"]
    # A few heads carry most of the effect, and a small part of the edges keeps four fifths of it.
    assert numbers["best head restores"] > 0.4
    assert numbers["edges"] < numbers["all edges"] / 10
    figures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures == {"1_stream.png", "2_heads_restore.png", "3_heads_needed.png", "4_patterns.png", "5_circuits.png"}
    assert len(Circuit.load(tmp_path / "out" / "circuit.json")) == numbers["edges"]
    printed = capsys.readouterr().out
    assert [line for line in range(1, 7) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)


@pytest.mark.long
def test_induction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both heads form together, late and fast, and the loss on repeated tokens falls with them."""
    demo = load("induction")
    numbers = demo.main(["--steps", "400", "--out", str(tmp_path)])
    assert numbers["induction before"] < 0.15
    assert numbers["induction"] > 0.5
    assert numbers["previous token"] > 0.4
    assert numbers["loss before"] > numbers["guessing"] - 0.3
    assert numbers["loss after"] < numbers["guessing"] / 3
    # Little happens at first, and the change takes a small part of the training.
    assert numbers["change begins"] >= 50
    assert numbers["change ends"] - numbers["change begins"] <= 200
    assert {path.name for path in tmp_path.iterdir()} == {"run", "induction.png", "induction.csv"}
    printed = capsys.readouterr().out
    assert [line for line in range(1, 4) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)
    # Interrupted or not, the same command gives the same, from the checkpoints that there are.
    assert demo.main(["--steps", "400", "--out", str(tmp_path)]) == numbers
    with pytest.raises(SystemExit):
        demo.main(["--steps", "40", "--out", str(tmp_path)])
    assert "steps=40 is behind it" in capsys.readouterr().err


@pytest.mark.long
def test_modular_addition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule comes long after the training pairs are known, and lies in a few frequencies that all of it needs."""
    demo = load("modular_addition")
    numbers = demo.main(["--modulus", "29", "--fraction", "0.7", "--steps", "700", "--out", str(tmp_path)])
    assert numbers["train accuracy"] == 1
    assert numbers["test accuracy"] > 0.97
    assert numbers["rule known from"] > 2 * numbers["known by heart from"]
    assert numbers["key frequencies"] < numbers["frequencies"] / 2
    assert numbers["key frequencies before"] > numbers["frequencies"] * 3 / 4
    assert numbers["restricted accuracy"] > 0.98
    assert numbers["excluded accuracy"] < 0.2
    assert numbers["neuron share"] > 0.8
    assert numbers["neuron share before"] < 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"run", "training.png", "neurons.png", "training.csv"}
    printed = capsys.readouterr().out
    assert [line for line in range(1, 5) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)


def test_fourier_parts_of_modular_addition() -> None:
    """The parts are those of waves whose transform is known."""
    demo = load("modular_addition")
    p, k = 11, 3
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    angle = 2 * torch.pi * k / p
    by_sum = torch.cos(angle * (a + b).double()[:, None] + torch.arange(4))
    by_difference = torch.sin(angle * (a - b).double()[:, None] + torch.arange(4))
    of_another = torch.cos(2 * angle * (a + b).double()[:, None] + torch.arange(4))
    restricted, excluded = demo.split_logits(5 + by_sum + by_difference + of_another, p, [k])
    torch.testing.assert_close(restricted, 5 + by_sum)
    torch.testing.assert_close(excluded, 5 + by_difference + of_another)
    # Equal amplitudes: both waves of k are two thirds of the variance, of 2 k there is the other third.
    shares = demo.single_frequency_shares(by_sum + by_difference + of_another, p)
    expected = torch.zeros(p // 2, 4, dtype=torch.float64)
    # The frequencies 6 and 5 are one.
    expected[k - 1], expected[p - 2 * k - 1] = 2 / 3, 1 / 3
    torch.testing.assert_close(shares, expected)


@pytest.mark.long
def test_superposition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sparser features are, the more are represented: first as many as dimensions, then pairs, then a pentagon."""
    demo = load("superposition")
    table = demo.main(["--steps", "1200", "--out", str(tmp_path)])
    assert table["represented"].tolist()[:2] == [2, 4]
    assert table["represented"].iloc[-1] == 5
    assert table["represented"].is_monotonic_increasing
    larger = table["represented, 20 in 5"]
    assert larger.is_monotonic_increasing
    assert larger.iloc[0] <= 7
    assert larger.iloc[-1] >= 16
    # A dimension each, half of one in an antipodal pair, two of five in a pentagon, neighbours 72 degrees off.
    assert table["dimensions"].iloc[[0, 1, -1]].tolist() == pytest.approx([1, 1 / 2, 2 / 5], abs=0.1)
    assert table["nearest"].iloc[-1] == pytest.approx(72, abs=3)
    # Where features are orthogonal, taking one out leaves the others alone; its antipode is lost with it.
    assert table["damage"].iloc[0] < 0.3
    assert table["damage"].iloc[1] == pytest.approx(1, abs=0.2)
    assert table["damage"].iloc[-1] > 1.5
    files = {"directions.png", "products_5_in_2.png", "products_20_in_5.png", "features.csv"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"run_5_in_2", "run_20_in_5"}
    printed = capsys.readouterr().out
    assert [line for line in range(1, 5) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)


def test_impossible_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("modular_addition").main(
            ["--modulus", "30", "--fraction", "1", "--steps", "3", "--out", str(tmp_path / "out")]
        )
    told = capsys.readouterr().err
    assert [name for name in ("--modulus is 30", "--fraction is 1.0", "--steps is 3") if name not in told] == []
    with pytest.raises(SystemExit):
        load("superposition").main(["--steps", "0", "--out", str(tmp_path / "out")])
    assert "--steps is 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The heads that count, all of them in the layer without positions, are needed for mistakes of the count alone."""
    demo = load("brackets")
    numbers = demo.main(["--steps", "400", "--out", str(tmp_path)])
    assert numbers["accuracy"] > 0.97
    assert numbers["counting heads"] >= 1
    assert numbers["deepest counting"] == 0
    assert numbers["unevenness"] < 0.15
    # Which strings are then taken for others depends on how the training rounds: what is balanced, or what is not. The
    # order alone is never told by the heads that count.
    drops = {kind: numbers[f"{kind}, whole"] - numbers[f"{kind}, ablated"] for kind in ("balanced", "count", "both")}
    assert max(drops.values()) > 0.3, drops
    assert abs(numbers["order, ablated"] - numbers["order, whole"]) < 0.15
    assert {path.name for path in tmp_path.iterdir()} == {
        "run", "components.png", "components.csv", "counting.png", "accuracy.csv",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert [line for line in range(1, 5) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)
    # Interrupted or not, the same command gives the same.
    assert demo.main(["--steps", "400", "--out", str(tmp_path)]) == numbers


def test_strings_of_brackets_are_of_their_kind() -> None:
    demo = load("brackets")
    strings = demo.make_strings(400, seed=3, held_out=True)
    for ids, mask, kind in zip(strings.ids.tolist(), strings.mask.tolist(), strings.kinds.tolist(), strict=True):
        assert mask == sorted(mask, reverse=True)
        rest = "".join("s()"[token] for token in ids[1 : sum(mask)])
        elevations = [rest[:n].count("(") - rest[:n].count(")") for n in range(len(rest) + 1)]
        found = (elevations[-1] != 0, min(elevations) < 0)
        assert (
            found
            == {"balanced": (False, False), "count": (True, False), "order": (False, True), "both": (True, True)}[
                demo.KINDS[kind]
            ]
        )
    shown = demo.make_strings(400, seed=3, held_out=False)
    assert not {tuple(row) for row in shown.ids.tolist()} & {tuple(row) for row in strings.ids.tolist()}


def test_too_few_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("indirect_object").main(["--pairs", "1", "--out", str(tmp_path)])
    assert "means need at least 2" in capsys.readouterr().err


def test_without_matplotlib_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo broke off in its imports, with a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        load("indirect_object").main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "the package 'matplotlib' is needed here and is not installed" in told
    assert "pip install 'hooklens[plot]'" in told
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        load("indirect_object").main(["--model", "bundled:tiny-lama", "--out", str(tmp_path / "out")])
    assert "Did you mean 'tiny-llama'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "mlp_restores", "mover"),
    [
        ("tiny-gpt-neox", True, 2),
        pytest.param("tiny-llama", True, None, marks=pytest.mark.long),
        pytest.param("tiny-falcon", False, 0, marks=pytest.mark.long),
    ],
)
def test_factual_recall(
    name: str, mlp_restores: bool, mover: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two models the first MLP at the country looks the fact up; in the third, attention reads it off the name."""
    demo = load("factual_recall")
    numbers = demo.main(["--model", f"bundled:{name}", "--draws", "2", "--out", str(tmp_path)])
    assert numbers["clean"] > 0.95
    assert numbers["noised"] < 0.5
    assert numbers["MLP at the country"] == 0
    assert (numbers["MLP restores"] > 0.8) is mlp_restores
    assert (numbers["MLP restores"] < 0.3) is not mlp_restores
    # What the country's token carries goes to the last token by attention, and by nothing else.
    assert numbers["held attention at the last token"] == pytest.approx(numbers["noised"], abs=0.05)
    assert numbers["attention names"] > 0.7
    if mover is not None:
        assert numbers["attention at the end"] == mover
        assert numbers["attention restores"] > 0.8
    figures = {"1_traces.png", "2_reading.png", "traces.csv", "reading.csv", "settings.csv"}
    assert {path.name for path in tmp_path.iterdir()} == figures
    printed = capsys.readouterr().out
    assert [line for line in range(1, 6) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)


def test_noise_is_on_the_country_alone() -> None:
    """The position is that of the country, and its activation goes back to what it is without noise, bit for bit."""
    demo = load("factual_recall")
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
    with torch.no_grad():
        task = demo.make_task(model, demo.TEMPLATE, noise=3.0, draws=1, seed=0)
        assert model.to_str_tokens(task.tokens[0])[task.subject].strip() == next(iter(demo.choose_facts(model)))
        clean, noised = task.record([]), task.record([task.corruption])
        changed = (clean["resid_pre", 0] != noised["resid_pre", 0]).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == [task.subject]
        # With the embedding as it was nothing is left of the noise.
        restored = task.probability([task.corruption, demo.put_back(clean, "stream", 0, task.subject)])
        assert restored == task.probability([])


@pytest.mark.parametrize("name", ["tiny-gpt-neox", pytest.param("tiny-llama", marks=pytest.mark.long)])
def test_steering_vector(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vector beats random ones of its length within the limit of damage; it is baked where there is a bias for it."""
    demo = load("steering_vector")
    numbers = demo.main(["--model", f"bundled:{name}", "--neutral", "6", "--out", str(tmp_path / "out")])
    assert numbers["right"] > 0.95
    assert numbers["wrong"] < 0.01
    assert numbers["kl"] <= 1.5
    assert numbers["effect"] > 0.25
    assert numbers["effect"] > 5 * numbers["random"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"strengths.png", "strengths.csv", "vector.safetensors"}
    if name == "tiny-gpt-neox":
        assert numbers["baked"] == pytest.approx(numbers["effect"], abs=1e-4)
        assert "baked" in files
    else:
        assert math.isnan(numbers["baked"])
    printed = capsys.readouterr().out
    assert [line for line in range(1, 6) if f"{line}. " not in printed] == []
    check_question_and_answer(printed)
    with pytest.raises(SystemExit):
        demo.main(["--neutral", "0", "--out", str(tmp_path / "none")])
    assert "--neutral is 0" in capsys.readouterr().err
