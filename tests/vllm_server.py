"""A stand-in for a vLLM server: the routes that trlx uses, answered by a tiny transformers model in threads.

It behaves as vLLM 0.32 did when asked: greedy for temperature 0, a stream of its own for each seed, ids up to the token
that ends a stop sequence, and **a prefix cache that keeps states of old weights** until it is reset: the first block of
a prompt that it has read before is answered with the weights of then.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from trlx.backends.vllm.inside.trlx_vllm import wire

BLOCK = 4
"""Tokens of a block of the prefix cache."""
PATIENCE = timedelta(seconds=20)


class StandIn:
    """Serves `model` at `url` until `close`. Faults are set from outside."""

    def __init__(self, model, tokenizer, port: int = 0, max_model_len: int = 64, **described):
        self.first, self.tokenizer, self.limit, self.described = model, tokenizer, max_model_len, described
        self.failures: list[tuple[int, dict]] = []
        """Statuses and bodies of the next answers to requests for samples."""
        self.asked: list[dict] = []
        self.calls: list[str] = []
        self.lock = threading.Lock()
        self.boot()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet: the second would wait 40 ms for the first

            def do_GET(self):
                self.answer(*stand_in.get(self.path))

            def do_POST(self):
                size = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(size)) if size else {}
                parts = urlsplit(self.path)
                self.answer(*stand_in.post(parts.path, body, parse_qs(parts.query)))

            def answer(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def boot(self) -> None:
        """As after a start: the first weights, an empty cache, no trainer."""
        self.model = copy.deepcopy(self.first).eval()
        self.instance, self.owner, self.group = uuid.uuid4().hex, None, None
        self.is_updating = self.is_paused = False
        self.cache: dict[tuple[int, ...], torch.nn.Module] = {}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path):
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": self.limit}]}
        return (200, {}) if path == "/health" else (404, {})

    def post(self, path, body, query):
        route = getattr(self, path.strip("/").replace("/", "_"), None)
        self.calls.append(path)
        if route is None or path == "/close":
            return 404, {"detail": "Not Found"}
        try:
            return 200, route(body, query) or {}
        except _Refused as error:
            return error.args
        except Exception as error:  # as FastAPI
            return 500, {"error": repr(error)}

    def collective_rpc(self, body, query):
        if body["method"] == "reload_weights":
            self.load({k: v for f in Path(body["kwargs"]["weights_path"]).glob("*") for k, v in load_file(f).items()})
            return None
        if body["method"] == "trlx_follow":
            self.owner = body["kwargs"]["owner"]
            return None
        about = {
            "instance": self.instance,
            "owner": self.owner,
            "workers": 1,
            "vocab_size": self.model.config.vocab_size,
            "max_model_len": self.limit,
            "logprobs_mode": "processed_logprobs",
            "dtype": "float32",
            "device": "cpu",
        }
        return {"results": [about | self.described]}

    def init_weight_transfer_engine(self, body, query):
        info = body["init_info"]
        if self.group is not None:
            self.group.abort()
        store = TCPStore(info["host"], info["port"], is_master=False, timeout=PATIENCE)
        self.group = wire.join(store, 1, info["size"], info["kind"], PATIENCE)
        self.owner = info["owner"]

    def pause(self, body, query):
        assert query == {"mode": ["wait"]}
        self.lock.acquire()  # requests that are being answered are finished first
        self.is_paused = True
        self.lock.release()

    def resume(self, body, query):
        self.is_paused = False

    def start_weight_update(self, body, query):
        assert self.is_paused and not self.is_updating
        self.is_updating = True

    def update_weights(self, body, query):
        assert self.is_updating
        info = body["update_info"]
        buffer, tensors = wire.empty(info["shapes"], info["dtypes"], "cpu")
        wire.broadcast(self.group, buffer).wait()
        self.load(dict(zip(info["names"], tensors, strict=True)))

    def finish_weight_update(self, body, query):
        assert self.is_updating
        self.is_updating = False

    def reset_prefix_cache(self, body, query):
        self.cache.clear()
        return {"success": True}

    def load(self, weights):
        self.dtypes = {weight.dtype for weight in weights.values()}
        self.model = copy.deepcopy(self.model)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected

    def v1_completions(self, body, query):
        assert not self.is_paused
        self.asked.append(body)
        if self.failures:
            raise _Refused(*self.failures.pop(0))
        with self.lock:
            choices = [self.sample(body, body["seed"] + index) for index in range(body["n"])]
        return {"choices": choices}

    @torch.no_grad()
    def sample(self, body, seed):
        prompt, ids, logprobs = body["prompt"], [], []
        longest = min(body["max_tokens"], self.limit - len(prompt))
        block = tuple(prompt[:BLOCK])
        model = self.cache.setdefault(block, self.model) if len(block) == BLOCK else self.model
        generator = torch.Generator().manual_seed(seed)
        while len(ids) < longest:
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            if not body["temperature"]:
                shaped, token = logits.log_softmax(-1), int(logits.argmax())
            else:
                shaped = (logits / body["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(shaped.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(shaped[token]))
            if token in body["stop_token_ids"] or any(s in self.tokenizer.decode(ids) for s in body["stop"]):
                break
        return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}


class _Refused(Exception):
    """(status, body)."""
