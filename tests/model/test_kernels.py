"""`engine.kernels`: how layers are computed is a speed knob."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from llava_train.config import LoraSection, TrainableSection
from llava_train.errors import UserError
from llava_train.model import kernels
from llava_train.model.kernels import check_kernels, layers_of, uncompiled, use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.recompute import Recompute, enable_recompute
from llava_train.model.trainable import set_trainable
from tests.tiny import dataset_of, tiny_llava, write_data

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def trained_llava(how: str, recompute: Recompute = "none"):
    llava = tiny_llava()
    lora = LoraSection(rank=4, alpha=8)
    set_trainable(llava.model, TrainableSection(projector={"lr": 1.0}, language_model={"lr": 1.0, "lora": lora}))
    for name, parameter in llava.model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    llava.model.train()
    llava.model.model.vision_tower.eval()
    enable_recompute(llava.model.model.language_model, recompute)
    use_kernels(llava.model, how, CPU, zero=2)
    return llava


def gradients(llava, pack) -> dict[str, torch.Tensor]:
    llava.model.zero_grad()
    loss, _ = PackedLoss(llava.model)(**pack.model_inputs())
    loss.backward()
    found = {name: parameter.grad for name, parameter in llava.model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_layers_give_the_same_gradients_and_packs_of_any_length_share_their_compilation(
    recompute: Recompute, tmp_path: Path
) -> None:
    torch.compiler.reset()
    eager, compiled = trained_llava("eager"), trained_llava("compile", recompute)
    compile_nothing(compiled.model.model.vision_tower)  # only the language model is recomputed: its graphs are counted
    data = write_data(tmp_path, 12)
    packs = [dataset_of(eager, data, batch_size=size)[0].micro_batches[0] for size in (2, 3, 5, 7, 9, 4)]
    assert len({pack.input_ids.shape for pack in packs}) == len(packs)
    torch._dynamo.utils.counters.clear()
    n_compiled = []
    for pack in packs:
        torch.testing.assert_close(gradients(compiled, pack), gradients(eager, pack), rtol=1e-4, atol=1e-4)
        n_compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert n_compiled[-1] == n_compiled[1] > 0, n_compiled


def compile_nothing(module: nn.Module) -> None:
    for layer in layers_of(module):
        del layer.forward


def test_a_compiled_layer_is_recomputed_in_the_backward_pass(tmp_path: Path) -> None:
    """transformers calls a layer's checkpointing function in another place than before 5.23."""
    runs: list[nn.Module] = []
    llava = trained_llava("compile", "full")
    layer = layers_of(llava.model.model.language_model)[0]
    checkpoint = layer._gradient_checkpointing_func

    def counted(function: Any, *arguments: Any) -> Any:
        def run(*given: Any) -> Any:
            runs.append(layer)
            return function(*given)

        return checkpoint(run, *arguments)

    layer._gradient_checkpointing_func = counted
    gradients(llava, dataset_of(llava, write_data(tmp_path, 12))[0].micro_batches[0])
    assert len(runs) == 2, "in the forward pass, and again in the backward pass"


def test_layers_run_uncompiled_inside_and_compiled_again_afterwards() -> None:
    model = trained_llava("compile").model
    compiled = [layer.forward for layer in layers_of(model)]
    assert len(compiled) == model.config.text_config.num_hidden_layers + model.config.vision_config.num_hidden_layers
    with uncompiled(model):
        assert all(layer.forward.__func__ is type(layer).forward for layer in layers_of(model))
    assert [layer.forward for layer in layers_of(model)] == compiled


def test_compiled_layers_keep_the_names_of_the_weights() -> None:
    assert list(trained_llava("compile").model.state_dict()) == list(trained_llava("eager").model.state_dict())


def test_liger_is_refused_without_a_cuda_device_and_without_its_package() -> None:
    with pytest.raises(UserError, match=r"engine.kernels: .* need a CUDA device; choose eager or compile"):
        check_kernels("liger", CPU)
    if find_spec("liger_kernel") is None:
        with pytest.raises(UserError, match="pip install liger-kernel"):
            check_kernels("liger", CUDA)


def test_liger_changes_the_model_that_is_given_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def apply(model: nn.Module, **options: bool) -> None:  # as liger-kernel 0.8 does: the instance, and the class
        given.append((model, options))
        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", None)

    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = apply
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for module in (ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    model = tiny_llava().model
    use_kernels(model, "liger", CUDA, zero=2)
    ((patched, options),) = given
    assert patched is model.model.language_model
    assert not any(options.values()), "the loss stays ours, and rotary embeddings are the module's"
    tiny_llava()  # the result is built anew
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {}
    with pytest.raises(UserError, match="liger has no kernels for a llama"):
        use_kernels(model, "liger", CUDA, zero=2)
