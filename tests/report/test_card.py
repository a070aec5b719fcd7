"""The card says what the report says, and nothing else."""

import copy
import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from sosp_hub.errors import HubError
from sosp_hub.pipeline.result import _both
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.report.card import _calibration, render_card
from sosp_hub.report.drawing import tick_names
from sosp_hub.report.facts import collect
from sosp_hub.report.figures import pictures
from sosp_hub.report.markers import BEGIN, END
from sosp_hub.report.matrices import draw_cka, draw_correlation
from tests.hub.conftest import make_folder
from tests.report import reports
from tests.report.test_compared import results


@pytest.fixture
def image(tmp_path):
    return make_folder(tmp_path / "digits-small", card=False)


@pytest.fixture
def text(tmp_path):
    folder = make_folder(tmp_path / "smol-small", card=False)
    reports.write(folder, *reports.text_report(layers=4))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "sosp_hub": {}}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def render(folder, **options):
    path = render_card(folder, run=False, figures=options.pop("figures", False), **options)
    return path.read_text()


def changed(folder, change):
    report = json.loads((folder / "sosp_report.json").read_text())
    change(report)
    (folder / "sosp_report.json").write_text(json.dumps(report))
    return folder


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


# ------------------------------------------------------------------------------- what it says
def test_the_headline_is_one_sentence_with_both_sides(image):
    assert (
        "46.3 % fewer parameters and 50.2 % fewer multiply-accumulates than `cifar_resnet20`; "
        "accuracy 97.8 %, from 98.3 % dense "
        "(a difference that two draws of 360 test samples may make)."
    ) in render(image)


def test_a_loss_beyond_the_spread_is_called_so(text):
    card = render(text)
    assert "perplexity 29.9, from 22.4 dense (a difference beyond what two draws of" in card
    assert "- perplexity: 22.4 → 29.9 (+33.5 %;" in card


@pytest.mark.parametrize(
    ("final", "said"),
    [
        (0.75, "that two draws of 400 test samples may make"),  # 0.05; 1.96 sqrt(2) 0.02 is 0.055
        (0.74, "beyond what two draws of 400 test samples make"),
        (0.85, "that two draws of 400 test samples may make"),
        (0.86, "beyond what two draws of 400 test samples make"),
    ],
)
def test_the_spread_of_a_difference_is_that_of_both_sides(image, final, said):
    def measured(report):
        for stage, value in (("dense", 0.8), ("final", final)):
            report["metrics"][stage] = {"accuracy": {"value": value, "n": 400, "stderr": 0.02}}

    assert f"(a difference {said})" in render(changed(image, measured))


def test_a_model_that_lost_nothing_is_not_called_better_than_measured(image):
    def same(report):
        report["metrics"]["final"] = copy.deepcopy(report["metrics"]["dense"])

    card = render(changed(image, same))
    assert "accuracy 98.3 %, from 98.3 % dense (the same on 360 test samples)" in card
    assert "None of the metrics above is worse than in the dense model." in card


def test_classes_that_lost_most_are_listed(image):
    card = render(image)
    assert "| 3 | 93.0 % (n = 36) | 87.0 % (n = 36) | \N{MINUS SIGN}6.0 points |" in card
    assert "| 4 |" not in card


def test_what_makes_up_for_the_cut_is_told(image):
    assert "What was done about it" not in render(image)
    gates = {"groups": 2, "least_gate": 0.5, "largest_gate": 1.25, "damping": 0.01}
    far = [{"divergence": 0.5}, {"divergence": 0.125, "damping": 1.0}]

    def tell(report):
        found = {"compensation": {**gates, "steps": far}, "shifted_biases": 3}
        report["plan"]["provenance"] |= found

    card = render(changed(image, tell))
    assert (
        "- gates of 2 groups, 0.50 to 1.25, are folded into the kept weights and make up for the "
        "cut (closed form, damping 0.01)\n"
        "- 1 step moved these gates on: divergence from the dense model on held-out calibration "
        "samples 0.5 to 0.125\n"
        "- 3 biases are shifted by the mean of what was cut\n"
    ) in card

    def end_at_once(report):
        report["plan"]["provenance"]["compensation"]["steps"] = far[:1]

    card = render(changed(image, end_at_once))
    assert "gates of 2 groups" in card
    assert "moved these gates on" not in card


