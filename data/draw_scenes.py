"""Draws scenes of coloured shapes: captions for stage 1, conversations for stage 2, and held-out scenes.

    python data/draw_scenes.py --out data/scenes

A scene has one to three objects, each in a quadrant of its own. Eight of the 48 combinations of colour and shape
are held out: training never draws or names one, the held-out scenes show nothing else, so a right answer there
was not learnt by heart. Existence and count are answered with what is seen first, then with the verdict
(`blue square: no`): a small model learns to read a picture much sooner than to compare it with a question.
Verdicts are balanced, so that guessing without the picture is poor, and no turn of a training conversation gives
away all that a later turn asks for.

`plan_*` and the functions below them decide, from a seed alone; `scene_pictures` draws; `main` writes LLaVA's JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scene_pictures import COLOURS, QUADRANTS, SHAPES, Kind, Scene, Thing, draw_scene

PLURALS = {"cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three")

COMBINATIONS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT: tuple[Kind, ...] = tuple((list(COLOURS)[i % len(COLOURS)], shape) for i, shape in enumerate(SHAPES))
"""Eight combinations: each shape once, each colour once or twice."""
TRAINING: tuple[Kind, ...] = tuple(kind for kind in COMBINATIONS if kind not in HELD_OUT)

DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")


@dataclass(frozen=True)
class Turn:
    """A question of a kind (colour, shape, position, count, existence, relation) and its true answer."""

    kind: str
    question: str
    answer: str


def plan_scene(rng: random.Random, n_things: int, kinds: Sequence[Kind]) -> Scene:
    """A scene of `n_things` objects of the given kinds, each in its own quadrant."""
    quadrants = sorted(rng.sample(list(QUADRANTS), n_things), key=list(QUADRANTS).index)
    things = []
    for quadrant in quadrants:
        colour, shape = rng.choice(kinds)
        radius = rng.uniform(0.34, 0.46)
        room = 0.48 - radius
        things.append(
            Thing(
                colour,
                shape,
                quadrant,
                radius,
                rng.uniform(-room, room),
                rng.uniform(-room, room),
                rng.uniform(-12, 12),
                (rng.randint(-20, 20), rng.randint(-20, 20), rng.randint(-20, 20)),
            )
        )
    light = rng.randint(205, 250)
    background = tuple(min(255, light + rng.randint(-8, 8)) for _ in range(3))
    return Scene((background[0], background[1], background[2]), tuple(things))


def plan_caption(scene: Scene) -> str:
    """`red circle, top left`; several objects in reading order, with semicolons."""
    return "; ".join(f"{thing.colour} {thing.shape}, {thing.quadrant}" for thing in scene.things)


def plan_conversation(rng: random.Random, scene: Scene, kinds: Sequence[Kind]) -> list[Turn]:
    """Turns of a training conversation: the kinds of question that apply, less what an earlier turn gives away.

    Where an object stands and how two stand to each other is easy to see: it is asked less often.
    """
    asked = [*all_questions(rng, scene, kinds), _existence(rng, scene, kinds), _count(rng, scene)]
    turns = [turn for turn in asked if turn.kind not in ("position", "relation") or rng.random() < 0.5]
    rng.shuffle(turns)
    kept: list[Turn] = []
    for turn in turns:
        if not gives_away(kept, turn):
            kept.append(turn)
    return kept


def gives_away(earlier: Sequence[Turn], turn: Turn) -> bool:
    """Whether earlier turns name all that must be seen for the answer of `turn`; for a relation they never do."""
    said = " ".join(word for t in earlier for word in (t.question, t.answer))
    seen = turn.answer.partition(":")[0]
    return turn.kind != "relation" and all(word in said for word in seen.replace(",", "").split())


def all_questions(rng: random.Random, scene: Scene, kinds: Sequence[Kind]) -> list[Turn]:
    """One question of every kind that applies to a scene. `kinds` are those that may be named."""
    turns = [
        _colour(rng, scene),
        _shape(rng, scene),
        _position(rng, scene),
        _existence(rng, scene, kinds),
        _count(rng, scene),
        _relation(rng, scene),
    ]
    return [turn for turn in turns if turn is not None]


def _colour(rng: random.Random, scene: Scene) -> Turn | None:
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    named = "object" if len(shapes) == 1 else thing.shape
    return Turn("colour", f"What colour is the {named}?", thing.colour)


def _shape(rng: random.Random, scene: Scene) -> Turn | None:
    colours = [thing.colour for thing in scene.things]
    unique = [thing for thing in scene.things if colours.count(thing.colour) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    named = "object" if len(colours) == 1 else f"{thing.colour} object"
    return Turn("shape", f"What shape is the {named}?", thing.shape)


def _position(rng: random.Random, scene: Scene) -> Turn | None:
    unique = _unique(scene)
    if not unique:
        return None
    thing = rng.choice(unique)
    return Turn("position", f"Where is the {thing.colour} {thing.shape}?", thing.quadrant)


def _existence(rng: random.Random, scene: Scene, kinds: Sequence[Kind]) -> Turn:
    """Of a colour, a shape or both; yes half of the time.

    At least half of the absent combinations share a colour or shape with a present one.
    """
    named = rng.choice(("colour", "shape", "both"))
    present = _seen(scene, named)
    if named == "colour":
        name = _present_or_absent(rng, present, tuple(COLOURS))
        asked = f"{name} object"
    elif named == "shape":
        name = asked = _present_or_absent(rng, present, SHAPES)
    else:
        absent = [kind for kind in kinds if " ".join(kind) not in present]
        like = [kind for kind in absent if any(kind[0] == t.colour or kind[1] == t.shape for t in scene.things)]
        other = rng.choice(like if like and rng.random() < 0.5 else absent)
        name = asked = rng.choice(present) if rng.random() < 0.5 else " ".join(other)
    answer = "yes" if name in present else "no"
    return Turn("existence", f"Is there {_article(asked)} {asked}?", f"{', '.join(present)}: {answer}")


def _count(rng: random.Random, scene: Scene) -> Turn:
    """Of a colour or a shape, absent ones as often as present ones; of all objects when there are several."""
    if len(scene.things) > 1 and rng.random() < 0.2:
        present = _seen(scene, "both")
        return Turn("count", "How many objects are there?", f"{', '.join(present)}: {NUMBERS[len(present)]}")
    named, possible = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
    present = _seen(scene, named)
    name = _present_or_absent(rng, present, possible)
    asked = f"{name} objects" if named == "colour" else PLURALS.get(name, f"{name}s")
    return Turn("count", f"How many {asked} are there?", f"{', '.join(present)}: {NUMBERS[present.count(name)]}")


def _seen(scene: Scene, named: str) -> list[str]:
    """What must be seen of each object for a question that names a `colour`, a `shape` or `both`, in reading order."""
    return [" ".join(t.kind) if named == "both" else t.colour if named == "colour" else t.shape for t in scene.things]


def _relation(rng: random.Random, scene: Scene) -> Turn | None:
    """Left and right of objects in different columns, above and below in different rows; true half of the time."""
    unique = _unique(scene)
    if len(unique) < 2:
        return None
    a, b = rng.sample(unique, 2)
    (column_a, row_a), (column_b, row_b) = QUADRANTS[a.quadrant], QUADRANTS[b.quadrant]
    pairs = []
    if column_a != column_b:
        pairs.append(("left of", "right of") if column_a < column_b else ("right of", "left of"))
    if row_a != row_b:
        pairs.append(("above", "below") if row_a < row_b else ("below", "above"))
    true, false = rng.choice(pairs)
    relation, answer = (true, "yes") if rng.random() < 0.5 else (false, "no")
    return Turn("relation", f"Is the {a.colour} {a.shape} {relation} the {b.colour} {b.shape}?", answer)


def _unique(scene: Scene) -> list[Thing]:
    """The objects that their colour and shape tell apart from all others."""
    kinds = [thing.kind for thing in scene.things]
    return [thing for thing in scene.things if kinds.count(thing.kind) == 1]


def _present_or_absent(rng: random.Random, present: Sequence[str], possible: Sequence[str]) -> str:
    absent = [name for name in possible if name not in present]
    return rng.choice(list(present) if rng.random() < 0.5 else absent)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption_row(seed: str, n_most: int, kinds: Sequence[Kind], name: str) -> tuple[dict[str, Any], Scene]:
    """A row of captions in LLaVA's format, and its scene."""
    rng = random.Random(seed)
    scene = plan_scene(rng, rng.randint(1, n_most), kinds)
    turns = [Turn("caption", rng.choice(DESCRIBE), plan_caption(scene))]
    return _row(name, turns), scene


