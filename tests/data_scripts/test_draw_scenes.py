"""Scenes: true and balanced answers, held-out combinations that training never shows, and honest pictures."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops

from tests.scripts import load_script

scenes = load_script("data/draw_scenes.py")
Rows = list[tuple[dict[str, Any], Any]]

CELLS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
"""(column, row), written down again: the oracle shares nothing with the script."""
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis, and the sign of (first - second) on it."""


def oracle(question: str, scene: Any) -> str | None:
    """The answer read off the scene; None if the question has not exactly one."""
    things = [(t.colour, t.shape, t.quadrant) for t in scene.things]
    numbers = ("zero", "one", "two", "three")
    colours, shapes = [t[0] for t in things], [t[1] for t in things]
    both = [f"{colour} {shape}" for colour, shape, _ in things]
    if question == "How many objects are there?":
        return f"{', '.join(both)}: {numbers[len(things)]}"
    if match := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return f"{', '.join(colours)}: {numbers[colours.count(match[1])]}"
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        name = "cross" if match[1] == "crosses" else match[1].removesuffix("s")
        return f"{', '.join(shapes)}: {numbers[shapes.count(name)]}"
    if match := re.fullmatch(r"Is there an? (\w+) object\?", question):
        return f"{', '.join(colours)}: {'yes' if match[1] in colours else 'no'}"
    if match := re.fullmatch(r"Is there an? (\w+)\?", question):
        return f"{', '.join(shapes)}: {'yes' if match[1] in shapes else 'no'}"
    if match := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return f"{', '.join(both)}: {'yes' if match[1] in both else 'no'}"
    if match := re.fullmatch(r"Is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", question):
        return _oracle_relation(things, match[1], match[2], match[3])
    return _oracle_attribute(question, things)


def verdict(answer: str) -> str:
    return answer.split(": ")[-1]


def _oracle_relation(things: list[tuple[str, str, str]], first: str, word: str, second: str) -> str | None:
    places = [[q for c, s, q in things if f"{c} {s}" == name] for name in (first, second)]
    if [len(p) for p in places] != [1, 1]:
        return None
    axis, sign = DIRECTIONS[word]
    difference = CELLS[places[0][0]][axis] - CELLS[places[1][0]][axis]
    if difference == 0:
        return None
    return "yes" if difference == sign else "no"


