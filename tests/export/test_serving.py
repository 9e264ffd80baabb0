"""`transformers serve` answers requests for an exported model with our greedy text.

It needs more packages than the other tests: `pip install "transformers[serving]"`.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.data.chat_template import ChatTemplate
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.export.facts import Facts
from bitnet.export.hf_write import save_hf
from bitnet.generate import encode_prompt, generate
from bitnet.model import ModelConfig, Transformer

pytestmark = pytest.mark.slow
TEXT = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
CHAT = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
TOKENS = 24
DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # tests have a proxy that fails


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    tokenizer = train_tokenizer([TEXT * 20], 300, path, 1)
    tokenizer.chat_template = ChatTemplate(CHAT, {"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def learned(tokenizer: Tokenizer, **fields: Any) -> Transformer:
    """A model that has the text nearly by heart: its greedy tokens are far from any tie."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"depth": 2, "vocab_size": tokenizer.vocab_size, "max_seq_len": 128}
    model = Transformer(ModelConfig(**shape | fields))
    ids = torch.tensor([encode_prompt(tokenizer, TEXT * 2)[:127]])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@contextmanager
def serving(command: list[str], log: Path, ready: str) -> Iterator[str]:
    """The address of a server that runs within the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                DIRECT.open(url + ready, timeout=5).read()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with DIRECT.open(request, timeout=240) as answer:
        return json.load(answer)


def our_text(model: Transformer, tokenizer: Tokenizer, prompt: list[int]) -> str:
    (new,) = generate(model, [prompt], TOKENS, eos_id=tokenizer.eos_ids)
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


def test_transformers_serve(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for package in ("transformers", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason='pip install "transformers[serving]"')
    model, folder = learned(tokenizer), tmp_path / "mine-hf"
    save_hf(model, tokenizer, folder, "offline", Facts("mine"))
    main = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", main, "serve", str(folder), "--device", "cpu"]
    with serving(command, tmp_path / "log", "/health") as url:
        same = {"model": str(folder), "max_tokens": TOKENS, "temperature": 0}
        answer = ask(url + "/v1/completions", prompt="to be or", **same)
        chat = [{"role": "user", "content": "to be or"}]
        said = ask(url + "/v1/chat/completions", messages=chat, **same)
    expected = our_text(model, tokenizer, encode_prompt(tokenizer, "to be or"))
    assert len(expected) > TOKENS
    assert answer["choices"][0]["text"].strip() == expected.strip()
    assert answer["usage"]["prompt_tokens"] == len(encode_prompt(tokenizer, "to be or"))
    assert tokenizer.chat_template is not None
    ids = tokenizer.encode_chat(tokenizer.chat_template, [{"role": "user", "content": "to be or"}])
    assert said["usage"]["prompt_tokens"] == len(ids)
    told = said["choices"][0]["message"]["content"]
    assert told.strip() == our_text(model, tokenizer, ids).strip()