def test_what_was_solved_again_is_told(image):
    fitted = {"inputs": 40, "kept": 20, "rows": 90, "damping": 0.01}
    layers = [
        {**fitted, "tensor": "a.weight", "error_cut": 0.5, "error": 0.125},
        {**fitted, "tensor": "b.weight", "error_cut": 0.25, "error": 0.0625, "damping": 0.3},
        {**fitted, "tensor": "c.weight", "error_cut": 0.75, "error": 0.5, "rows": 8},
        {**fitted, "tensor": "d.weight", "error_cut": 0.25, "error": 0.0625, "rows": 32},
        {**fitted, "tensor": "e.weight", "error_cut": 0.75, "error": 0.5},
    ]

    def tell(report):
        report["rebuild"] = {
            "method": "ridge", "num_samples": 1024, "layers": layers, "seconds": 2.5,
            "peak_bytes": 3_000_000, "left": {"f.weight": "it is read by an operation"},
        }  # fmt: skip

    card = render(changed(image, tell))
    assert (
        "- 5 weights that read what was cut: solved again by least squares toward the uncut "
        "output, whose squared error fell from 50.0 % to 12.5 % in the median (damping 0.01 to "
        "0.3; 1,024 calibration samples, 2.5 s, 3 MB of memory at the most)\n"
        "- 2 of them had fewer calibration rows than inputs, the worst 8 for 40\n"
        "- 1 other weight that read what was cut stayed as it was, such as"
    ) in card
    assert "operation" in card

    def nothing(report):
        report["rebuild"] = {}

    assert "What was done about it" not in render(changed(image, nothing))


def test_the_rate_that_a_probe_has_chosen_is_named(image):
    def probed(report):
        rates = [[0.001, 0.5], [0.01, 0.25], [0.1, 2.0]]
        report |= {"history": [{}], "recovery": {"rates": rates}}

    said = "at learning rate 0.01, the best of 0.001, 0.01, 0.1 after a short probe on the same"
    assert said in " ".join(render(changed(image, probed)).split())


def test_what_was_promised_is_told_in_the_unit_of_each_metric(text):
    drops = [
        {"metric": "perplexity", "amount": 0.05, "relative": True},
        {"metric": "accuracy", "amount": 0.01, "relative": False},
    ]
    kept = {
        "perplexity": {"value": 0.03, "upper": 0.045, "holds": True},
        "accuracy": {"value": 0.002, "upper": 0.008, "holds": True},
    }
    broken = {**kept, "perplexity": {"value": 0.06, "upper": 0.08, "holds": False}}

    def promised(report):
        cost = {"macs": 0.75, "params": 0.8}
        report["promise"] = {
            **{"max_drop": drops, "confidence": 0.95, "num_proof": 2000, "chosen": 0},
            "curve": [{"cost": cost, "proof": kept}, {"cost": {"macs": 0.5}, "proof": broken}],
        }

    facts = collect(json.loads((changed(text, promised) / "sosp_report.json").read_text()))
    first, measured = facts.promise
    assert "at most perplexity by 5 % and accuracy by 1 point worse, with 95 % confidence" in first
    assert measured == (
        "Measured after the cut: perplexity 3 % (at most 4.5); accuracy 0.2 points (at most 0.8)"
    )
    assert [row[-2:] for row in facts.curve.rows] == [("yes", "chosen"), ("no", "")]
    assert facts.curve.rows[1][2:4] == ("6 % (at most 8)", "0.2 points (at most 0.8)")


