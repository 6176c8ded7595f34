"""Model parts from wheels: pinned files only, DINOv2's names, SmolLM2's digits, and parts that are whole or absent."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model

from tests.scripts import load_script

parts = load_script("data/build_small_parts.py")


def make_wheel(folder: Path, version: str = "1.0") -> Path:
    """A valid wheel of a package that does not exist."""
    path = folder / f"toy_part-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_part/weights.bin", f"weights {version}")
        info = f"toy_part-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-part\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def pin(folder: Path, digest: str, source: Path | None = None) -> Path:
    """A requirement file for the toy wheel; with `source`, pip looks there and never at the network."""
    lines = [f"--no-index\n--find-links {source}"] if source else []
    path = folder / "pins.txt"
    path.write_text("\n".join([*lines, f"toy-part==1.0 --hash=sha256:{digest}"]) + "\n", encoding="utf-8")
    return path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_pinned_wheels_are_the_ones_that_are_read() -> None:
    assert set(parts.pinned_hashes()) == {parts.SMOLLM2_WHEEL, parts.DINOV2_WHEEL}


def test_a_changed_wheel_is_refused_with_its_path_and_what_to_do(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    pins = pin(tmp_path, "0" * 64)
    with pytest.raises(SystemExit) as refused:
        parts.verified_wheel(tmp_path, "toy_part-1.0", pins)
    message = str(refused.value)
    assert str(wheel) in message and digest_of(wheel) in message and str(pins) in message and "delete it" in message


def test_the_pinned_version_is_taken_whatever_else_lies_there(tmp_path: Path) -> None:
    """An older wheel sorts first."""
    make_wheel(tmp_path, "0.9")
    wheel = make_wheel(tmp_path)
    assert parts.verified_wheel(tmp_path, "toy_part-1.0", pin(tmp_path, digest_of(wheel))) == wheel
    assert parts.extract(wheel, "toy_part/weights.bin", tmp_path / "x").read_text() == "weights 1.0"


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="toy_part-1.0.*run this script again"):
        parts.verified_wheel(tmp_path, "toy_part-1.0", pin(tmp_path, "0" * 64))


def test_only_whole_and_right_wheels_spare_the_download(tmp_path: Path) -> None:
    assert not parts.are_downloaded(tmp_path, pin(tmp_path, "0" * 64))
    wheel = make_wheel(tmp_path)
    assert not parts.are_downloaded(tmp_path, pin(tmp_path, "0" * 64))
    assert parts.are_downloaded(tmp_path, pin(tmp_path, digest_of(wheel)))


def test_pip_refuses_a_wrong_hash_and_takes_the_right_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wheel = make_wheel(source)
    with pytest.raises(SystemExit) as refused:
        parts.download_wheels(tmp_path / "wrong", pin(tmp_path, "0" * 64, source))
    message = str(refused.value)
    assert "pins.txt" in message and "toy" in message and "hash" in message and "delete it" in message
    assert not list((tmp_path / "wrong").glob("*.whl"))
    parts.download_wheels(tmp_path / "right", pin(tmp_path, digest_of(wheel), source))
    assert (tmp_path / "right" / wheel.name).read_bytes() == wheel.read_bytes()


def test_pip_refuses_a_pin_without_a_hash(tmp_path: Path) -> None:
    make_wheel(tmp_path)
    pins = tmp_path / "pins.txt"
    pins.write_text(f"--no-index\n--find-links {tmp_path}\ntoy-part==1.0\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="hash"):
        parts.download_wheels(tmp_path / "wheels", pins)


def as_graph(model: Dinov2Model) -> tuple[dict[str, np.ndarray], list[tuple[str, list[str]]]]:
    """Constants and matrix products as an ONNX export lays a DINOv2 out: anonymous, transposed matrices."""
    arrays: dict[str, np.ndarray] = {}
    products = [("/head/MatMul", ["h", "head_matrix"]), ("/backbone/encoder/layer.0/attention/MatMul_1", ["q", "k"])]
    arrays["head_matrix"] = np.ones((3, 3), dtype=np.float32)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "embeddings.position_embeddings":
            # Patches come first here, so that the order is the mapping's own doing.
            arrays["constant_patches"], arrays["constant_class"] = array[:, 1:], array[:, :1]
        elif tensor.ndim == 2 and name.startswith("encoder") and name.endswith(".weight"):
            arrays[f"onnx::MatMul_{len(products)}"] = array.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/0", "layer.0")
            products.append((f"/backbone/{path}/MatMul", [f"input_{name}", f"onnx::MatMul_{len(products)}"]))
        elif name != "embeddings.mask_token":
            arrays[f"backbone.{name}"] = array
    return arrays, products


def test_a_graph_maps_back_to_the_model_it_came_from() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=28, patch_size=14, mlp_ratio=2
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # zeros and ones would hide a swap
    state = parts.dinov2_state(*as_graph(model))
    twin = Dinov2Model(config).eval()
    twin.load_state_dict(state, strict=True)  # no missing and no unexpected key
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(twin(pixels).last_hidden_state, model(pixels).last_hidden_state)


def toy_tokenizer() -> Tokenizer:
    """Knows two line feeds as one token, which only the digit split lets it use before a digit."""
    vocabulary = {token: number for number, token in enumerate(["Ċ", "ĊĊ", "Ġ", "1", "2", "a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_digits_are_split_from_the_space_before_them() -> None:
    tokenizer = toy_tokenizer()
    assert tokenizer.encode("a\n\n12").tokens == ["a", "Ċ", "Ċ", "1", "2"]
    parts.split_digits(tokenizer)
    assert tokenizer.encode("a\n\n12").tokens == ["a", "ĊĊ", "1", "2"]


def test_a_part_is_whole_or_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("disk full")

    def succeed(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(RuntimeError, match="disk full"):
        parts.build(tmp_path, "toy", fail)
    assert not (tmp_path / "toy").exists()
    parts.build(tmp_path, "toy", succeed)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["whole"]
    parts.build(tmp_path, "toy", fail)  # there already: not made again
    assert "already built" in capsys.readouterr().out
