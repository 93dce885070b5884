"""The feature net: its training, its folder and the bundled weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.vgg import make_layers

from capipe.models.bundled import resolve
from capipe.models.tiny.train.train_vgg import (
    CONFIG,
    Classifier,
    FeaturesPlan,
    FeaturesTrainer,
    LabelledBatches,
    accuracies,
    levels,
    load_classifier,
)

PLAN = FeaturesPlan(seed=4, steps=6, images=8, warmup=1, workers=0)


def test_levels_run_from_minus_one_to_one() -> None:
    pixels = torch.tensor([[[[0, 255, 127]]]], dtype=torch.uint8)
    assert levels(pixels).flatten().tolist() == pytest.approx([-1, 1, -0.0039], abs=1e-3)


def test_a_cell_is_read_where_it_is() -> None:
    """What changes in the top left corner changes the answers for that cell and for none that is not beside it."""
    torch.manual_seed(0)
    model = Classifier().eval()
    seen = torch.zeros(1, 3, 64, 64)
    other = seen.clone()
    other[:, :, 4:8, 4:8] = 1
    before, after = model(seen)[0][0], model(other)[0][0]
    moved = [bool((before[cell] - after[cell]).abs().max() > 1e-6) for cell in range(9)]
    assert moved[0] and not any(moved[cell] for cell in (2, 5, 6, 7, 8))


@pytest.mark.slow
def test_training_resumes_where_it_was_and_exports_what_torchvision_names(tmp_path: Path) -> None:
    whole, stopped, resumed = (FeaturesTrainer(PLAN) for _ in range(3))
    list(whole.run(lambda line: None))
    for progress in stopped.run(lambda line: None):
        if progress.step == 3:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run(lambda line: None))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    whole.export(tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    features = make_layers(config["layers"], batch_norm=False)
    features.load_state_dict(load_classifier(str(tmp_path / "net")).features.state_dict())
    seen = levels(LabelledBatches(PLAN)[0].pixels)
    assert torch.allclose(features(seen), whole.model.features(seen), atol=0.02)  # float16
    assert features(seen).shape == (8, 64, 8, 8) and config == CONFIG


@pytest.mark.slow
def test_the_bundled_net_knows_shapes_and_colours() -> None:
    found = accuracies(load_classifier(resolve("tiny/vgg")), 200, seed=11)
    assert found["what"] >= 0.95 and found["color"] >= 0.97 and found["background"] >= 0.99
