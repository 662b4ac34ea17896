"""Progress bars: when they are drawn and when not, and that every function that may take long asks at the one door."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqdm.std

import hooklens as hl
from hooklens import alignment, evaluation, patching, progress, sae, steering, training, verification
from hooklens.analysis import lens, task_vectors
from hooklens.bundled.train import Recipe
from hooklens.bundled.train import train as train_bundled
from hooklens.datasets.recording import record
from hooklens.errors import InputError
from hooklens.patching import known
from hooklens.pool.comparing.compare import compare_models
from hooklens.verification import conformance
from hooklens.weights import merging
from tests.alignment.pair_model import make_pair_model
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens
from tests.source_tree import SourceTree
from tests.steering.sentences import NEGATIVE, POSITIVE, word_model
from tests.training.networks import make_model as make_trainee
from tests.training.networks import make_rows

PACKAGE = Path(hl.__file__).parent


class Screen(io.StringIO):
    """What stands for stderr."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def drawn_at_once(monkeypatch):
    """No run here lasts as long as bars wait for."""
    monkeypatch.setattr(progress, "DELAY", 0)


def draw(monkeypatch, *, is_terminal: bool = False, **options) -> str:
    """What three steps write."""
    screen = Screen(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.progress_bar("counting", range(3), **{"progress": True, **options}) as bar:
        for _ in bar:
            pass
    return screen.getvalue()


def test_a_short_run_draws_nothing(monkeypatch):
    assert draw(monkeypatch) == ""
    assert draw(monkeypatch, stays=True, is_terminal=True) == ""


def test_a_long_run_draws_its_bar_on_stderr(monkeypatch, drawn_at_once, capsys):
    text = draw(monkeypatch, unit="cell")
    assert "counting" in text
    assert "3/3" in draw(monkeypatch, unit="cell", stays=True)
    assert "cell" in text
    assert capsys.readouterr().out == ""


def test_bars_of_calls_without_a_say_are_for_terminals(monkeypatch, drawn_at_once):
    assert draw(monkeypatch, progress=None) == ""
    assert "counting" in draw(monkeypatch, progress=None, is_terminal=True)
    assert draw(monkeypatch, progress=False, is_terminal=True) == ""


def test_the_switch(monkeypatch, drawn_at_once):
    with hl.progress_bars(False):
        assert draw(monkeypatch) == ""
        assert draw(monkeypatch, progress=None, is_terminal=True) == ""
        with hl.progress_bars(True):
            assert draw(monkeypatch) != ""
            assert draw(monkeypatch, progress=False) == ""
        assert draw(monkeypatch) == ""
    assert draw(monkeypatch) != ""
    with pytest.raises(RuntimeError), hl.progress_bars(False):
        raise RuntimeError
    assert draw(monkeypatch) != ""
    hl.progress_bars(False)
    try:
        assert draw(monkeypatch) == ""
    finally:
        hl.progress_bars(None)
    assert draw(monkeypatch) != ""
    for wrong in (0, 1, "off"):
        with unchecked(), pytest.raises(InputError, match=f"shown is {wrong!r}, expected True, False or None"):
            hl.progress_bars(wrong)


@pytest.mark.parametrize(("said", "shown"), [("0", False), ("off", False), (" False ", False), ("1", True), ("", True)])
def test_the_environment(monkeypatch, drawn_at_once, said, shown):
    monkeypatch.setenv(progress.VARIABLE, said)
    assert bool(draw(monkeypatch)) is shown
    with hl.progress_bars(not shown):
        assert bool(draw(monkeypatch)) is not shown


def test_an_environment_that_says_neither(monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, "maybe")
    with pytest.raises(InputError, match="HOOKLENS_PROGRESS is 'maybe', expected 0"):
        draw(monkeypatch)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_interrupt_closes_the_bar(monkeypatch, drawn_at_once, kind):
    """A bar left open stayed in the list of open ones as long as the traceback, and moved the next one down a line."""
    bars = []

    def count() -> None:
        with progress.progress_bar("counting", range(3), progress=True) as bar:
            bars.append(bar)
            for _ in bar:
                raise kind

    monkeypatch.setattr(sys, "stderr", Screen())
    with pytest.raises(kind):
        count()
    assert bars[0] not in type(bars[0])._instances


NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("error")
# What tqdm takes for a notebook's kernel.
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: None)
{widgets}
from hooklens import progress
progress.DELAY = 0
with progress.progress_bar("counting", range(3), progress=True) as bar:
    print(type(bar).__module__, [each for each in bar])
