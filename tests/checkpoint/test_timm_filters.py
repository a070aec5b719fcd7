"""timm's filters of weights know nothing of buffers that only a pruned model keeps in its files."""

import pytest
import timm
import torch

import sosp_hub


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_rotary_positions_of_narrower_heads_are_loaded(share, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=5).eval()
    images = torch.randn(2, 3, 28, 28)
    graph = sosp_hub.trace(model, (images,))
    kinds = ["head_dim", "residual"]
    saliency = sosp_hub.score(model, graph, [], criterion="magnitude", kinds=kinds)
    plan = sosp_hub.allocate(graph, saliency, structures=share, kinds=kinds)
    assert any(name.endswith(":head_dim") for name in plan.kept)
    pruned = sosp_hub.apply(model, graph, plan)
    sosp_hub.save_pretrained(pruned, tmp_path)
    loaded = sosp_hub.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images), pruned(images))
    assert not loaded._load_state_dict_pre_hooks  # it was for one load