def conversation_row(seed: str, share_single: float, name: str) -> tuple[dict[str, Any], Scene]:
    """A training conversation in LLaVA's format, and its scene."""
    rng = random.Random(seed)
    n_things = 1 if rng.random() < share_single else rng.randint(2, 3)
    scene = plan_scene(rng, n_things, TRAINING)
    return _row(name, plan_conversation(rng, scene, TRAINING)), scene


def held_out_row(seed: str, n_things: int, name: str) -> tuple[dict[str, Any], Scene]:
    """A held-out scene of unseen combinations with a question of each kind, to be asked one by one."""
    rng = random.Random(seed)
    scene = plan_scene(rng, n_things, HELD_OUT)
    turns = all_questions(rng, scene, HELD_OUT)
    size = f"{n_things} object{'s' if n_things > 1 else ''}"
    return {**_row(name, turns), "categories": [f"{turn.kind}, {size}" for turn in turns]}, scene


def _row(name: str, turns: Sequence[Turn]) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(turns):
        messages.append({"from": "human", "value": ("" if number else "<image>\n") + turn.question})
        messages.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": f"images/{name}.png", "conversations": messages}


def plan_files(arguments: argparse.Namespace) -> Iterator[tuple[str, list[tuple[dict[str, Any], Scene]]]]:
    """Yields each JSON file's name with its rows and their scenes."""
    seed, single = arguments.seed, arguments.single
    yield (
        "captions.json",
        [
            caption_row(f"{seed}-caption-{i}", arguments.caption_objects, TRAINING, f"caption-{i:05}")
            for i in range(arguments.captions)
        ],
    )
    yield (
        "conversations.json",
        [
            conversation_row(f"{seed}-conversation-{i}", single, f"conversation-{i:05}")
            for i in range(arguments.conversations)
        ],
    )
    yield (
        "held_out.json",
        [held_out_row(f"{seed}-held-out-{i}", 1 + i % 3, f"held-out-{i:05}") for i in range(arguments.held_out)],
    )
    yield (
        "held_out_captions.json",
        [caption_row(f"{seed}-held-out-caption-{i}", 1, HELD_OUT, f"held-out-caption-{i:05}") for i in range(64)],
    )


