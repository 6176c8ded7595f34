"""Parts that cannot be joined, or that training would not compute right, refused while a model is built."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig, PreTrainedModel

from llava_train.config import ModelSection
from llava_train.errors import UserError
from llava_train.model.attention import Documents


class BuildError(UserError):
    """Parts that cannot be joined. The message names the key of the stage file and the mend."""


def refuse_unlike_llava(model: PreTrainedModel) -> None:
    """Refuses language models whose output transformers' LLaVA class would compute differently."""
    head, config = model.get_output_embeddings(), model.config
    if head is None or getattr(head, "bias", None) is not None:
        raise BuildError(f"model.language_model: {config.model_type} has an output layer that LLaVA cannot hold")
    if getattr(model.base_model, "embed_tokens", None) is None:
        raise BuildError(
            f"model.language_model: {config.model_type} has no embed_tokens, where LLaVA looks for the embeddings"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise BuildError(
                f"model.language_model: {config.model_type} changes its logits ({name}), which LLaVA cannot hold"
            )


@torch.no_grad()
def check_packing(model: LlavaForConditionalGeneration) -> None:
    """Refuses language models whose documents would see each other in a pack: the last of three must not."""
    decoder, embeddings = model.model.language_model, model.get_input_embeddings().weight
    first, other = torch.randn(2, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    documents = (torch.stack([first, other, first]) * embeddings.float().std()).to(embeddings.dtype)
    problem = None
    if getattr(decoder, "_is_stateful", False):
        problem = "it keeps a state that runs from one document into the next"
    elif getattr(decoder.config, "attention_dropout", 0.0):
        problem = "packed attention has no dropout; set attention_dropout to 0 in its config.json"
    else:
        try:
            hidden = decoder(
                inputs_embeds=documents[None],
                position_ids=torch.zeros(1, 3, dtype=torch.int64),
                attention_mask=None,
                use_cache=False,
                documents=Documents(torch.arange(4, dtype=torch.int32), (1, 1, 1)),
            ).last_hidden_state[0]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            tolerance = 1e-5 if hidden.dtype == torch.float32 else 1e-2
            if (hidden[0] - hidden[2]).abs().max() > tolerance * hidden.abs().max():
                problem = "its documents see each other"
    if problem:
        raise BuildError(f"model.language_model: a {decoder.config.model_type} cannot be trained in packs: {problem}")


def check_class_token(section: ModelSection, config: PreTrainedConfig, size: int, n_encoder_tokens: int) -> None:
    """`patch` would drop a patch of the picture where the encoder (SigLIP) has no class token."""
    if section.vision_feature_select == "patch" and n_encoder_tokens == (size // config.patch_size) ** 2:
        raise BuildError(
            f"model.vision_feature_select: patch drops the class token, which a {config.model_type} does not have; "
            "use full"
        )


def check_processor(processor: LlavaProcessor, size: int, n_image_tokens: int) -> None:
    """The processor must widen `<image>` to as many tokens as the model makes of a picture."""
    picture = torch.zeros(3, size, size, dtype=torch.uint8)
    input_ids = processor(images=picture, text=processor.image_token, return_tensors="pt").input_ids
    made = int((input_ids == processor.image_token_id).sum())
    assert made == n_image_tokens, f"the processor makes {made} image tokens, the model {n_image_tokens}"
