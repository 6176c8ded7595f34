"""One forward and backward pass of the heaviest pack before the first step, so that memory runs out at once, or never.

It is a micro-step of weight zero: its gradients are zeros, which those of the first step are added to, so that no
result changes. Samples keep their order, which putting the longest ones first would change.
"""

from __future__ import annotations

from dataclasses import replace

import deepspeed

from llava_train.data.feature_cache import FeatureCache
from llava_train.train.heaviest import PackShape, imitate
from llava_train.train.out_of_memory import noted
from llava_train.train.world import World


def dry_run(
    engine: deepspeed.DeepSpeedEngine, world: World, shape: PackShape, features: FeatureCache | None = None
) -> None:
    """Runs a pack of that shape through the engine and back, to no effect. Every rank must call it, before a step.

    Args:
        features: where packs have those of their pictures from, if the vision tower does not run.

    Raises RanOut.
    """
    world.beat("the dry run of the heaviest pack")
    pack = imitate(shape, engine.module.llava.config.image_token_id, world.device)
    if features:
        blank = features.blank().to(world.device)
        pack = replace(pack, pixel_values=None, features=blank.expand(max(1, shape.n_images), *blank.shape))
    with noted("the dry run of the heaviest pack", pack):
        engine.set_gradient_accumulation_boundary(False)
        loss, _ = engine(**pack.model_inputs(), scale=0.0)
        engine.backward(loss, scale_wrt_gas=False)
