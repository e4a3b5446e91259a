"""What adapters make of what a policy sees: resizing as each project does it, JPEG, and the memory of earlier frames."""

from __future__ import annotations

import numpy as np

from workflow_src.policies import images, pretrained


def test_resizing_by_hand_computed_weights():
    row = np.array([0, 30, 60], np.uint8)[None, :, None] * np.ones((3, 1, 3), np.uint8)
    # Thirds of a pixel: 0 and half of 30 over 1.5; then the other half of 30 and 60.
    assert images.area(row, 2)[0, :, 0].tolist() == [10, 50]
    edge = np.array([0, 100], np.uint8)[None, :, None] * np.ones((2, 1, 3), np.uint8)
    assert images.bilinear(edge, 4)[2, :, 1].tolist() == [0, 25, 75, 100]  # half-pixel centres
    assert images.bilinear(np.uint8(row.repeat(2, 1)), 3)[0, :, 0].tolist() == [0, 30, 60]
    assert images.area(edge, 4)[0, :, 0].tolist() == [0, 25, 75, 100]


def test_lanczos_overshoots_at_an_edge_and_jpeg_blurs_colour_only():
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 200
    assert 200 < images.lanczos(edge, 28).max() < 210 and images.lanczos(edge, 28).shape == (28, 28, 3)
    grey = np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8).repeat(3, 2)
    assert np.abs(images.jpeg(grey).astype(int) - grey).max() < 16
    red = grey * np.uint8([1, 0, 0])
    assert np.abs(images.jpeg(red).astype(int) - red).max() > 32  # halved chroma


def test_memory_begins_anew_where_a_step_is_asked_again():
    memory = pretrained.Memory(2, episodes=2)
    for step in range(4):
        memory.add(1, step, f"step {step}")
    assert memory.before(1, 4) == ["step 2", "step 3"] and memory.before(1, 3) == ["step 2"]
    assert memory.before(1, 0) == [] and memory.before(2, 5) == []
    memory.add(1, 0, "anew")
    assert memory.before(1, 4) == ["anew"]
    memory.add(2, 0, "other")
    memory.add(3, 0, "third")
    assert memory.before(1, 1) == [] and memory.before(3, 1) == ["third"]  # silent longest
