"""What can be wrong with data: a kind for each, so that a run and the doctor count and name them alike."""

from __future__ import annotations

from llava_train.errors import UserError

KINDS = {
    "not_json": "a record that is not valid JSON",
    "not_utf8": "a record or text that is not valid Unicode",
    "not_an_object": "a record that is not a JSON object",
    "no_conversation": "no conversation, or an empty one",
    "malformed_turn": "a turn that is not a role and a text",
    "not_text": "a text that is not a string",
    "empty_answer": "an answer without a visible character",
    "unread_picture": "a picture under a key that nothing reads",
    "video_or_sound": "a video or a sound, which are not supported",
    "unsupported_key": "a key that changes the meaning and is not supported",
    "unknown_role": "an unknown role",
    "roles_out_of_order": "user and assistant do not take turns",
    "placeholders": "placeholders and images do not match",
    "control_token": "a control token of the model in a text",
    "template_refuses": "a conversation that the chat template does not render",
    "nothing_supervised": "no supervised token",
    "over_long": "more tokens than batch.max_sample_tokens",
    "image_value": "an image that is neither a path nor a picture's bytes",
    "image_remote": "an image on the network",
    "path_outside_root": "an image path that leaves its root",
    "symlink_outside_root": "an image whose symbolic link leaves its root",
    "image_missing": "an image that is missing",
    "image_unreadable": "an image that the system does not let read",
    "image_empty": "an image of zero bytes, or without a pixel",
    "image_truncated": "an image that is cut off",
    "image_damaged": "an image whose content is damaged",
    "image_mode": "an image of 32-bit numbers, whose range nobody knows",
    "not_an_image": "an image file that is no picture",
    "decompression_bomb": "an image too large to decode",
}
"""Every kind of problem that keeps a sample from being trained on, in words."""


LONGEST_NAME = 200
_LONGEST_MESSAGE = 1000


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """A text for a message or a record of a run: the middle of a longer one is replaced by its number of characters."""
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 4
    return f"{text[:head]}... ({len(text):,} characters) ...{text[-tail:]}"


class SampleError(UserError):
    """A sample that cannot be trained on. The message says why; whoever catches it knows which sample.

    Args:
        kind: one of `KINDS`.
        message: shortened where it is very long, since it may quote the data.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(shortened(message, _LONGEST_MESSAGE))
        assert kind in KINDS, kind
        self.kind = kind


class DataError(UserError):
    """A source that cannot be read. The message names the file and the mend."""
