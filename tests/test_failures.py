"""What exceptions mean to a user: of real faults, as libraries raise them."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from llava_train.data.problems import DataError
from llava_train.data.sources import open_source
from llava_train.errors import OtherRankFailed, UserError
from llava_train.failures import explain, explain_file, of_run
from llava_train.failures.words import WIDEST, Context
from llava_train.last_words import message
from llava_train.model.build import load_language_model
from llava_train.model.compatibility import BuildError
from llava_train.model.foreign_files import ForeignError, local_path
from llava_train.model.processor import load_tokenizer

RUN = Context(doing="step 3", run_dir=Path("runs/a"), is_run=True, n_ranks=2)
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NOWHERE = "http://127.0.0.1:1"


class Hub(BaseHTTPRequestHandler):
    """Answers by the name of the repository, as the hub does."""

    def do_GET(self) -> None:
        answers = {"gated": (403, "GatedRepo"), "busy": (503, "")}
        code, word = next((found for name, found in answers.items() if name in self.path), (404, "RepoNotFound"))
        self.send_response(code)
        if word:
            self.send_header("X-Error-Code", word)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Points the libraries of the hub at an address."""

    def point(address: str, offline: bool = False) -> None:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)

    return point


def error_of(do: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        do()
    return caught.value


def test_a_gated_model_is_told_with_its_page_and_the_login(hub: str, at: Callable[..., None]) -> None:
    at(hub)
    with pytest.raises(BuildError, match=r"^model.language_model: cannot load org/gated: it is gated: .*") as caught:
        load_tokenizer("org/gated")
    assert "https://huggingface.co/org/gated, run `hf auth login`" in str(caught.value)
    with pytest.raises(ForeignError, match="org/gated: it is gated"):
        local_path("org/gated")


def test_a_gated_data_set_is_told_with_its_page(hub: str, at: Callable[..., None]) -> None:
    at(hub)
    with pytest.raises(DataError, match=r"it is gated: [^$]*https://huggingface.co/datasets/org/gated,"):
        open_source("org/gated")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_told_as_such(hub: str, at: Callable[..., None]) -> None:
    at(hub)
    for do in (lambda: load_tokenizer("org/none"), lambda: local_path("org/none"), lambda: open_source("org/none")):
        with pytest.raises(
            UserError, match="org/none: .*no such folder here, and no such repository on the hub"
        ) as caught:
            do()
        assert f"counts from {Path.cwd()}" in str(caught.value) and "hf auth login" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_around(hub: str, at: Callable[..., None]) -> None:
    at(NOWHERE)
    with pytest.raises(ForeignError, match=r"org/x: the hub cannot be reached \(.*Connection refused\)") as caught:
        local_path("org/x")
    assert "hf download org/x --local-dir FOLDER" in str(caught.value)
    at(hub)
    with pytest.raises(ForeignError, match="org/busy: the hub refuses it, by code 503"):
        local_path("org/busy")


def test_hf_hub_offline_is_named_where_it_forbids_a_download(at: Callable[..., None]) -> None:
    at(NOWHERE, offline=True)
    for do in (lambda: load_tokenizer("org/x"), lambda: local_path("org/x"), lambda: open_source("org/x")):
        with pytest.raises(UserError, match="org/x: .*HF_HUB_OFFLINE forbids to download it"):
            do()


def bound() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def store(port: int, is_server: bool) -> distributed.TCPStore:
    wait_s = 1.0 if is_server else 0.2  # it has to reach itself
    return distributed.TCPStore("127.0.0.1", port, 2, is_server, timeout=timedelta(seconds=wait_s))


def test_a_port_in_use_is_told_with_its_number() -> None:
    with bound() as listener:
        port = listener.getsockname()[1]
        found = explain(error_of(lambda: store(port, is_server=True)))
    assert found and found.what.startswith(f"the port {port} is in use") and "--master_port" in str(found)


def test_processes_that_never_came_are_told_with_their_number_or_address() -> None:
    with bound() as listener:
        port = listener.getsockname()[1]
    waiting = explain(error_of(lambda: store(port, is_server=True)))
    calling = explain(error_of(lambda: store(port, is_server=False)))
    assert waiting and waiting.what.startswith("1 of the run's 2 processes came")
    assert calling and f"rank 0 of the run did not answer at 127.0.0.1:{port}" in calling.what
    assert "every node" in str(waiting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_told_with_why() -> None:
    found = explain(error_of(lambda: torch.zeros(1).cuda()))
    assert found and found.what.startswith("CUDA cannot be used: ") and "llava-train doctor" in str(found)


@pytest.mark.parametrize(
    ("said", "what"),
    {
        "The NVIDIA driver on your system is too old (found version 11040).": "the NVIDIA driver is too old",
        "Error 803: CUDA driver version is insufficient for CUDA runtime version": "the NVIDIA driver is too old",
        "CUDA error: no kernel image is available for execution on the device": "no code for this GPU",
        "CUDA error: invalid device ordinal": "no GPU of that number",
        "No CUDA GPUs are available": "no GPU is visible",
    }.items(),
)
def test_what_torch_says_of_cuda_is_understood(said: str, what: str) -> None:
    found = explain(RuntimeError(said))
    assert found and found.what.startswith("CUDA cannot be used: ") and what in found.what


def test_memory_of_a_gpu_and_of_the_machine_are_told_apart() -> None:
    of_gpu = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), RUN)
    assert of_gpu and of_gpu.what == "the memory of the GPU ran out in step 3" and "batch.max_tokens" in str(of_gpu)
    in_use = explain(torch.OutOfMemoryError("CUDA out of memory. Tried"), Context())
    assert in_use and "batch.max_tokens" not in str(in_use) and "--quantize 4bit" in str(in_use)
    for do in (lambda: torch.empty(10**15), lambda: np.zeros(10**15), lambda: _raise(MemoryError())):
        of_machine = explain(error_of(do), RUN)
        assert of_machine and of_machine.what == "the memory of this machine ran out in step 3"


