"""The export behind `transformers serve`, as README tells it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_train.model.weights import export_model
from llava_train.use.llava import LLaVA
from tests import tiny
from tests.train.helpers import TIMEOUT_S, free_port

httpx = pytest.importorskip("httpx")
pytest.importorskip("openai")  # transformers serve takes its types from there


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_it_answers_over_http_as_it_does_here(template: str, tmp_path: Path) -> None:
    llava = tiny.tiny_llava(tiny.model_section(chat_template=template))
    export_model(llava.model, llava.processor, tiny.encoder_of(llava).end_of_turn_id(), tmp_path / "model")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    picture = "data:image/png;base64," + base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
    body = {"model": str(tmp_path / "model"), "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": 16, "temperature": 0}

    command = shutil.which("transformers")
    assert command
    port = str(free_port())
    serving = subprocess.Popen([command, "serve", body["model"], "--port", port])
    try:
        url = f"http://localhost:{port}"
        wait_until_healthy(url, serving)
        whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S).raise_for_status().json()
        streamed = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=TIMEOUT_S).text
    finally:
        serving.terminate()
        serving.wait(timeout=TIMEOUT_S)

    expected = LLaVA.from_pretrained(body["model"]).generate_from_image(
        tmp_path / "red.png", "What is it?", max_new_tokens=16
    )
    assert whole["choices"][0]["message"]["content"].strip() == expected != ""
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    # It never sends a character that is cut off by the end; a random model's bytes often are.
    assert len(pieces) > 2 and expected.startswith("".join(pieces).strip())


def wait_until_healthy(url: str, serving: subprocess.Popen[Any]) -> None:
    while serving.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=TIMEOUT_S).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("transformers serve has ended")
