from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.scripts import load_script
from tests.tiny import stage_content, write_data

step = load_script("benchmarks/step.py")
SHAPE = {"shape": "tiny", "stage": "lora", "batch": 6, "max_tokens": 600, "zero": 0, "kernels": "eager"}
ASKED = {**SHAPE, "recompute": "none", "config": None, "overrides": [], "steps": 3, "warmup": 1, "pairs": 4}


@pytest.mark.parametrize("asked", ["a shape", "a stage file"])
def test_parts_of_a_step_add_up_to_it(asked: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(stage_content(write_data(tmp_path, 12), checkpoint={"every": None})))
    found = step.measure(Namespace(**{**ASKED, "config": path if asked == "a stage file" else None}))
    *parts, whole = found["parts_s"].values()
    assert sum(parts) == pytest.approx(whole)
    assert all(seconds > 0 for name, seconds in found["parts_s"].items() if name not in ("rest", "head and loss"))
    assert found["parts_s"]["backward"] > found["parts_s"]["copies"]
    assert 0.2 < found["overhead"]["median"] < 5 and found["overhead"]["pairs"] == 4


def test_the_bare_loop_takes_the_steps_that_ours_takes(tmp_path: Path) -> None:
    """Else the ratio of their times would compare two different works."""
    import torch

    from llava_train.train.world import start_distributed

    asked = Namespace(**{**ASKED, "stage": "full"})
    trained = []
    for turn in ("bare", "ours"):
        rig, batches, _ = step.opened(asked, start_distributed(), str(tmp_path))
        rig.config.run_dir.mkdir(parents=True, exist_ok=True)
        with step.Tracking(rig.config, rig.world, 0, 1) as tracker:
            steps = step.Steps(rig, tracker)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step.loop_module, "lr_factor", lambda *_: 0.5)
                for batch in batches:
                    getattr(steps, turn)(batch)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in rig.llava.model.parameters()]))
    torch.testing.assert_close(*trained)
