"""Tokenizers of every make, small enough to be trained in a test, with the control tokens of every template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_train.model.processor import byte_tokenizer

SMOLLM2 = Path(__file__).parents[2] / "parts/smollm2-135m-instruct"
CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
CORPUS = [
    "USER: what is it? ASSISTANT: it is a red circle",
    "user assistant system model [INST] [/INST] Human: Assistant: ###",
    "abc def ghi 0123456789",
] * 3
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen split a text before they merge bytes."""


def llama_like() -> PreTrainedTokenizerFast:
    """As Llama 1 and 2: words begin with ▁, unknown characters fall back to bytes, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=control + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())  # bytes are ordinary tokens that a text cannot spell
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in control]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = _begins_with("<s>", tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def llama3_like() -> PreTrainedTokenizerFast:
    """As Llama 3: merged bytes of pieces split by a pattern, offsets without leading spaces, BOS is added."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "one\n\ntwo\n", "three.\n Done!\n\n"] * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _begins_with("<|begin_of_text|>", tokenizer)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=control[0], eos_token=control[1], pad_token=control[1]
    )


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, rstrip: bool = False) -> PreTrainedTokenizerFast:
    """Adds `<image>`, and the tokens of all templates. With `rstrip` these take the white space behind them."""
    tokens = [AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in CONTROL_TOKENS]
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False), *tokens], special_tokens=True)
    return tokenizer


def _begins_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _all() -> dict[str, PreTrainedTokenizerFast]:
    found = {"bytes": byte_tokenizer(), "llama": llama_like(), "llama3": llama3_like()}
    if SMOLLM2.is_dir():
        found["smollm2"] = AutoTokenizer.from_pretrained(SMOLLM2)
    return {name: add_control_tokens(tokenizer) for name, tokenizer in found.items()}


TOKENIZERS = _all()
ADD_BOS = ("llama", "llama3")
"""Tokenizers that put a begin-of-sequence token before a text."""