def _oracle_attribute(question: str, things: list[tuple[str, str, str]]) -> str | None:
    found: list[str] = []
    if question == "What colour is the object?":
        found = [t[0] for t in things]
    elif question == "What shape is the object?":
        found = [t[1] for t in things]
    elif match := re.fullmatch(r"What colour is the (\w+)\?", question):
        found = [t[0] for t in things if t[1] == match[1]]
    elif match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        found = [t[1] for t in things if t[0] == match[1]]
    elif match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        found = [t[2] for t in things if f"{t[0]} {t[1]}" == match[1]]
    return found[0] if len(found) == 1 else None


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) pairs, without the image token."""
    values = [turn["value"] for turn in row["conversations"]]
    return [(q.removeprefix("<image>\n"), a) for q, a in zip(values[::2], values[1::2], strict=True)]


@pytest.fixture(scope="module")
def planned() -> dict[str, Rows]:
    arguments = scenes.parse_arguments(["--captions", "1200", "--conversations", "2400", "--held-out", "600"])
    return dict(scenes.plan_files(arguments))


def named_kinds(text: str) -> set[tuple[str, str]]:
    pattern = rf"\b({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})\b"
    return {(m[1], m[2]) for m in re.finditer(pattern, text)}


def test_held_out_combinations_leave_each_colour_and_shape_common() -> None:
    held_out = set(scenes.HELD_OUT)
    assert len(held_out) >= 8 and held_out.isdisjoint(scenes.TRAINING)
    assert len(held_out) + len(scenes.TRAINING) == len(scenes.COLOURS) * len(scenes.SHAPES) == 48
    for part in (0, 1):
        assert max(Counter(kind[part] for kind in held_out).values()) <= 2
        values = scenes.COLOURS if part == 0 else scenes.SHAPES
        assert {kind[part] for kind in held_out} == set(values)


@pytest.mark.parametrize("name", ["captions.json", "conversations.json"])
def test_training_never_draws_or_names_a_held_out_combination(planned: dict[str, Rows], name: str) -> None:
    for row, scene in planned[name]:
        assert not {t.kind for t in scene.things} & set(scenes.HELD_OUT)
        for question, answer in turns_of(row):
            assert not named_kinds(f"{question} {answer}") & set(scenes.HELD_OUT), (row["id"], question)


@pytest.mark.parametrize("name", ["held_out.json", "held_out_captions.json"])
def test_held_out_scenes_show_and_name_nothing_else(planned: dict[str, Rows], name: str) -> None:
    for row, scene in planned[name]:
        assert {t.kind for t in scene.things} <= set(scenes.HELD_OUT)
        for question, answer in turns_of(row):
            assert named_kinds(f"{question} {answer}") <= set(scenes.HELD_OUT)


@pytest.mark.parametrize("name", ["conversations.json", "held_out.json"])
def test_every_answer_is_the_only_true_one(planned: dict[str, Rows], name: str) -> None:
    for row, scene in planned[name]:
        for question, answer in turns_of(row):
            assert oracle(question, scene) == answer, (question, answer, scene.things)


def test_the_oracle_itself_knows_a_scene() -> None:
    """A scene worked out by hand, so that script and oracle cannot be wrong together."""
    things = (scenes.Thing("red", "circle", "top left"), scenes.Thing("blue", "circle", "top right"))
    scene = scenes.Scene((240, 240, 240), things)
    expected = {
        "What shape is the red object?": "circle",
        "What colour is the circle?": None,
        "Where is the blue circle?": "top right",
        "How many circles are there?": "circle, circle: two",
        "How many crosses are there?": "circle, circle: zero",
        "Is there a red circle?": "red circle, blue circle: yes",
        "Is there a green circle?": "red circle, blue circle: no",
        "Is there a blue object?": "red, blue: yes",
        "Is there a square?": "circle, circle: no",
        "Is the red circle left of the blue circle?": "yes",
        "Is the red circle above the blue circle?": None,
    }
    assert {question: oracle(question, scene) for question in expected} == expected


def test_captions_list_the_objects_in_reading_order() -> None:
    rng = random.Random(5)
    for _ in range(50):
        scene = scenes.plan_scene(rng, 3, scenes.TRAINING)
        parts = [part.split(", ") for part in scenes.plan_caption(scene).split("; ")]
        cells = [CELLS[quadrant] for _, quadrant in parts]
        assert cells == sorted(cells, key=lambda cell: (cell[1], cell[0]))
        assert [what for what, _ in parts] == [f"{t.colour} {t.shape}" for t in scene.things]


@pytest.mark.parametrize("name", ["conversations.json", "held_out.json"])
@pytest.mark.parametrize("start", ["Is there", "Is the "])
def test_yes_and_no_are_balanced(planned: dict[str, Rows], name: str, start: str) -> None:
    answers = Counter(verdict(a) for row, _ in planned[name] for q, a in turns_of(row) if q.startswith(start))
    assert set(answers) == {"yes", "no"}
    assert 0.43 < answers["yes"] / answers.total() < 0.57, answers


def test_counts_of_one_object_scenes_are_balanced(planned: dict[str, Rows]) -> None:
    rows = [(row, scene) for row, scene in planned["conversations.json"] if len(scene.things) == 1]
    answers = Counter(verdict(a) for row, _ in rows for q, a in turns_of(row) if q.startswith("How many"))
    assert set(answers) == {"zero", "one"}
    assert 0.43 < answers["one"] / answers.total() < 0.57, answers


def test_half_of_the_absent_combinations_look_like_a_present_one(planned: dict[str, Rows]) -> None:
    alike = []
    for row, scene in planned["conversations.json"]:
        for question, answer in turns_of(row):
            match = re.fullmatch(r"Is there an? (\w+) (\w+)\?", question)
            if match and match[2] != "object" and verdict(answer) == "no":
                alike.append(any(match[1] == t.colour or match[2] == t.shape for t in scene.things))
    assert 0.5 < sum(alike) / len(alike) < 0.8


def test_no_turn_gives_away_a_later_colour_shape_or_place(planned: dict[str, Rows]) -> None:
    for row, _ in planned["conversations.json"]:
        said = ""
        for question, answer in turns_of(row):
            if question.startswith(("What", "Where")):
                assert not re.search(rf"\b{answer}(e?s)?\b", said), (row["id"], question, answer)
            said += f" {question} {answer}"


def test_conversations_have_several_turns_and_repeat_no_question(planned: dict[str, Rows]) -> None:
    lengths = Counter(len(turns_of(row)) for row, _ in planned["conversations.json"])
    assert {1, 2, 3, 4} <= set(lengths) and max(lengths) <= 8
    for row, _ in planned["conversations.json"]:
        questions = [question for question, _ in turns_of(row)]
        assert len(set(questions)) == len(questions), row["id"]


@pytest.mark.parametrize("name", ["conversations.json", "held_out.json"])
def test_no_question_names_a_part_of_the_only_object_for_the_other(planned: dict[str, Rows], name: str) -> None:
    """Training would teach from text alone that what it never shows together does not go together."""
    for row, scene in planned[name]:
        if len(scene.things) == 1:
            what = {question for question, _ in turns_of(row) if question.startswith("What")}
            assert what <= {"What colour is the object?", "What shape is the object?"}


@pytest.mark.parametrize("name", ["conversations.json", "held_out.json"])
def test_existence_is_asked_of_a_colour_of_a_shape_and_of_both(planned: dict[str, Rows], name: str) -> None:
    forms: Counter[str] = Counter()
    for row, _ in planned[name]:
        for question, _ in turns_of(row):
            if match := re.fullmatch(r"Is there an? (.+)\?", question):
                words = match[1].split()
                forms["shape" if len(words) == 1 else "colour" if words[1] == "object" else "both"] += 1
    assert min(forms[form] for form in ("colour", "shape", "both")) > 0.25 * forms.total(), forms


def test_no_turn_shows_all_that_a_later_verdict_needs(planned: dict[str, Rows]) -> None:
    for row, _ in planned["conversations.json"]:
        said = ""
        for question, answer in turns_of(row):
            if ": " in answer:
                words = re.findall(r"\w+", answer.split(": ")[0])
                assert not all(re.search(rf"\b{word}(e?s)?\b", said) for word in words), (row["id"], question)
            said += f" {question} {answer}"


def test_rows_are_in_the_format_of_llava(planned: dict[str, Rows]) -> None:
    ids: Counter[str] = Counter()
    for rows in planned.values():
        for row, _ in rows:
            ids[row["id"]] += 1
            assert row["image"] == f"images/{row['id']}.png"
            senders = [turn["from"] for turn in row["conversations"]]
            assert senders == ["human", "gpt"] * (len(senders) // 2) and senders
            values = [turn["value"] for turn in row["conversations"]]
            assert values[0].startswith("<image>\n")
            assert sum("<image>" in value for value in values) == 1
    assert max(ids.values()) == 1


def test_held_out_rows_tell_their_size_and_kinds(planned: dict[str, Rows]) -> None:
    words = {"What colour": "colour", "What shape": "shape", "Where is": "position", "How many": "count"}
    words |= {"Is there": "existence", "Is the": "relation"}
    sizes: dict[int, int] = defaultdict(int)
    for row, scene in planned["held_out.json"]:
        sizes[len(scene.things)] += 1
        size = f"{len(scene.things)} object{'s' if len(scene.things) > 1 else ''}"
        asked = [next(words[w] for w in words if re.match(rf"{w}\b", q)) for q, _ in turns_of(row)]
        assert row["categories"] == [f"{kind}, {size}" for kind in asked] and len(set(asked)) == len(asked)
    assert dict(sizes) == {1: 200, 2: 200, 3: 200}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_things=st.integers(1, 3))
def test_objects_stay_inside_a_quadrant_of_their_own(seed: int, n_things: int) -> None:
    scene = scenes.plan_scene(random.Random(seed), n_things, scenes.COMBINATIONS)
    assert len({t.quadrant for t in scene.things}) == n_things == len(scene.things)
    picture = scenes.draw_scene(scene)
    assert picture.size == (168, 168) and picture.mode == "RGB"
    for quadrant, (column, row) in CELLS.items():
        if quadrant not in {t.quadrant for t in scene.things}:
            # The outermost pixels of a quadrant may ring where antialiasing reaches over the border.
            box = (column * 84 + 4, row * 84 + 4, column * 84 + 80, row * 84 + 80)
            extrema = picture.crop(box).getextrema()
            assert all(high - low <= 2 for low, high in extrema), (quadrant, extrema)


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_pixels_have_the_colour_of_their_object(colour: str, shape: str) -> None:
    thing = scenes.Thing(colour, shape, "bottom left", radius=0.4)
    picture = scenes.draw_scene(scenes.Scene((240, 240, 240), (thing,)))
    # A ring is hollow: its colour is on the band, 0.8 radii above the centre.
    height = 126 - round(0.8 * 0.4 * 84) if shape == "ring" else 126
    pixel = picture.getpixel((42, height))
    nearest = min(
        scenes.COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(scenes.COLOURS[c], pixel, strict=True))
    )
    assert nearest == colour
    assert max(abs(a - b) for a, b in zip(scenes.COLOURS[colour], pixel, strict=True)) <= 3
    assert picture.getpixel((126, 42)) == (240, 240, 240)


def test_backgrounds_are_light_and_far_from_every_colour() -> None:
    for seed in range(300):
        background = scenes.plan_scene(random.Random(seed), 1, scenes.TRAINING).background
        assert min(background) >= 190
        distances = [sum((a - b) ** 2 for a, b in zip(background, c, strict=True)) for c in scenes.COLOURS.values()]
        assert min(distances) > 100**2


def test_colours_keep_their_name_whatever_their_tint() -> None:
    scene_tints = [
        thing.tint for seed in range(300) for thing in scenes.plan_scene(random.Random(seed), 3, scenes.TRAINING).things
    ]
    farthest = max(sum(c * c for c in tint) for tint in scene_tints)
    for a, b in itertools.combinations(scenes.COLOURS.values(), 2):
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) > 4 * farthest


def test_every_shape_looks_different() -> None:
    outlines = [
        scenes.draw_scene(scenes.Scene((255, 255, 255), (scenes.Thing("black", shape, "top left"),))).convert("L")
        for shape in scenes.SHAPES
    ]
    for a, b in itertools.combinations(outlines, 2):
        n_different = sum(value > 128 for value in ImageChops.difference(a, b).getdata())
        assert n_different > 84 * 84 * 0.03


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, scenes.__file__, "--out", str(out), "--captions", "3", "--conversations", "3"]
    return subprocess.run([*command, "--held-out", "3", *more], capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the card, which records the folder's own name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "scenes.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_seed_draws_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tmp_path / name, "--seed", seed).returncode == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and a != c
    rows = json.loads(a["captions.json"])
    assert all(row["image"] in a for row in rows)


def test_drawing_again_is_skipped_and_other_arguments_redraw(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert "drew" in run(out).stdout
    picture = out / "images" / "caption-00000.png"
    before = picture.stat().st_mtime_ns
    assert "already drawn" in run(out).stdout and picture.stat().st_mtime_ns == before
    assert "drew" in run(out, "--seed", "9").stdout and picture.stat().st_mtime_ns != before


def test_a_folder_of_someone_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
    done = run(tmp_path)
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "--out" in done.stderr
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep me"


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "scenes", "--captions", "0")
    assert done.returncode == 2 and "at least 1" in done.stderr
