from __future__ import annotations

import pytest

from tests.scripts import load_script

mix665k = load_script("benchmarks/mix665k.py")


def test_the_sources_have_the_published_rows() -> None:
    rows = {source.name: source.rows for source in mix665k.SOURCES}
    assert sum(rows.values()) == 665_298
    of_coco = ("llava_conversation", "llava_detail", "llava_reasoning", "vqav2", "okvqa", "a_okvqa", "refcoco")
    assert sum(rows[name] for name in of_coco) == 364_100


def test_the_same_seed_draws_the_same_samples() -> None:
    assert mix665k.draw_samples(50, 3) == mix665k.draw_samples(50, 3) != mix665k.draw_samples(50, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_of_a_sample_are_those_of_its_turns_its_template_and_its_image(seed: int) -> None:
    for sample in mix665k.draw_samples(2000, seed):
        questions, answers = map(sum, zip(*sample.turns, strict=True))
        template = mix665k.SYSTEM_TOKENS + mix665k.TURN_TOKENS * len(sample.turns)
        assert sample.n_tokens == questions + answers + template + 576 * sample.has_image <= 2048
        assert sample.n_supervised == answers + len(sample.turns)
        assert all(question > 0 and answer > 0 for question, answer in sample.turns)


def test_the_small_variant_has_the_mixture_that_benchmarks_ask_for() -> None:
    found = mix665k.describe(mix665k.draw_small_samples(5000, 0))
    assert (found["shortest"], found["longest"]) == (90, 700)
    assert 0.37 < found["several_turns"] < 0.43
    assert 0.05 < found["text_only"] < 0.07
