"""The benchmarks that say how costs grow, and what an accelerator shows, run at toy sizes."""

import json

import pytest

from tests.bench import device, scale

pytestmark = pytest.mark.slow


def test_curves_have_every_step_and_axis(capsys):
    assert scale.main(["--toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {axis for axis, sizes in scale.TOY.items() if sizes}
    for rows in found.values():
        for took in rows.values():
            assert took
            assert all(seconds >= 0 for seconds in took.values())
    assert scale.FULL.keys() == scale.TOY.keys()


def test_what_a_device_shows_is_measured_without_a_failure(tmp_path, capsys):
    assert device.main(["--toy", "--json", str(tmp_path / "device.json")]) == 0
    written = json.loads((tmp_path / "device.json").read_text())
    assert "exact in float32, error against the CPU" in capsys.readouterr().out
    assert not [name for name in written["numbers"] if "FAILED" in name]
    errors = {k: v for k, v in written["numbers"].items() if "exact in float32" in k}
    assert errors
    assert max(errors.values()) < 1e-4
    assert {"device", "torch", "seconds"} == written["about"].keys()