def test_what_masks_have_silenced_is_told(image):
    def masked(report):
        report["plan"]["provenance"]["masks"] = {
            **{"sparsity": 0.01, "num_penalized": 1500, "num_steps": 2000, "num_off": 120},
            "shares": {"macs": 0.5, "params": 0.625, "bytes": 0.75},
        }

    card = " ".join(render(changed(image, masked)).split())
    assert "0.01 in 1,500 of 2,000 steps: 120 channels are silent, which leaves 50.0 %" in card


def test_a_slower_model_says_so(image):
    def slow(report):
        report["latency"]["after"]["seconds"] = 0.021

    assert "latency: 17.1 ms → 21 ms, slower although it is smaller" in render(changed(image, slow))


def test_the_spread_of_latency_stands_below_its_table(image):
    def timed(report):
        for when, low, high in (("before", 0.017, 0.0184), ("after", 0.0093, 0.0116)):
            report["latency"][when] |= {"quartiles": [low, high], "passes": 57}

    words = (
        "The middle half of 57 times, in turn, was 17 ms to 18.4 ms a pass (dense) and 9.3 ms to "
        "11.6 ms (this model)."
    )
    assert words not in render(image)
    assert words in " ".join(render(changed(image, timed)).split())


def test_a_report_holds_the_quartiles_of_what_was_timed():
    told = _both([[4.0, 1.0, 3.0, 2.0, 5.0], [1.0] * 5], {"batch": 1})
    assert told["before"] == {"seconds": 3.0, "quartiles": [1.5, 4.5], "passes": 5, "batch": 1}
    assert told["after"]["quartiles"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("key", "absent"),
    [
        ("latency", "| Latency"),
        ("cost", "| Parameters"),
        ("criterion", "saliency(s)"),
        ("calibration", "Calibration:"),
        ("versions", "Versions:"),
        ("command", "```bash"),
        ("recipe", "<summary>Recipe"),
        ("groups", "channels:"),
        ("plan", "The floor stopped"),
        ("base", "cifar_resnet20`;"),
    ],
)
def test_what_is_not_in_the_report_is_not_on_the_card(image, key, absent):
    assert absent in render(image)
    card = render(changed(image, lambda report: report.pop(key)))
    assert absent not in card
    assert "None" not in card.replace("None of the metrics", "")
    assert "nan" not in card.lower().replace("finance", "")


@pytest.mark.parametrize("name", CRITERIA.known())
def test_every_criterion_of_a_recipe_has_words(image, name):
    changed(image, lambda report: report.update(criterion={"name": name, "options": {}}))
    assert "saliency(s) = " in render(image)


def test_the_formula_is_the_one_that_was_run(image):
    options = {"form": "squared", "gate": "weight"}
    changed(image, lambda report: report.update(criterion={"name": "taylor", "options": options}))
    card = render(image)
    assert "saliency(s) = mean over batches of (g_s)^2" in card
    assert "a gate on the structure's weights" in card
    fisher = {"name": "fisher", "options": {"per_token": True, "micro_batch_size": None}}
    changed(image, lambda report: report.update(criterion=fisher))
    card = render(image)
    assert "saliency(s) = mean over samples n of sum over tokens t of (g_nt,s)^2" in card
    assert "by `fisher` (per_token: true, micro_batch_size: null)" in card
    changed(image, lambda report: report["plan"]["provenance"].update(criterion={"per": "macs"}))
    assert "by `fisher` (per: macs, per_token: true, micro_batch_size: null)" in render(image)


def test_an_empty_report_makes_a_card_without_a_number(image):
    (image / "sosp_report.json").write_text("{}")
    card = render(image)
    assert "its quality was not measured" in card
    assert "No metric was measured." in card
    assert "Not measured: quality of this model; quality of the dense model; latency" in card
    assert "%" not in card