"""


def test_a_notebook_without_widgets_gets_text_and_no_warning():
    """`tqdm.auto` warned in red that IProgress was not found."""
    code = NOTEBOOK.format(widgets='sys.modules["ipywidgets"] = None')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tqdm.std [0, 1, 2]\n"
    assert "counting" in done.stderr


def test_a_notebook_with_widgets_gets_one(monkeypatch):
    pytest.importorskip("ipywidgets")
    code = NOTEBOOK.format(widgets="").replace('sys.modules["IPython"] = ', "import IPython; fake = ")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tqdm.auto [0, 1, 2]\n" in done.stdout


IN_A_KERNEL = """
import time, warnings
import hooklens.progress as progress
progress.DELAY = 0
with progress.progress_bar("probing", range(3), progress={progress}) as bar:
    for _ in bar:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("has_widgets", [False, True])
def test_in_a_real_kernel(tmp_path, monkeypatch, has_widgets):
    """A cell's outputs: a widget, or a line of text where there is no ipywidgets; never a red warning."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    if not has_widgets:
        (tmp_path / "ipywidgets.py").write_text("raise ImportError('No module named ipywidgets')\n")
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    cells = [nbformat.v4.new_code_cell(IN_A_KERNEL.format(progress=shown)) for shown in ("True", "False")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    drawn, silent = (cell.outputs for cell in notebook.cells)
    assert silent == []
    text = "".join(one.get("text", "") for one in drawn)
    assert "Warning" not in text
    widgets = [one for one in drawn if "application/vnd.jupyter.widget-view+json" in one.get("data", {})]
    assert bool(widgets) == has_widgets
    assert ("probing:   0%|" in text) == (not has_widgets)


def test_the_bars_of_downloads_follow_the_switch(monkeypatch):
    assert progress.hub_bars() == {}
    with hl.progress_bars(False):
        kind = progress.hub_bars()["tqdm_class"]
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    # As huggingface_hub opens its own.
    with kind(total=3, desc="Fetching", disable=False, name="huggingface_hub.snapshot_download") as bar:
        bar.update(3)
    assert screen.getvalue() == ""


def test_nobody_else_imports_tqdm():
    tree = SourceTree(PACKAGE)
    found = {
        module.name
        for module in tree.modules.values()
        for node in (ast.walk(module.tree) if "tqdm" in module.source else ())
        if (isinstance(node, ast.Constant) and str(node.value).split(".")[0] == "tqdm" and "\n" not in str(node.value))
        or (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "tqdm")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "tqdm" for alias in node.names))
    }
    assert found == {"hooklens.progress"}


# ---- every function that has an argument for it

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
METRIC = patching.LogitDiff(3, 5)
GIVEN = {"model": MODEL, "clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC}
STATES = [{name: one.clone() for name, one in MODEL.named_weights().items()} for _ in range(2)]


# Made here, without a bar that would come first.
SCORES = patching.edge_attribution(**GIVEN, progress=False)
CIRCUIT = SCORES.circuit(3)
ESTIMATE = patching.attribution(**GIVEN, sites="z", progress=False)
VECTORS = steering.fit(word_model(), POSITIVE, NEGATIVE, at="blocks.0.hook_resid_post", progress=False)
ONE_STEP = training.TrainConfig(steps=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of training, and room for results."""
    place = tmp_path_factory.mktemp("progress")
    training.train(make_trainee(), [make_rows()[:2]], ONE_STEP, folder=place / "run", progress=False)
    return place


def score_file(shown: bool, folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"context": "Mary met", "continuation": " John"}\n')
    evaluation.score_file(
        word_model(), folder / "in.jsonl", folder / f"{shown}.jsonl", prefix="Anna said", progress=shown
    )


def align(shown: bool, run) -> None:
    pairs = make_pair_model()
    rows = alignment.Counterfactuals.draw(pairs.causal_model, pairs.prompts, 8, variables=["first"])
    run(pairs.model, rows, shown)


def sweep_strength(shown: bool) -> None:
    metric = patching.LogitDiff("Mary", "John")
    steering.sweep_strength(word_model(), VECTORS, POSITIVE, [1.0], metric, neutral=NEGATIVE, progress=shown)


def sweep_latents(shown: bool) -> None:
    dictionary = sae.SAE(sae.SAEConfig(d_in=MODEL.cfg.d_model, d_sae=3))
    splice = dictionary.at("blocks.0.hook_resid_post")
    sae.sweep_latents(MODEL, splice, CLEAN, CORRUPTED, lambda logits: logits[:, -1, 3], latents=[1], progress=shown)


