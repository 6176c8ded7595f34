"""Generated answers end where training ended them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_train.data.samples import Turn
from llava_train.train.evaluate import generate, generating
from tests.tiny import encoder_of, model_section, tiny_llava


class Scripted(nn.Module):
    """A head that makes the model say tokens one by one."""

    def __init__(self, input_ids: list[int], n_tokens: int) -> None:
        super().__init__()
        self.rest, self.n_tokens = list(input_ids), n_tokens

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        said = torch.tensor(self.rest.pop(0))
        return nn.functional.one_hot(said, self.n_tokens).float().expand(*hidden_states.shape[:-1], -1)


@pytest.mark.parametrize(("template", "end"), [("llava_v0", "###"), ("vicuna_v1", "</s>"), ("chatml", "<|im_end|>")])
def test_an_answer_ends_with_the_text_that_ends_turns_in_training(template: str, end: str) -> None:
    llava = tiny_llava(model_section(chat_template=template))
    encoder = encoder_of(llava)
    said = llava.tokenizer(f"A # cat{end}Human: more", add_special_tokens=False).input_ids
    llava.model.lm_head = Scripted(said, llava.model.config.text_config.vocab_size)
    prompt, _ = encoder.render((Turn("user", "What?"),), prompt=True)
    with generating(llava.model):
        assert generate(llava, prompt, [], 30, encoder) == "A # cat"
    assert llava.tokenizer.decode(llava.model.lm_head.rest) == "Human: more"