# -------------------------------------------------------------------------------- metadata
def test_metadata_are_inherited(text):
    data = head(render(text, repo_id="me/smol"))
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "sosp_hub"
    assert data["datasets"] == ["Salesforce/wikitext"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "perplexity", "value": 29.9, "name": "perplexity"}]
    assert result["dataset"]["split"] == "test"


@pytest.mark.parametrize(
    ("data", "split"),
    [
        ("{id: sklearn/digits}", "test"),
        ("{id: a/b, test: validation}", "validation"),
        ("{id: a/b, test: null}", "held-out 20 % of train, seed 0"),
        ("{path: .../a.csv, train: all, validation_share: 0.1}", "held-out 10 % of all, seed 0"),
        ("{path: .../folder}", "test"),
    ],
)
def test_the_split_that_was_measured_is_one_that_exists(image, data, split):
    recipe = f"model: {{id: a, task: image-classification}}\ndata: {data}\n"
    changed(image, lambda report: report.update(recipe=recipe))
    (result,) = head(render(image))["model-index"][0]["results"]
    assert result["dataset"]["split"] == split


def test_names_of_an_axis_are_short_and_differ():
    layers = [
        f"model.decoder.layers.{i}.mlp.{n}_proj:neuron" for i in (3, 12) for n in ("up", "a" * 40)
    ]
    names = tick_names([{"name": name} for name in layers])
    assert names[0] == "3.mlp.up_proj"
    assert names[2] == "12.mlp.up_proj"
    assert all(len(name) <= 29 for name in names)
    assert names[1].endswith("a_proj")
    assert tick_names([{"name": "conv1:channel"}]) == ["conv1"]
    assert tick_names([{"name": "a"}, {"name": "a.b"}]) == ["a", "a.b"]


def test_metadata_are_never_guessed(image):
    data = head(render(image))
    assert not {"license", "language", "base_model", "datasets"} & data.keys()
    assert "The licence of this model is unknown" in render(image)


@pytest.mark.parametrize("name", ["/data/llama", "./llama", "~/llama", "models/a/b"])
def test_a_local_base_model_is_not_named_but_said(image, name):
    card = render(changed(image, lambda report: report.update(base={"model": name})))
    assert "base_model" not in head(card)
    assert "was loaded from a local folder" in card
    assert "/data" not in card


