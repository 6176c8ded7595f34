from __future__ import annotations

import itertools

import pytest
import torch

from llava_train.config import PARTS, RandomLanguageModel, TrainableSection
from llava_train.model.trainable import parameter_groups, part_of, set_trainable, summarize
from tests.tiny import LANGUAGE_MODEL, model_section, tiny_llava

LORA = {"lr": 1e-4, "lora": {"rank": 2, "alpha": 4}}
COMBINATIONS = [set(parts) for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n)]


def section_of(parts: set[str]) -> TrainableSection:
    rates = {"projector": 1e-3, "language_model": 1e-5, "vision_tower": 1e-6}
    return TrainableSection(**{part: {"lr": rates[part]} for part in parts})


def trainable_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: "+".join(sorted(parts)))
def test_exactly_the_listed_parts_train(parts: set[str]) -> None:
    model = tiny_llava().model
    set_trainable(model, section_of(parts))
    assert {part_of(name) for name in trainable_names(model)} == parts
    for part in parts - {"vision_tower"}:
        assert all(p.requires_grad for n, p in model.named_parameters() if part_of(n) == part)


def test_layers_above_the_feature_layer_do_not_train() -> None:
    model = tiny_llava().model
    set_trainable(model, section_of({"vision_tower", "projector"}))
    names = {name for name in trainable_names(model) if part_of(name) == "vision_tower"}
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.2." in name or "post_layernorm" in name for name in names)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_are_on_the_language_model_alone_and_in_its_dtype() -> None:
    model = tiny_llava(dtype=torch.bfloat16).model
    peft_model = set_trainable(model, TrainableSection(projector={"lr": 1e-3}, language_model=LORA))
    names = trainable_names(model)
    adapters = {name for name in names if ".lora_" in name}
    assert peft_model is not None
    assert {part_of(name) for name in adapters} == {"language_model"}
    assert {part_of(name) for name in names - adapters} == {"projector"}
    assert all(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "projector")
    n_linear = 2 * 7  # layers, and the attention's four and the MLP's three
    assert len(adapters) == 2 * n_linear
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any("lora" in name for name, _ in model.model.vision_tower.named_modules())


@pytest.mark.parametrize(
    "others",
    [set(), {"projector"}, {"vision_tower"}, {"projector", "vision_tower"}],
    ids=lambda parts: "+".join(sorted(parts)) or "none",
)
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_adapters_change_nothing_about_what_else_trains(others: set[str], projector: str) -> None:
    plain, adapted = (tiny_llava(model_section(projector=projector)).model for _ in range(2))
    if others:
        set_trainable(plain, section_of(others))
    else:
        plain.requires_grad_(False)
    section = TrainableSection(language_model=LORA, **{part: {"lr": 1e-3} for part in others})
    set_trainable(adapted, section)
    names = trainable_names(adapted)
    assert {name for name in names if ".lora_" not in name} == trainable_names(plain)
    groups = parameter_groups(adapted, section, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)
    rates = {group["name"].removesuffix(" (no decay)"): group["lr"] for group in groups}
    assert rates == {"language_model": 1e-4, **dict.fromkeys(others, 1e-3)}
    table = {summary.part: summary for summary in summarize(adapted, section)}
    assert table["language_model"].lora and not table["projector"].lora
    n_adapters = 2 * 2 * (4 * (32 + 32) - 2 * 16 + 3 * (32 + 64))  # layers, rank; q k v o with 16 of k and v; MLP
    assert table["language_model"].n_trainable == n_adapters


def test_tied_embeddings_train_once() -> None:
    tied = RandomLanguageModel(config={**LANGUAGE_MODEL, "tie_word_embeddings": True})
    model = tiny_llava(model_section(language_model=tied)).model
    section = section_of({"language_model"})
    set_trainable(model, section)
    grouped = [id(p) for group in parameter_groups(model, section, 0.0) for p in group["params"]]
    assert grouped.count(id(model.lm_head.weight)) == 1
    assert model.lm_head.weight is model.get_input_embeddings().weight
    section = section_of({"projector"})
    set_trainable(model, section)
    assert not model.lm_head.weight.requires_grad


def test_a_second_call_decides_anew() -> None:
    model = tiny_llava().model
    set_trainable(model, section_of(set(PARTS)))
    set_trainable(model, section_of({"projector"}))
    assert {part_of(name) for name in trainable_names(model)} == {"projector"}


def test_adapters_start_as_nothing_and_from_the_seed() -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_llava().model
        torch.manual_seed(torch.seed() % 1000)
        set_trainable(model, TrainableSection(language_model=LORA), seed)
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}

    first, again, other = adapters(0), adapters(0), adapters(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(not first[name].any() for name in first if "lora_B" in name)


def test_the_second_layer_of_a_linear_projector_stays_frozen() -> None:
    model = tiny_llava(model_section(projector="linear")).model
    set_trainable(model, section_of({"projector"}))
    names = {name.rsplit("multi_modal_projector.", 1)[1] for name in trainable_names(model)}
    assert names == {"linear_1.weight", "linear_1.bias"}


@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: "+".join(sorted(parts)))
def test_each_trainable_parameter_is_in_one_group_with_its_parts_rate(parts: set[str]) -> None:
    model = tiny_llava().model
    section = section_of(parts)
    set_trainable(model, section)
    groups = parameter_groups(model, section, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    part_by_id = {id(p): part_of(n) for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == group["peak_lr"] == section.learning_rates()[part_by_id[id(parameter)]]
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_the_table_counts_every_parameter_once() -> None:
    model = tiny_llava().model
    section = section_of({"projector"})
    set_trainable(model, section)
    table = {summary.part: summary for summary in summarize(model, section)}
    assert sum(summary.n_parameters for summary in table.values()) == sum(p.numel() for p in model.parameters())
    assert table["projector"].n_trainable == table["projector"].n_parameters
    assert table["language_model"].n_trainable == table["vision_tower"].n_trainable == 0
    assert (table["projector"].lr, table["vision_tower"].lr) == (1e-3, None)
