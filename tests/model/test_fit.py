from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_train.model.fit import misfits

SHAPES = st.dictionaries(
    st.sampled_from(["a.weight", "b.bias", "model.embed_tokens.weight", "lm_head.weight"]),
    st.tuples(st.integers(1, 400), st.integers(1, 2)),
)


@given(SHAPES)
def test_every_model_fits_itself(shapes: dict) -> None:
    assert not list(misfits(shapes, shapes, 10_000))


@given(ours=SHAPES, theirs=SHAPES, n_own=st.integers(0, 400))
def test_what_fits_can_be_copied(ours: dict, theirs: dict, n_own: int) -> None:
    if list(misfits(ours, theirs, n_own)):
        return
    assert ours.keys() == theirs.keys()
    for name, shape in ours.items():
        if shape != theirs[name]:
            assert name in ("model.embed_tokens.weight", "lm_head.weight")
            assert theirs[name][0] >= n_own
            assert abs(shape[0] - theirs[name][0]) <= 128
            assert shape[1] == theirs[name][1]
