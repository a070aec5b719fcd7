"""A recipe of a few seconds, for tests that change one key of it."""

import pytest

RECIPE = """
model: {library: timm, id: cifar_resnet20, task: image-classification, pretrained: false}
data: {id: sklearn/digits, num_train: 64, num_test: 32}
criterion: {name: taylor, num_samples: 24, batch_size: 16}
budget: {structures: 0.6}
rebuild: {method: null}
finetune: {epochs: 0, recalibrate_norm: false}
evaluate: {metrics: [loss], latency: false}
output: {dir: OUTPUT, figures: false}
"""


@pytest.fixture
def recipe(tmp_path):
    """Its path; the output goes beside it, to ``out``."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))
    return path
