"""A server on this machine with a small random model, for tests that speak HTTP to it."""

import contextlib
import threading
import time
import urllib.request

import uvicorn
from oracles import random_model, tiny_config

from jaxseek.engine.engine import Engine
from jaxseek.serve.app import Options, create
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer, train_sentencepiece

MARKS = (
    *(chat.USER, chat.ASSISTANT, chat.THINK, chat.THINK_END, chat.CALLS, chat.CALLS_END, chat.CALL),
    *(chat.CALL_END, chat.SEP, chat.OUTPUTS, chat.OUTPUTS_END, chat.OUTPUT, chat.OUTPUT_END),
)


def model_and_tokenizer(folder, context=256):
    """A random V3 whose tokens are those of a tokenizer made here, with V3.1's chat template."""
    words = ["the quick brown fox jumps over the lazy dog", "0 1 2 3 4 5 6 7 8 9", "abc def ghi jkl mno pqr"]
    train_sentencepiece(words * 20, 330, folder, MARKS)
    tokenizer = Tokenizer.from_dir(folder, template="deepseek_v3_1")
    cfg = tiny_config("v3", vocab_size=384, max_position_embeddings=context, num_nextn_predict_layers=0)
    return random_model(cfg), tokenizer


@contextlib.contextmanager
def served(model, tokenizer, slots=4, **options):
    """(server, URL) while it runs; it is ready, that is warmed up."""
    app = create(Engine(model, slots, mode="filtered", dispatch=4), tokenizer, Options("tiny", **options))
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{url}/ready").status == 200:
                    break
            time.sleep(0.2)
        yield app.state.server, url
    finally:
        server.should_exit = True
        thread.join()