UNITS = ["blocks.0.mlp.hook_post"]
UNIT_SCORES = patching.score_units(**GIVEN, names=UNITS, progress=False)
CALLS = {
    "alignment.das.train.train_das": lambda shown, _: align(
        shown,
        lambda model, rows, shown: alignment.train_das(
            model,
            rows,
            alignment.Site("blocks.1.hook_resid_pre", -1),
            n_dims=1,
            options=alignment.DasOptions(steps=1),
            progress=shown,
        ),
    ),
    "alignment.tables.search.search": lambda shown, _: align(
        shown,
        lambda model, rows, shown: alignment.search(
            model,
            rows,
            method="full",
            site="resid_pre",
            controls=[],
            progress=shown,
        ),
    ),
    "analysis.lens.fitted.jacobian.JacobianLens.fit": lambda shown, _: lens.JacobianLens.fit(
        MODEL, CLEAN, skip_first=1, progress=shown
    ),
    "analysis.lens.fitted.tuned.TunedLens.fit": lambda shown, _: lens.TunedLens.fit(
        MODEL, CLEAN, steps=1, held_out=0.5, progress=shown
    ),
    "analysis.lens.losses.lens_losses": lambda shown, _: lens.lens_losses(MODEL, CLEAN, progress=shown),
    "analysis.task_vectors.task_vector_directions": lambda shown, _: task_vectors.task_vector_directions(
        MODEL, make_model("grouped", seed=3), n_directions=1, progress=shown
    ),
    "bundled.train.train": lambda shown, _: train_bundled(
        "tiny-llama", Recipe(steps=2, tokens_per_step=128, row_lengths=((64, 1.0),)), progress=shown
    ),
    "datasets.recording.record": lambda shown, folder: record(
        MODEL, [[3, 4, 5], [6, 7]], "resid_post", folder / f"activations {shown}", progress=shown
    ),
    "evaluation.continuations.score_continuations": lambda shown, _: evaluation.score_continuations(
        MODEL, CLEAN[:1], [[3], [4]], progress=shown
    ),
    "evaluation.multiple_choice.multiple_choice": lambda shown, _: evaluation.multiple_choice(
        MODEL, [{"question": [1], "choices": [[2], [3]]}], progress=shown
    ),
    "evaluation.stream.score_file": score_file,
    "generation.generate.generate": lambda shown, _: MODEL.generate(CLEAN, max_new_tokens=1, verbose=shown),
    "generation.methods.TextGeneration.generate": lambda shown, _: word_model().generate(
        "Mary", max_new_tokens=1, verbose=shown
    ),
    "patching.circuits.acdc.discover_circuit": lambda shown, _: patching.discover_circuit(
        **GIVEN, threshold=5.0, progress=shown
    ),
    "patching.circuits.curve.faithfulness_curve": lambda shown, _: patching.faithfulness_curve(
        MODEL,
        CLEAN,
        CORRUPTED,
        SCORES,
        METRIC,
        sizes=[3],
        random_draws=1,
        progress=shown,
    ),
    "patching.circuits.faithfulness.evaluate_circuits": lambda shown, _: patching.evaluate_circuits(
        **GIVEN, circuits=[CIRCUIT], progress=shown
    ),
    "patching.estimates.attribution.attribution": lambda shown, _: patching.attribution(
        **GIVEN, sites="z", progress=shown
    ),
    "patching.estimates.edge_estimate.EdgeAttributionResult.check": lambda shown, _: SCORES.check(
        1, sample=1, progress=shown
    ),
    "patching.estimates.edges.edge_attribution": lambda shown, _: patching.edge_attribution(**GIVEN, progress=shown),
    "patching.estimates.estimate.AttributionResult.check": lambda shown, _: ESTIMATE.check(1, sample=1, progress=shown),
    "patching.known.check.check": lambda shown, _: known.check(known.induction(), n=4, progress=shown),
    "patching.known.clamp.train_small_algorithm": lambda shown, _: known.train_small_algorithm(
        n_values=3, steps=1, progress=shown
    ),
    "patching.known.training.train": lambda shown, _: known.train(known.induction(), steps=1, progress=shown),
    "patching.learned.learn.learn_circuit": lambda shown, _: patching.learn_circuit(
        **GIVEN, target_size=3, steps=1, progress=shown
    ),
    "patching.learned.optimal.fit_optimal_ablation": lambda shown, _: patching.fit_optimal_ablation(
        MODEL, CLEAN, CORRUPTED, CIRCUIT, steps=1, progress=shown
    ),
    "patching.paths.path.path_patch": lambda shown, _: patching.path_patch(
        **GIVEN, senders=["a0.h0"], receivers=["logits"], progress=shown
    ),
    "patching.studies.completeness.completeness": lambda shown, _: patching.completeness(
        **GIVEN, circuit=CIRCUIT, n_random=1, progress=shown
    ),
    "patching.studies.held_out.held_out_curve": lambda shown, _: patching.held_out_curve(
        **GIVEN, split=0.5, sizes=[3], random_draws=1, progress=shown
    ),
    "patching.studies.minimality.minimality": lambda shown, _: patching.minimality(
        **GIVEN, circuit=CIRCUIT, progress=shown
    ),
    "patching.studies.stability.stability": lambda shown, _: patching.stability(
        **GIVEN, size=3, n_runs=2, progress=shown
    ),
    "patching.sweeps.sweep.sweep": lambda shown, _: patching.sweep(**GIVEN, sites="z", progress=shown),
    "patching.units.evaluate.evaluate_units": lambda shown, _: patching.evaluate_units(
        **GIVEN, circuits={"one": patching.UnitCircuit({UNITS[0]: [0]})}, progress=shown
    ),
    "patching.units.scored.UnitScores.check": lambda shown, _: UNIT_SCORES.check(1, sample=1, progress=shown),
    "patching.units.scores.score_units": lambda shown, _: patching.score_units(**GIVEN, names=UNITS, progress=shown),
    "pool.comparing.compare.compare_models": lambda shown, _: compare_models(
        {"one": MODEL, "two": make_model("grouped", seed=3)}, CLEAN, progress=shown
    ),
    "sae.latents.sweep_latents": lambda shown, _: sweep_latents(shown),
    "steering.erasing.fit_erasure": lambda shown, _: steering.fit_erasure(
        word_model(), [*POSITIVE, *NEGATIVE], [0] * 4 + [1] * 4, at="blocks.0.hook_resid_post", progress=shown
    ),
    "steering.fitting.fit": lambda shown, _: steering.fit(
        word_model(), POSITIVE, NEGATIVE, at="blocks.0.hook_resid_post", progress=shown
    ),
    "steering.selection.select_direction": lambda shown, _: steering.select_direction(
        word_model(), POSITIVE, NEGATIVE, tokens=["Mary"], progress=shown
    ),
    "steering.strengths.sweep_strength": lambda shown, _: sweep_strength(shown),
    "training.keeping.sequence.Checkpoints.curve": lambda shown, folder: training.checkpoints(folder / "run").curve(
        lambda model: 1.0, progress=shown
    ),
    "training.train.train": lambda shown, _: training.train(
        make_trainee(), [make_rows()[:2]], ONE_STEP, progress=shown
    ),
    "verification.conformance.suite.run": lambda shown, _: conformance.run(
        models=conformance.of_family({"one": {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}}),
        checks=["fires once"],
        progress=shown,
    ),
    "verification.run.verify": lambda shown, _: verification.verify(
        MODEL, dtypes=[torch.float32], logits=False, gradients=False, layers=[0], progress=shown
    ),
    "weights.merging.methods.dare": lambda shown, _: merging.dare(
        STATES[0], STATES, sparsity=0.5, seed=0, progress=shown
    ),
    "weights.merging.methods.simple_average": lambda shown, _: merging.simple_average(STATES, progress=shown),
    "weights.merging.methods.slerp": lambda shown, _: merging.slerp(*STATES, t=0.5, progress=shown),
    "weights.merging.methods.task_arithmetic": lambda shown, _: merging.task_arithmetic(
        STATES[0], STATES, scaling_factor=0.5, progress=shown
    ),
    "weights.merging.methods.ties_merging": lambda shown, _: merging.ties_merging(
        STATES[0], STATES, scaling_factor=0.5, density=0.5, progress=shown
    ),
    "weights.merging.methods.weighted_average": lambda shown, _: merging.weighted_average(
        STATES, weights=[0.5, 0.5], progress=shown
    ),
}
# Commands, whose option goes to the function that they call; and what reads the options of several functions.
NOT_CALLED = {"cli.record.record", "cli.score.score", "patching.runs.options.RunOptions.read"}