def test_a_native_checkpoint_names_its_own_library(image):
    (image / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    card = render(image, repo_id="me/small")
    assert head(card)["library_name"] == "timm"
    assert 'timm.create_model("hf-hub:me/small", pretrained=True)' in card


@pytest.mark.parametrize("fixture", ["image", "text"])
def test_the_hubs_own_classes_read_the_card(fixture, request):
    folder = request.getfixturevalue(fixture)
    card = ModelCard(render(folder))
    assert card.data.tags[:2] == ["sosp_hub", "pruned"]
    assert card.data.eval_results


def test_licence_texts_of_the_base_model_are_copied(hub, text, tmp_path):
    texts = {"LICENSE": b"the words", "NOTICE.txt": b"more words"}
    hub.add_repo("lab/base", files={**texts, "model.safetensors": b"large"})
    changed(text, lambda report: report.update(base={"model": "lab/base", "license": "mit"}))
    (text / "NOTICE.txt").write_bytes(b"mine")
    render(text)
    assert (text / "LICENSE").read_bytes() == b"the words"
    assert (text / "NOTICE.txt").read_bytes() == b"mine"
    assert not any("model.safetensors" in request for request, _ in hub.log)


def test_a_base_model_out_of_reach_costs_only_its_licence_text(text, caplog):
    assert "perplexity 29.9" in render(text)
    assert "licence files could not be copied" in caplog.text


# ------------------------------------------------------------------------------- regeneration
def test_a_licence_that_a_person_has_set_is_not_the_bases(image):
    """The base's is filled in where nobody has set one, and stands back where somebody has."""
    changed(image, lambda report: report.update(base={"model": "lab/base", "license": "mit"}))
    card = render(image)
    assert head(card)["license"] == "mit"
    mine = card.replace("license: mit", "license: cc-by-nc-4.0")
    mine = mine.replace("tags:\n", "tags:\n- my-own-tag\n", 1)
    (image / "README.md").write_text(mine)
    again = head(render(image))
    assert again["license"] == "cc-by-nc-4.0"
    assert {"my-own-tag", "sosp_hub", "pruned"} <= set(again["tags"])


def test_a_licence_text_that_a_person_has_put_there_stays(hub, text, tmp_path):
    hub.add_repo("lab/base", files={"LICENSE": b"the base's", "NOTICE": b"the base's too"})
    changed(text, lambda report: report.update(base={"model": "lab/base", "license": "mit"}))
    (text / "LICENSE").write_text("mine")
    render(text)
    assert (text / "LICENSE").read_text() == "mine"
    assert (text / "NOTICE").read_text() == "the base's too"


def test_a_persons_own_text_and_metadata_survive(image):
    card = render(image)
    mine = card.replace("---\nlibrary", "---\nlicense: mit\nextra: 7\nlibrary", 1)
    mine = mine.replace(BEGIN, f"# My words\n\nbefore\n\n{BEGIN}") + "\nafter, with trailing words"
    (image / "README.md").write_text(mine)
    changed(image, lambda report: report["cost"]["after"].update(params=100_000))
    again = render(image)
    assert "63.3 % fewer parameters" in again
    assert "46.3 %" not in again
    text = again.partition("\n---\n")[2]
    assert text.startswith("\n# My words\n\nbefore\n\n<!-- sosp_hub")
    assert text.endswith(f"{END}\n\nafter, with trailing words")
    assert head(again)["license"] == "mit"
    assert head(again)["extra"] == 7
    assert "licence of this model is unknown" not in again


def test_rendering_twice_changes_nothing(image):
    assert render(image) == render(image)


def test_a_card_without_markers_is_kept_and_continued(image):
    (image / "README.md").write_text("---\ntags: [mine]\n---\n# My own card\n\nwords\n")
    card = render(image)
    assert card.index("# My own card\n\nwords") < card.index(BEGIN)
    assert head(card)["tags"][0] == "mine"
    assert "pruned" in head(card)["tags"]


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_broken_markers_are_refused_and_nothing_is_lost(image, text):
    (image / "README.md").write_text(f"# Mine\n{text}\n")
    with pytest.raises(HubError, match="once each and in this order"):
        render(image)
    assert (image / "README.md").read_text() == f"# Mine\n{text}\n"


# -------------------------------------------------------------------------------- what stays out
def test_no_token_and_no_folder_of_this_machine(image):
    def leak(report):
        report["command"] = "python -m sosp_hub.prune /home/someone/r.yaml --token hf_abcdefghijkl1"
        report["recipe"] = "data: {path: /home/someone/data/digits, note: hf_abcdefghijkl1}\n"
        report["calibration"]["data"] = "/home/someone/data/digits"
        report["latency"]["after"]["hardware"] = "hf_abcdefghijkl1"

    card = render(changed(image, leak))
    assert "hf_abc" not in card
    assert "/home" not in card
    assert "python -m sosp_hub.prune .../r.yaml --token [token removed]" in card


def test_a_folder_without_a_report(image):
    (image / "sosp_report.json").unlink()
    with pytest.raises(HubError, match=r"no sosp_report.json.*save_pretrained"):
        render(image)
    assert not (image / "README.md").exists()


# --------------------------------------------------------------------------------- the snippet
def test_a_load_snippet_that_fails_stops_the_card(image):
    (image / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    with pytest.raises(HubError, match="load snippet of the card does not run"):
        render_card(image, figures=False)
    assert not (image / "README.md").exists()


def test_the_load_snippet_of_a_real_checkpoint_runs(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "net", model_config={"num_classes": 3})
    reports.write(tmp_path / "net", *reports.image_report())
    card = render_card(tmp_path / "net", figures=False).read_text()
    assert 'timm.create_model("hf-hub:net", pretrained=True)' in card
    assert "image = torch.zeros(1, 3, 160, 160)" in card


def test_the_load_snippet_gives_half_precision_weights_an_image_of_their_type(tmp_path):
    from sosp_hub import save_pretrained

    timm = pytest.importorskip("timm")
    model = timm.create_model("cifar_resnet20", num_classes=10, in_chans=1).bfloat16()
    save_pretrained(model, tmp_path / "net")
    reports.write(tmp_path / "net", *reports.image_report())
    card = render_card(tmp_path / "net", figures=False).read_text()
    assert "dtype=next(model.parameters()).dtype" in card


# ------------------------------------------------------------------------------------- figures
@pytest.mark.slow
@pytest.mark.parametrize("make", [reports.image_report, reports.text_report])
def test_figures_are_drawn_and_shown(tmp_path, make):
    folder = make_folder(tmp_path / "net", card=False)
    reports.write(folder, *make())
    card = render(folder, figures=True)
    names = ["widths", "saliency", "recovery"]
    assert [path.stem for path in sorted((folder / "figures").iterdir())] == sorted(names)
    for name in names:
        assert f"](figures/{name}.png)" in card
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_drawn_only_from_what_was_measured(image):
    def less(report):
        for key in ("metrics", "groups"):
            report.pop(key)

    (image / "saliency.safetensors").unlink()
    card = render(changed(image, less), figures=True)
    assert list((image / "figures").iterdir()) == []
    assert "](figures/" not in card


def test_the_map_of_layers_has_borders_and_colours_what_goes():
    cka = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.6], [0.2, 0.6, 1.0]])
    partition = {
        "blocks": ("a", "b"), "cka": cka.tolist(), "borders": (0, 1),
        "norms": {"b": 3.0}, "removed": ("b",),
    }  # fmt: skip
    left, right, *_ = draw_cka(partition).axes
    np.testing.assert_array_equal(left.images[0].get_array(), cka)
    assert sorted({line.get_ydata()[0] for line in left.lines}) == [0, 0.5, 1.5]  # 0: of verticals
    assert [bar.get_width() for bar in right.patches] == [0, 3]
    assert len({bar.get_facecolor() for bar in right.patches}) == 2