def _save(job: tuple[Scene, Path]) -> None:
    scene, path = job
    draw_scene(scene).save(path, compress_level=1)


def card_of(arguments: argparse.Namespace) -> str:
    """What decides every byte of the output: the arguments and the scripts."""
    scripts = [Path(__file__), Path(__file__).with_name("scene_pictures.py")]
    digest = hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest()
    wanted = {name: value for name, value in vars(arguments).items() if name != "out"}
    return json.dumps({**wanted, "script": digest}) + "\n"


def draw_all(out: Path, arguments: argparse.Namespace) -> None:
    """Draws everything into a temporary folder and renames it: `out` is whole or absent."""
    temporary = out.with_name(out.name + ".drawing")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "images").mkdir(parents=True)
    jobs = []
    for file_name, rows in plan_files(arguments):
        (temporary / file_name).write_text(json.dumps([row for row, _ in rows], indent=1) + "\n", encoding="utf-8")
        jobs += [(scene, temporary / str(row["image"])) for row, scene in rows]
    with multiprocessing.Pool() as pool:
        for _ in pool.imap_unordered(_save, jobs, chunksize=64):
            pass
    (temporary / "scenes.json").write_text(card_of(arguments), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _path(text: str) -> Path:
    """A path; a shell leaves `~` in quotes and behind `--out=`."""
    return Path(text).expanduser()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=_path, default=Path("data/scenes"), help="folder to write (default %(default)s)")
    parser.add_argument("--captions", type=int, default=8000, help="training pictures with captions")
    parser.add_argument("--conversations", type=int, default=6000, help="training pictures with conversations")
    parser.add_argument("--held-out", type=int, default=300, help="held-out pictures with questions")
    parser.add_argument("--caption-objects", type=int, default=1, choices=(1, 2, 3), help="most objects to caption")
    parser.add_argument("--single", type=float, default=0.7, help="share of conversations about one object")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if min(arguments.captions, arguments.conversations, arguments.held_out) < 1:
        parser.error("--captions, --conversations and --held-out are at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    card = out / "scenes.json"
    if card.is_file() and card.read_text(encoding="utf-8") == card_of(arguments):
        print(f"{out}: already drawn")
        return
    if out.exists() and not card.is_file():
        raise SystemExit(f"error: {out} exists but was not drawn by this script; name another folder with --out")
    draw_all(out, arguments)
    n_pictures = sum(1 for _ in (out / "images").iterdir())
    print(f"{out}: drew {n_pictures:,} pictures, for captions.json, conversations.json and held_out.json")


if __name__ == "__main__":
    main()