def list_functions() -> set[str]:
    """The public functions that are asked whether to show how far they are, by the source."""
    found: set[str] = set()

    def collect(node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                collect(child, f"{place}.{child.name}")
            elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                arguments = zip(child.args.kwonlyargs, child.args.kw_defaults, strict=True)
                if any(one.arg in ("progress", "verbose") and default is not None for one, default in arguments):
                    found.add(f"{place}.{child.name}")

    for module in SourceTree(PACKAGE).modules.values():
        if module.part != "compat" and ("progress:" in module.source or "verbose:" in module.source):
            collect(module.tree, module.name.removeprefix("hooklens."))
    return found


def test_every_function_with_the_argument_is_called_here():
    assert list_functions() == CALLS.keys() | NOT_CALLED


class Opened(BaseException):
    """A bar was opened; past handlers of errors, which would do what is to be done for a run that failed."""


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_the_argument_is_honoured(monkeypatch, folder, name, shown):
    """The first bar that is opened is seen by whoever asks for bars, and by nobody else."""

    def count(*given, disable, **options):
        # None: of a function that this one calls, for terminals only.
        if disable is None:
            return real(*given, disable=True, **options)
        raise Opened(disable)

    real = tqdm.std.tqdm
    monkeypatch.setattr(tqdm.std, "tqdm", count)
    with pytest.raises(Opened) as found:
        CALLS[name](shown, folder)
    assert found.value.args == (not shown,)
