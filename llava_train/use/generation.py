"""Prompts and pictures -> answers, by transformers' `generate`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_train.errors import UserError
from llava_train.model.build import Llava
from llava_train.use.prompts import Prompts

_RANDOM = threading.Lock()
"""Held while torch's global random state is ours."""


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen. Temperature 0 takes the most likely token each time."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Of the random draws; None draws anew each time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{name}: {getattr(self, name)!r} is not a whole number")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                raise UserError(f"{name}: {getattr(self, name)!r} is not a number")
        problems = {
            "max_new_tokens": (self.max_new_tokens < 1, "1 or more"),
            "temperature": (not 0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (not 0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k is not None and self.top_k < 1, "1 or more"),
            "num_beams": (self.num_beams < 1, "1 or more"),
            "repetition_penalty": (not 0 < self.repetition_penalty < float("inf"), "above 0"),
        }
        for name, (is_wrong, wanted) in problems.items():
            if is_wrong:
                raise UserError(f"{name}: {getattr(self, name)!r} is out of range; wanted {wanted}")

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            return {**chosen, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return {**chosen, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from."""

    input_ids: np.ndarray  # int64 [T], images widened
    pixel_values: torch.Tensor | None  # float32 [n_images, 3, H, W]


def left_padded(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, longest]: the texts end together, so that all answers begin together.

    `[[5, 6], [7]]` becomes `[[5, 6], [pad, 7]]`, `[[1, 1], [0, 1]]`.
    """
    n_longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), n_longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, n_longest - len(ids) :] = torch.from_numpy(ids)
        mask[row, n_longest - len(ids) :] = 1
    return input_ids, mask


def model_inputs(llava: Llava, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """The tensors of a batch, on the model's device."""
    model = llava.model
    input_ids, mask = left_padded([prompt.input_ids for prompt in prompts], llava.tokenizer.pad_token_id or 0)
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(model.device, model.dtype)
    return inputs


@torch.inference_mode()
def answers_of(
    llava: Llava, known: Prompts, prompts: Sequence[Prompt], sampling: Sampling, **settings: Any
) -> list[str]:
    """An answer for each prompt of a batch. `settings` go to transformers' `generate`."""
    inputs = model_inputs(llava, prompts)
    with _seeded(sampling.seed, llava.model.device):
        output = llava.model.generate(**inputs, **_arguments(llava, known, sampling, prompts), **settings)
    texts = llava.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return ["".join(visible([text], known.stop_string)) for text in texts]


def stream_answer(llava: Llava, known: Prompts, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
    """The answer in pieces, which joined are that of `answers_of`. Closing the iterator ends the computation."""
    if sampling.num_beams > 1:
        raise UserError("num_beams: beams are chosen between at the end, so their answer cannot be streamed")
    streamer = TextIteratorStreamer(llava.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = _Stop(), list[BaseException]()

    @torch.inference_mode()
    def compute() -> None:
        try:
            with _seeded(sampling.seed, llava.model.device):
                llava.model.generate(
                    **model_inputs(llava, [prompt]),
                    **_arguments(llava, known, sampling, [prompt]),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        except BaseException as error:  # raised again where the answer is read
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=compute, name="generate", daemon=True)
    thread.start()
    try:
        yield from visible(streamer, known.stop_string)
    finally:
        stop.asked = True
        thread.join()
    if failures:
        raise failures[0]


def visible(pieces: Iterable[str], stop: str | None) -> Iterator[str]:
    """The pieces of an answer up to the text that ends it, without white space around the whole.

    What may be the beginning of that text, or white space at the end, is held back until it is known not to be:
    `["4", "2 #", "##"]` with `###` gives `["4", "2"]`.
    """
    held, begun = "", False
    for piece in pieces:
        held += piece
        if not begun:
            held = held.lstrip()
        before, found, _ = held.partition(stop) if stop else (held, "", "")
        ready = before if found else before[: len(before) - _n_possible(before, stop)]
        ready = ready.rstrip()
        if ready:
            begun = True
            yield ready
        if found:
            return
        held = held[len(ready) :]
    if rest := held.rstrip():
        yield rest


def _n_possible(text: str, stop: str | None) -> int:
    """How many characters at the end of a text may be the beginning of `stop`."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1) if stop else ()
    return next((n for n in lengths if stop and text.endswith(stop[:n])), 0)


def _arguments(llava: Llava, known: Prompts, sampling: Sampling, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Keyword arguments of `generate`; no answer leaves what the model can read."""
    n_left = known.max_tokens - max(len(prompt.input_ids) for prompt in prompts)
    return {
        **replace(sampling, max_new_tokens=min(sampling.max_new_tokens, n_left)).settings(),
        "eos_token_id": known.end_ids,
        "pad_token_id": llava.tokenizer.pad_token_id or 0,
        "stop_strings": known.stop_string,
        "tokenizer": llava.tokenizer,
    }


class _Stop(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random draws decided by a seed, nobody else's random state touched."""
    if seed is None:
        yield
        return
    with _RANDOM, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