def test_the_correlation_map_has_a_unit_diagonal_and_keeps_signs():
    effects = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, -2.0]])
    groups = [{"name": "a:channel", "size": 2}, {"name": "b:channel", "size": 1}]
    figure = draw_correlation(effects.T @ effects, groups)
    shown = figure.axes[0].images[0].get_array()
    expected = [[1, 0, 0.5**0.5], [0, 1, -(0.5**0.5)], [0.5**0.5, -(0.5**0.5), 1]]
    np.testing.assert_allclose(shown, expected, atol=1e-12)


def test_of_many_structures_the_correlation_map_shows_some(tmp_path, monkeypatch):
    monkeypatch.setattr("sosp_hub.report.figures.MOST_DRAWN", 4)
    groups = [{"name": "a:neuron", "size": 6}, {"name": "b:neuron", "size": 4}]
    factor = np.random.default_rng(0).normal(size=(2, 10))
    about = {"about": json.dumps({"groups": {group["name"]: group["size"] for group in groups}})}
    save_file({"factor": factor}, tmp_path / "curvature.safetensors", about)
    (found,) = [p for p in pictures({"groups": groups}, {}, tmp_path) if p.name == "correlation"]
    axes = found.draw().axes[0]
    unit = factor[:, [0, 3, 6, 9]] / np.linalg.norm(factor[:, [0, 3, 6, 9]], axis=0)
    np.testing.assert_allclose(axes.images[0].get_array(), unit.T @ unit, atol=1e-12)
    assert {line.get_xdata()[0] for line in axes.lines} >= {1.5}  # between the second and the third