def test_a_full_disk_is_told_whatever_wrote(tmp_path: Path) -> None:
    def by_torch() -> None:
        with Path("/dev/full").open("wb") as file:
            torch.save(torch.zeros(10_000), file)

    for do in (by_torch, lambda: Path("/dev/full").write_text("x"), lambda: _arrow("/dev/full")):
        found = explain(error_of(do), RUN)
        assert found and found.what == "the disk is full in step 3" and "df -h runs/a" in str(found), do
    of_rust = explain(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), RUN)
    assert of_rust and of_rust.what == "the disk is full in step 3"


def test_weights_of_another_shape_are_told_with_the_first_that_differs() -> None:
    found = explain(error_of(lambda: torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 3).state_dict())))
    assert found and found.what == "its weights do not fit the model" and "size mismatch for weight" in str(found)


@pytest.mark.parametrize("harm", ["cut", "missing", "shape"])
def test_a_part_whose_weights_are_harmed_is_refused_with_what_is_wrong(harm: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    file, state = tmp_path / "model.safetensors", model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if harm == "missing":
        save_file({key: value for key, value in state.items() if key != name}, file, {"format": "pt"})
    if harm == "shape":
        save_file({**state, name: state[name][:-1].contiguous()}, file, {"format": "pt"})
    said = {
        "cut": "is damaged or incomplete",
        "missing": f"lacks 1 of its tensors, such as {name}",
        "shape": "do not fit",
    }
    with pytest.raises(BuildError, match=f"^model.language_model: [^$]*{re.escape(said[harm])}"):
        load_language_model(str(tmp_path), torch.float32, 0)


def test_the_failure_of_another_rank_is_known_as_one() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:52138")
    for error in (
        lost,
        OtherRankFailed("rank 0 failed"),
        distributed.DistBackendError("NCCL communicator was aborted"),
    ):
        found = explain(error, RUN)
        assert found and found.by_another_rank
        assert len(message(error, found, RUN, Path("t.txt"))) == 1
    assert explain(distributed.DistBackendError("unhandled system error"), RUN).what.startswith(
        "the GPUs of this run cannot"
    )
    assert explain(lost, Context()) is None, "alone there is no other rank"


def test_a_cause_is_found_behind_what_wraps_it_and_a_bug_stays_a_bug() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "a/file")
        except OSError as error:
            raise BuildError("cannot load") from error
    except BuildError as error:
        found = explain(error)
    assert found and found.what == "the disk is full" and found.subject == "a/file"
    assert explain(KeyError("step")) is None


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=30)
ANY_TEXT = st.text(max_size=2000)


@st.composite
def errors(draw: st.DrawFn) -> Exception:
    """One of each kind, with whatever texts libraries may put into it."""
    text, name = draw(ANY_TEXT), draw(NAMES)
    raised = [
        torch.OutOfMemoryError(f"CUDA out of memory. {text}"),
        torch.OutOfMemoryError(text),
        MemoryError(text),
        RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {text}"),
        *(
            RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {s}. {text}")
            for s in ("Killed", "Bus error", "Oops")
        ),
        RuntimeError(f"No CUDA GPUs are available{text}"),
        AssertionError(f"Torch not compiled with CUDA enabled {text}"),
        distributed.DistNetworkError(f"port: 1, name: EADDRINUSE {text}"),
        distributed.DistStoreError(f"after 9 seconds waiting for clients. 1/2 clients joined. {text}"),
        distributed.DistNetworkError(f"timed out after 9ms while trying to connect to ({name}, 1) {text}"),
        *(OSError(code, os.strerror(code), name) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES)),
        OSError(errno.ENOMEM, text),
        RuntimeError(f"Error(s) in loading state_dict for X:\n{text}"),
        huggingface_hub.errors.LocalEntryNotFoundError(text),
        huggingface_hub.errors.OfflineModeIsEnabled(text),
        datasets.exceptions.DatasetNotFoundError(f"{name} is a gated dataset {text}"),
        datasets.exceptions.DatasetNotFoundError(text),
        ConnectionError(f"Couldn't reach {name} on the Hub {text}"),
        KeyError(text),
        ValueError(f"Caught ValueError in DataLoader worker process 0.\n{text}"),
        RuntimeError(text),
    ]
    return draw(st.sampled_from(raised))


@given(errors(), NAMES, NAMES, st.booleans(), st.integers(1, 3))
def test_a_message_has_at_most_eight_lines_of_reasonable_width(
    error: Exception, subject: str, doing: str, is_run: bool, n_ranks: int
) -> None:
    context = Context(n_ranks - 1, n_ranks, 0, doing, Path("runs/a") if is_run else None, subject, is_run)
    explained = explain(error, context) or explain_file(error, context)
    lines = "\n".join(message(error, explained, context, Path("runs/a/errors/20261126-100026-rank0.txt"))).split("\n")
    assert 1 <= len(lines) <= 8
    assert max(map(len, lines)) <= WIDEST, lines


def test_this_process_is_known_by_what_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    context = of_run()
    assert (context.rank, context.local_rank, context.n_ranks) == (9, 1, 16)


def _raise(error: BaseException) -> None:
    raise error


def _arrow(path: str) -> None:
    import pyarrow as pa

    schema = pa.schema([("a", pa.int64())])
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(range(100_000))], schema=schema))