def test_a_structure_without_effect_correlates_with_nothing():
    figure = draw_correlation(np.diag([1.0, 0.0]), [{"name": "a:channel", "size": 2}])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[1, 0], [0, 0]])


def test_facts_are_made_from_metrics_that_are_not_finite(image):
    def explode(report):
        report["metrics"]["cut"]["loss"]["value"] = float("inf")
        report["metrics"]["cut"]["accuracy"]["stderr"] = None

    changed(image, explode)
    facts = collect(json.loads((image / "sosp_report.json").read_text()))
    assert facts.metrics.rows[1][2] == "inf"
    render(image, figures=True)


# ------------------------------------------------------------------------------- a study beside it
def put_study(folder, text):
    (folder / "compare").mkdir()
    (folder / "compare" / "results.json").write_text(text)


@pytest.mark.parametrize(("model", "drawn"), [("cifar_resnet20", True), ("another", False)])
def test_the_curve_of_a_study_of_the_same_model_is_drawn(image, model, drawn):
    study = {**results({"a": [0.5, 0.7], "b": [0.6, 0.8]}), "model": model}
    put_study(image, json.dumps(study))
    card = render(image, figures=True)
    assert ("figures/pareto_macs.png" in card) is drawn
    assert (image / "figures" / "pareto_macs.png").is_file() is drawn


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "cifar_resnet20"}'])
def test_a_damaged_study_is_named(image, text):
    put_study(image, text)
    with pytest.raises(HubError, match=r"results\.json: .*not the results of a comparison"):
        render(image, figures=True)


def test_peak_memory_is_told_with_batch_and_type(image):
    def measured(report):
        stated = {"batch": 8, "dtype": "float32", "hardware": "Example CPU"}
        report["peak_memory"] = {
            "before": {"bytes": 4_000_000, **stated},
            "after": {"bytes": 2_500_000, **stated},
        }

    card = render(changed(image, measured))
    row = "| Peak memory of one forward pass, batch of 8, float32 | 4 MB | 2.5 MB |"
    assert row in card
    assert "latency, peak memory" not in card


def test_a_curvature_that_is_not_known_is_said():
    told = _calibration({"num_samples": 8, "curvature": "empirical", "seed": 0})
    assert told == (
        "8 samples with the empirical Fisher in place of the curvature, which is not known (seed 0)"
    )
    assert "curvature" not in _calibration({"num_samples": 8, "curvature": "squared"})


def test_a_dense_model_that_was_trained_before_the_cut_is_said_so(text):
    words = "The dense model was first trained on the same data, in the same run."
    assert words not in render(text)
    assert words in render(changed(text, lambda report: report["timings_s"].update(dense=12.0)))


def test_data_of_local_files_is_not_said_to_be_the_hub_s(text):
    recipe = (
        "model: {library: transformers, id: me/lm, task: text-generation}\n"
        "data: {id: Salesforce/wikitext, path: .../my notes.txt}\n"
    )
    card = render(changed(text, lambda report: report.update(recipe=recipe)))
    (dataset,) = [result["dataset"] for result in head(card)["model-index"][0]["results"]]
    assert dataset["name"] == "Salesforce/wikitext (local files my notes.txt)"
    assert "datasets" not in head(card)


def test_a_kind_of_which_all_is_left_is_said_in_one_word(text):
    def whole(report):
        for group in report["groups"]:
            if group["kind"] == "kv_group":
                group["kept"] = group["size"]

    assert "- KV groups: all 12 remain, in 4 groups\n" in render(changed(text, whole))


def test_one_test_sample_has_no_standard_error(image):
    def of_one(report):
        for stage in report["metrics"].values():
            for metric in stage.values():
                metric.update(n=1, stderr=None, value=1.0)

    card = render(changed(image, of_one))
    assert "±" not in card
    assert "the same on 1 test sample)" in card
    assert "One sample has no standard error. One run with one seed: nothing here says" in card
